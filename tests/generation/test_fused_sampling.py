"""The fused loop's draws: their law by enumeration, and the keys that they follow from."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.fused import ALPHA, NEW, SAMPLE, USABLE, Discourage, composed, padded, prompts, run
from support.reference import next_logits
from support.tiny import PAD, build
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import proxytune
from proxytune import FusedDecoding
from proxytune.models.members.cache_name import CACHE

# --- sampling: the law ----------------------------------------------------------------------------------------------

VOCAB = 12
DRAWS = 4000


@functools.cache
def tiny_members() -> list[PreTrainedModel]:
    """A base of 12 ids and companions of 11: one id cannot be embedded, so it must never come."""
    members = [build("llama", 31, VOCAB), build("llama", 32, VOCAB - 1), build("llama", 33, VOCAB - 1)]
    for member in members:
        member.lm_head.weight.data.mul_(0.4)  # flat enough for many outcomes
    return members


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The p-value of counts under a distribution; cells that expect fewer than 5 are pooled."""
    assert int(counts[p == 0].sum()) == 0, "an impossible outcome was drawn"
    expected = p * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    want = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, want = seen[want > 0], want[want > 0]
    statistic = ((seen - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2))


def law(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, processors: list[Any]) -> torch.Tensor:
    """`[V, V]`: the exact distribution of the next two tokens, in float64, by transformers' own processors."""

    def following(prefix: torch.Tensor) -> torch.Tensor:
        return LogitsProcessorList(processors)(prefix[None], logits(prefix).double()[None])[0].softmax(-1)

    first = following(ids)
    rows = [
        following(torch.cat([ids, torch.tensor([t])])) if first[t] > 0 else torch.zeros(VOCAB) for t in range(VOCAB)
    ]
    return first[:, None] * torch.stack([r.double() for r in rows])


# Settings of generate() beside the processors that they mean, so that the law does not come from the code under test.
LAWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 4}, [TopKLogitsWarper(4)]),
    "top-k-beyond-v": ({"top_k": 50}, []),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "all": (
        {"temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.06},
        [TemperatureLogitsWarper(1.4), TopKLogitsWarper(7), TopPLogitsWarper(0.9), MinPLogitsWarper(0.06)],
    ),
    "not-translatable": (
        {"temperature": 1.2, "typical_p": 0.8},
        [TemperatureLogitsWarper(1.2), TypicalLogitsWarper(0.8)],
    ),
    "penalty-before": (
        {"temperature": 0.8, "top_k": 6, "repetition_penalty": 1.4, "logits_processor": [Discourage()]},
        [RepetitionPenaltyLogitsProcessor(1.4), Discourage(), TemperatureLogitsWarper(0.8), TopKLogitsWarper(6)],
    ),
}


def draw_two(name: str, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each pair of tokens came, and its exact probability; both `[V²]`."""
    members = tiny_members()
    settings, processors = LAWS[name]
    text = torch.tensor([5, 7, 9, 4])
    # Padding at the left, except with the penalty, of which versions differ in whether it counts.
    pads = 0 if "repetition_penalty" in settings else 2
    ids = torch.nn.functional.pad(text, (pads, 0), value=PAD)[None]
    mask = torch.tensor([[0] * pads + [1] * 4])
    if kind == "plain":
        model: Any = members[0]
        reference = lambda prefix: model(prefix[None], use_cache=False).logits[0, -1]  # noqa: E731
    else:
        base, expert, antiexpert = members
        model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
        reference = lambda prefix: next_logits(members, ALPHA, prefix)  # noqa: E731
    with torch.no_grad():
        p = law(reference, text, processors)
    got = model.generate(
        ids,
        attention_mask=mask,
        custom_generate=FusedDecoding(seed=seed),
        **{"top_k": 0, "top_p": 1.0, "temperature": 1.0} | settings,
        do_sample=True,
        max_new_tokens=2,
        eos_token_id=None,
        num_return_sequences=DRAWS,
    )[:, -2:]
    return torch.bincount(got[:, 0] * VOCAB + got[:, 1], minlength=VOCAB * VOCAB), p.flatten()


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["composed", "plain"])
@pytest.mark.parametrize("name", LAWS)
def test_the_law_of_the_first_two_tokens(name: str, kind: str) -> None:
    counts, p = draw_two(name, kind, seed=11)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert (p > 0).sum() > 6, "nothing to test"
    assert chi_square(counts, p) > 1e-4


def test_a_wrong_law_is_noticed() -> None:
    counts, p = draw_two("plain", "composed", seed=11)
    warmer = p**0.8 / (p**0.8).sum()
    assert chi_square(counts, warmer) < 1e-4
    flipped = p.reshape(VOCAB, VOCAB).T.flatten()  # the second token as if it were the first
    with pytest.raises(AssertionError, match="impossible|assert"):
        assert chi_square(counts, flipped) > 1e-4


# --- draws are keyed ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_seed_repeats_and_another_differs(model: Any) -> None:
    one, again, other = (run(model, prompts(), custom_generate=FusedDecoding(seed=s), **SAMPLE) for s in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(r) for r in run(model, prompts(1).repeat(3, 1), custom_generate=FusedDecoding(seed=5), **SAMPLE)
                .tolist()}) == 3  # fmt: skip


def test_without_a_seed_torchs_generator_governs(model: Any) -> None:
    loop = FusedDecoding()

    def draw() -> torch.Tensor:
        return model.generate(prompts(), max_new_tokens=NEW, custom_generate=loop, **SAMPLE)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    # With a seed, and without draws, nobody else's random numbers change.
    state = torch.get_rng_state()
    model.generate(prompts(), max_new_tokens=2, custom_generate=FusedDecoding(seed=0), **SAMPLE)
    model.generate(prompts(), max_new_tokens=2, custom_generate=loop, do_sample=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.smoke
@pytest.mark.parametrize("extra", [{}, {"logits_processor": [Discourage()]}], ids=["fused", "processor-before"])
def test_a_row_alone_is_the_row_in_a_padded_batch(model: Any, extra: dict[str, Any]) -> None:
    ids, mask = padded()
    batch = run(model, ids, mask, custom_generate=FusedDecoding(seed=9), num_return_sequences=2, **SAMPLE, **extra)
    for row in range(6):
        text = ids[row // 2][mask[row // 2].bool()][None]
        for stream in ([row], torch.tensor([row])):
            alone = run(model, text, custom_generate=FusedDecoding(seed=9, stream_ids=stream), **SAMPLE, **extra)
            assert torch.equal(alone[0, text.shape[1] :], batch[row, 12:]), f"row {row}"


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 9, "top_p": 0.9}]
)
def test_the_kernels_draw_the_same_tokens(model: Any, settings: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    ids, mask = padded()
    loops = [FusedDecoding(seed=3, impl=impl) for impl in ("torch", "triton")]
    with np.errstate(all="ignore"):  # Triton's interpreter computes in NumPy
        torchs, kernels = (run(model, ids, mask, max_new_tokens=6, custom_generate=x, **settings) for x in loops)
    assert torch.equal(torchs, kernels)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_draws_go_on_in_the_next_turn(model: Any, padding: str) -> None:
    """Positions count the tokens of the text, whether they are fed again, cached, or just drawn."""
    ids, mask = padded() if padding == "left" else (prompts(), torch.ones(3, 12, dtype=torch.long))
    loop = {"custom_generate": FusedDecoding(seed=4), **SAMPLE}
    whole = run(model, ids, mask, **loop)
    half = run(model, ids, mask, **loop | {"max_new_tokens": 5, "return_dict_in_generate": True})
    longer = torch.nn.functional.pad(mask, (0, 5), value=1)
    rest = run(model, half.sequences, longer, **loop | {"max_new_tokens": NEW - 5})
    assert torch.equal(rest, whole)
    rest = run(
        model,
        half.sequences,
        longer,
        **{CACHE: copy.deepcopy(half.past_key_values)},
        **loop | {"max_new_tokens": NEW - 5},
    )
    assert torch.equal(rest, whole)
    # Only the one token that the cache has not seen, with the mask of the whole text.
    last = half.sequences[:, -1:]
    rest = run(model, last, longer, **{CACHE: half.past_key_values}, **loop | {"max_new_tokens": NEW - 5})
    assert torch.equal(rest[:, 1:], whole[:, 17:])


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
def test_draws_do_not_depend_on_the_cache(model: Any, cache: dict[str, Any]) -> None:
    ids, mask = padded()
    loop = {"custom_generate": FusedDecoding(seed=4), **SAMPLE}
    assert torch.equal(run(model, ids, mask, **loop, **cache), run(model, ids, mask, **loop))


def test_at_alpha_0_the_draws_are_the_bases() -> None:
    steered = composed(vocab=256, alpha=0.0)
    loop = {"custom_generate": FusedDecoding(seed=2), **SAMPLE}
    ids, mask = padded()
    assert torch.equal(run(steered, ids, mask, **loop), run(steered.base, ids, mask, **loop))
    steered.alpha = ALPHA
    assert not torch.equal(run(steered, ids, mask, **loop), run(steered.base, ids, mask, **loop))


@pytest.mark.smoke
@pytest.mark.parametrize("extra", [{}, {"no_repeat_ngram_size": 2}], ids=["fused", "penalty-before"])
def test_the_tokens_do_not_depend_on_the_report(model: Any, extra: dict[str, Any]) -> None:
    ids, mask = padded()
    loop = {"custom_generate": FusedDecoding(seed=8), **SAMPLE, **extra}
    quiet = run(model, ids, mask, **loop)
    show = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = run(model, ids, mask, **loop, **show)
    assert torch.equal(out.sequences, quiet)
    # The report is that of transformers: its own loop, made to follow these very tokens.
    warpers = [TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.95)]
    forced = Follow(quiet)
    theirs = run(model, ids, mask, **SAMPLE, **extra, **show, logits_processor=[forced])
    assert torch.equal(theirs.sequences, quiet)
    for step in range(NEW):
        torch.testing.assert_close(out.logits[step], theirs.logits[step], atol=1e-4, rtol=1e-4)
        want = LogitsProcessorList(warpers)(quiet[:, : 12 + step], forced.seen[step])
        kept = torch.isfinite(want)
        # A tie of rounding at the border of the nucleus may fall either way.
        assert (torch.isfinite(out.scores[step]) != kept).sum() <= 1
        both = kept & torch.isfinite(out.scores[step])
        torch.testing.assert_close(out.scores[step][both], want[both], atol=1e-4, rtol=1e-4)
        drawn = quiet[:, 12 + step, None]
        assert torch.isfinite(out.scores[step].gather(1, drawn)).all()


class Follow(LogitsProcessor):
    """Lets nothing but given sequences through, and keeps what it was given."""

    def __init__(self, sequences: torch.Tensor) -> None:
        self.sequences, self.seen = sequences, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        target = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, target, 0.0)


def test_ids_that_a_member_cannot_embed_are_never_drawn() -> None:
    for extra in ({}, {"repetition_penalty": 1.1}):
        out = run(
            composed(),
            prompts(1),
            custom_generate=FusedDecoding(seed=1),
            **SAMPLE | {"temperature": 50.0, "top_k": 0, "top_p": 1.0},
            **extra,
            num_return_sequences=64,
        )
        assert 240 < int(out[:, 12:].max()) < USABLE
