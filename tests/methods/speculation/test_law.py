"""Sampling with speculation has the law of plain sampling: exact laws of two and three tokens, counted in thousands.

The law comes from members without a cache in float64 and transformers' own warpers. What a wrong verification does is
shown first, so that the counts are known to be able to tell.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.speculation import alone, p_value
from support.tiny import build
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import proxytune
from proxytune import SpeculativeDecoding, ops
from proxytune.costs.speculation import DraftCosts
from proxytune.methods.speculation import BigramDraft, ModelDraft, PromptLookupDraft

VOCAB, ALPHA, ROWS = 6, 0.6, 3000
TEXT = torch.tensor([3, 5, 4, 3])
WARPED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top-k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min-p": ({"min_p": 0.15}, [MinPLogitsWarper(0.15)]),
    "all": (
        {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.4), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
    "penalty": (
        {"repetition_penalty": 1.5, "top_k": 4},
        [RepetitionPenaltyLogitsProcessor(1.5), TopKLogitsWarper(4)],
    ),
}


@functools.cache
def small(seed: int, vocab: int = VOCAB) -> PreTrainedModel:
    model = build("llama", seed, vocab)
    model.lm_head.weight.data.mul_(0.5)  # flat enough for many outcomes, and far enough from each other
    return model


@functools.cache
def composed() -> Any:
    return proxytune.wrap(small(41), expert=small(42), antiexpert=small(43), alpha=ALPHA, check_vocabulary=False)


def draft(name: str) -> Any:
    return {
        "expert": "expert",
        "model": ModelDraft(small(44)),
        "narrow": ModelDraft(small(45, VOCAB - 2)),
        "lookup": PromptLookupDraft(1, 1),
        "bigrams": BigramDraft.of(small(41)),
        "likely": BigramDraft(exact("min-p", 2).argmax(1)),
    }[name]


def law(logits: Callable[[torch.Tensor], torch.Tensor], processors: list[Any], tokens: int) -> torch.Tensor:
    """`[V, …, V]`: the exact joint law of the next tokens."""
    p = torch.zeros((VOCAB,) * tokens, dtype=torch.float64)

    def fill(text: torch.Tensor, before: tuple[int, ...], mass: float) -> None:
        if len(before) == tokens:
            p[before] = mass
            return
        here = LogitsProcessorList(processors)(text[None], logits(text)[None].double())[0].softmax(-1)
        for token in here.nonzero()[:, 0].tolist():
            fill(torch.cat([text, torch.tensor([token])]), (*before, token), mass * float(here[token]))

    fill(TEXT, (), 1.0)
    return p


def counted(model: Any, loop: Any, tokens: int, new: int, settings: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """How often each continuation came, `[V, …, V]`, and what `generate()` gave."""
    out = model.generate(
        TEXT[None],
        attention_mask=torch.ones(1, len(TEXT), dtype=torch.long),
        custom_generate=loop,
        do_sample=True,
        num_return_sequences=ROWS,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **{"top_k": 0} | settings,
    )
    first = out.sequences[:, len(TEXT) : len(TEXT) + tokens]
    flat = (first * VOCAB ** torch.arange(tokens - 1, -1, -1)).sum(1)
    return torch.bincount(flat, minlength=VOCAB**tokens).view((VOCAB,) * tokens), out


def distance(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Total variation."""
    return float((counts.double() / counts.sum() - p).abs().sum() / 2)


@functools.cache
def exact(name: str, tokens: int) -> torch.Tensor:
    return law(functools.partial(next_logits, [small(s) for s in (41, 42, 43)], ALPHA), WARPED[name][1], tokens)


def fits(counts: torch.Tensor, p: torch.Tensor) -> None:
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert p_value(counts, p) > 1e-4
    # What counts of this many draws are off by themselves: twice their mean.
    assert distance(counts, p) < 2 * float((p * (1 - p) / counts.sum()).sqrt().sum()) * 0.4


CASES = [
    *itertools.product(["expert"], ["plain", "all", "penalty"], [1, 3]),
    *itertools.product(["expert"], ["temperature", "top-k", "top-p", "min-p"], [3]),
    ("model", "plain", 3),
    ("model", "all", 2),
    ("narrow", "plain", 2),
    ("narrow", "penalty", 2),
    ("lookup", "plain", 3),
    ("lookup", "top-p", 2),
    ("lookup", "penalty", 3),
    ("bigrams", "all", 3),
    ("expert", "plain", "auto"),
]


@pytest.mark.parametrize(
    ("name", "settings", "length"),
    # Draws that are not truncated look at 1024 columns each.
    [
        pytest.param(*c, marks=pytest.mark.slow) if c[1] in ("plain", "temperature") and c[0] != "lookup" else c
        for c in CASES
    ],
)
def test_the_law_of_the_first_tokens(name: str, settings: str, length: Any) -> None:
    loop = SpeculativeDecoding(draft=draft(name), draft_tokens=length, seed=17, costs=DraftCosts(round=1.0, draft=0.1))
    # The first token is the prompt's; then a round. More are asked for, so that no draft is cut.
    counts, out = counted(composed(), loop, 3, 5, WARPED[settings][0])
    fits(counts, exact(settings, 3))
    assert out.accepted.sum() > 0
    assert out.rejected.sum() > ROWS / 20, "q is too near to p to tell"


@pytest.mark.smoke
def test_the_law_of_a_plain_model() -> None:
    p = law(alone(small(41)), WARPED["all"][1], 3)
    loop = SpeculativeDecoding(draft=ModelDraft(small(42)), draft_tokens=2, seed=3)
    fits(counted(small(41), loop, 3, 4, WARPED["all"][0])[0], p)


@pytest.mark.smoke
def test_by_coupling_too() -> None:
    loop = SpeculativeDecoding(draft_tokens=2, accept="coupled", seed=3)
    counts, out = counted(composed(), loop, 3, 4, WARPED["top-p"][0])
    fits(counts, exact("top-p", 3))
    assert out.accepted.sum() > ROWS / 10


def test_without_a_seed_and_through_assistant_model() -> None:
    torch.manual_seed(11)
    model, ids = composed(), TEXT[None].repeat(ROWS, 1)
    model.expert.generation_config.num_assistant_tokens = 3
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=3, max_new_tokens=5, eos_token_id=None,
        assistant_model=model.expert, pad_token_id=0,
    )  # fmt: skip
    flat = (got[:, 4:7] * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    fits(torch.bincount(flat, minlength=VOCAB**3).view(VOCAB, VOCAB, VOCAB), exact("top-k", 3))


# --- what would be noticed ------------------------------------------------------------------------------------------


def always(inner: Any, *args: Any, drafted: torch.Tensor, **kwargs: Any) -> Any:
    """Every draft is accepted."""
    found = inner(*args, drafted=drafted[:, :0], **kwargs | {"draft": None}) if not drafted.shape[1] else None
    if found is not None:
        return found
    rows, (batch, most) = args[0], drafted.shape
    last = [x.unflatten(0, (batch, most + 1))[:, -1] for x in rows]
    end = inner(last, args[1], drafted=drafted[:, :0], **kwargs | {"draft": None})
    there = (drafted >= 0).all()
    assert there
    return ops.VerifyOutput(torch.cat([drafted, end.tokens], 1), torch.full((batch,), most))


def from_p(inner: Any, *args: Any, drafted: torch.Tensor, **kwargs: Any) -> Any:
    """After a rejected draft the token is drawn from p, in place of the residual."""
    found = inner(*args, drafted=drafted, **kwargs)
    batch, most = drafted.shape
    row = torch.arange(batch) * (most + 1) + found.accepted
    noise = kwargs["noise"]
    plain = inner(
        [x[row] for x in args[0]],
        args[1],
        drafted=drafted[:, :0],
        sampling=kwargs["sampling"],
        noise=type(noise)(noise.seed + 1, noise.row, noise.position, noise.branch),
    ).tokens
    tokens = found.tokens.scatter(1, found.accepted[:, None], plain)
    return ops.VerifyOutput(tokens, found.accepted)


def undrawn(inner: Any, *args: Any, draft: Any = None, **kwargs: Any) -> Any:
    """Drawn drafts are taken for given ones: too many are rejected, but q(x) = 1 is right for whatever x."""
    return inner(*args, draft=None, **kwargs)


@pytest.mark.smoke
@pytest.mark.parametrize(("wrong", "noticed"), [(always, True), (from_p, True), (undrawn, False)])
def test_a_wrong_verification_is_noticed(wrong: Any, noticed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "verify", functools.partial(wrong, ops.verify))
    counts, _ = counted(composed(), SpeculativeDecoding(draft_tokens=2, seed=17), 3, 4, WARPED["top-p"][0])
    assert (p_value(counts, exact("top-p", 3)) < 1e-4) == noticed


# --- acceptance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), [("expert", "top-p"), ("model", "all"), ("likely", "min-p")])
def test_acceptance_is_one_minus_the_distance(name: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first drafted position, Σ min(p, q), averaged over the first tokens; and what is reported is what was."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = ops.verify

    def spy(*args: Any, drafted: torch.Tensor, **kwargs: Any) -> Any:
        found = inner(*args, drafted=drafted, **kwargs)
        if seen and drafted.shape[1] and torch.equal(seen[-1][0], drafted):  # asked again, with the expert's last pass
            assert torch.equal(seen.pop()[1], found.accepted)
        seen.append((drafted.clone(), found.accepted.clone()))
        return found

    monkeypatch.setattr(ops, "verify", spy)
    loop = SpeculativeDecoding(draft=draft(name), draft_tokens=2, seed=23)
    _, out = counted(composed(), loop, 1, 4, WARPED[settings][0])
    drafted = sum((d >= 0).sum(1) for d, _ in seen)
    assert torch.equal(out.drafted, drafted)
    assert torch.equal(out.accepted, sum(a for _, a in seen))
    assert torch.equal(out.rejected, sum((a < (d >= 0).sum(1)).long() for d, a in seen))
    decided = int(out.accepted.sum() + out.rejected.sum())
    assert out.acceptance == pytest.approx(int(out.accepted.sum()) / decided)

    proposal = {"expert": small(42), "model": small(44), "likely": None}[name]
    joint = exact(settings, 2)
    first, kept, share = joint.sum(1), 0.0, 0.0
    for token in range(VOCAB):
        text = torch.cat([TEXT, torch.tensor([token])])
        if proposal is None:
            q = torch.nn.functional.one_hot(draft("likely").following[token], VOCAB).double()
        else:
            z = alone(proposal)(text)[None].double()
            q = LogitsProcessorList(WARPED[settings][1])(text[None], z)[0].softmax(-1)
        p = joint[token] / first[token] if first[token] else torch.zeros(VOCAB).double()
        share += float(first[token])
        kept += float(first[token] * torch.minimum(p, q).sum())
    drafts, accepted = seen[1]
    there = drafts[:, 0] >= 0
    n = int(there.sum())
    assert n > ROWS * share * 0.9
    rate = float((accepted[there] > 0).float().mean())
    sigma = (kept / share * (1 - kept / share) / n) ** 0.5
    assert 0.05 < kept / share < 0.95
    assert abs(rate - kept / share) < 4 * sigma
