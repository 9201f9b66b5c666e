"""Siblings that repel each other: their records against a recomputation, neutral settings, budgets, costs, refusals."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.siblings import How, Text, distribution, penalty_of, repelled, texts_of
from support.tiny import EOS, PAD, shared
from support.trees import (
    ALPHA,
    HIGH,
    LOW,
    MIDDLE,
    START,
    Break,
    Streamer,
    check_branches,
    composed,
    described,
    grow,
    padded,
    reference_logits,
    small_model,
)
from transformers import LogitsProcessor

import proxytune
from proxytune import FusedDecoding, ops
from proxytune.errors import BudgetError, InputError, NumericalError, UnsupportedModeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

NEW_TOKENS = 10
NAN, INF = float("nan"), float("inf")


# --- the reference --------------------------------------------------------------------------------------------------


def log_weights_of(
    model: Any, prompt: torch.Tensor, texts: Sequence[Text], how: How
) -> tuple[list[float], list[list[int]]]:
    """Σ (log p − log q) of each sibling, and where it was repelled."""
    out, forks = [], []
    for i, text in enumerate(texts):
        total, at = 0.0, []
        for t, token in enumerate(text):
            logits = reference_logits(model, torch.cat([prompt, torch.tensor(text[:t], dtype=torch.long)]))
            p, entropy = distribution(logits.double().numpy(), how)
            assert p[token] > 0
            penalty = penalty_of(texts, i, t, how, len(p))
            if entropy > how.threshold and penalty.any():
                total += math.log(p[token]) - math.log(repelled(p, penalty)[token])
                at.append(t)
        out.append(total)
        forks.append(at)
    return out, forks


# --- the records, by hand -------------------------------------------------------------------------------------------

HOWS: dict[str, How] = {
    "siblings": How(repulsion=0.5),
    "forks": How(threshold=MIDDLE, repulsion=1.0, ngram=2),
    "bigrams": How(repulsion=0.5, ngram=2, ngram_repulsion=1.0, temperature=0.6, top_k=20, top_p=0.9),
    "trigrams": How(repulsion=0.0, ngram=3, ngram_repulsion=2.0, temperature=0.4),
    "fork-temperature": How(threshold=MIDDLE, ngram=2, temperature=0.5, fork_temperature=1.2, top_p=0.8),
}


@pytest.mark.smoke
@pytest.mark.parametrize("which", HOWS)
def test_every_record_equals_a_recomputation(model: Any, which: str) -> None:
    ids, mask = padded()
    how = HOWS[which]
    out = grow(model, how.loop(siblings=5, seed=4), ids, mask, **how.draw)
    check_branches(model, out, ids, mask)
    moved = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        assert len(tree) == 5
        assert [b.number for b in tree] == list(range(5))
        assert [b.parent for b in tree] == [None, *[tree.branches[0]] * 4]
        assert [b.start for b in tree] == [0] * 5
        want, forks = log_weights_of(model, prompt[kept], texts_of(tree), how)
        assert [b.log_weight + math.log(5) for b in tree] == pytest.approx(want, abs=1e-3)
        assert [b.forks for b in tree] == forks
        moved += sum(map(len, forks))
    assert moved > 3
    assert out.log_weights.tolist() == [b.log_weight for tree in out.trees for b in tree]
    assert out.weights.tolist() == [w for tree in out.trees for w in tree.weights()]
    assert out.prompts.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert out.ledgers is None


class Fixed(LogitsProcessor):
    """The same logits everywhere."""

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.values.expand(scores.shape[0], -1)


@pytest.mark.parametrize("repulsion", [12.0, 40.0])
def test_weights_where_almost_everything_is_repelled(repulsion: float) -> None:
    """The first token has all but e^-18: taken from 1, what is left of p would have no digit in float32."""
    values = [0.0, -18.0, -19.0, -20.0, -30.0, -31.0]
    how = How(repulsion=repulsion)
    out = grow(
        small_model(),
        how.loop(siblings=3, seed=2),
        torch.tensor([START]).repeat(20, 1),
        max_new_tokens=1,
        eos_token_id=None,
        logits_processor=[Fixed(*values)],
    )
    p, _ = distribution(np.array(values), how)
    second = Counter()
    for tree in out.trees:
        texts = texts_of(tree)
        for i, branch in enumerate(tree):
            q = repelled(p, penalty_of(texts, i, 0, how, 6))
            want = math.log(p[texts[i][0]]) - math.log(q[texts[i][0]])
            assert branch.log_weight + math.log(3) == pytest.approx(want, abs=2e-5)
        second[texts[1][0]] += 1
    assert (second[0] == 20) == (repulsion < 18)


# --- neutral settings -----------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, prompt: torch.Tensor, row: int, branch: int, seed: int, temperature: float, top_k: int) -> Text:
    """One sample, without a cache, from the keyed noise of a sibling."""
    text: Text = ()
    while len(text) < 10 and EOS not in text:
        logits = reference_logits(model, torch.cat([prompt, torch.tensor(text, dtype=torch.long)]))[None]
        step = ops.step(
            [logits],
            sampling=SamplingParams.of(1, temperature=temperature, top_k=top_k),
            noise=Noise.of(1, seed=seed, row=torch.tensor([row]), position=len(prompt) + len(text), branch=branch),
        )
        text += (int(step.tokens),)
    return text


@pytest.mark.parametrize(
    "neutral",
    [{"repulsion": 0}, {"repulsion": 0.0, "ngram": 2, "ngram_repulsion": 0}, {"threshold": HIGH, "ngram": 2}],
    ids=str,
)
def test_without_repulsion_they_are_independent_samples(model: Any, neutral: dict[str, Any]) -> None:
    ids, mask = padded()
    draw = {"temperature": 1.3, "top_k": 20}
    out = grow(model, SiblingDecoding(siblings=3, seed=5, **neutral), ids, mask, **draw)
    assert out.log_weights.tolist() == [-math.log(3)] * 9
    assert out.weights.tolist() == pytest.approx([1 / 3] * 9, abs=1e-15)
    assert not any(b.forks for tree in out.trees for b in tree)
    first = grow(model, FusedDecoding(seed=5), ids, mask, **draw).sequences
    for tree, prompt, kept, fused in zip(out.trees, ids, mask.bool(), first, strict=True):
        texts = texts_of(tree)
        assert texts == [by_hand(model, prompt[kept], tree.prompt, i, 5, 1.3, 20) for i in range(3)]
        assert fused[12 : 12 + len(texts[0])].tolist() == list(texts[0])


def test_only_forks_are_touched() -> None:
    """Up to the first place above the threshold that two siblings share, they are what they are without repulsion."""
    model = shared("llama", 1)
    ids, mask = padded()
    draw = {"temperature": 0.5}  # so that some say the same
    free = grow(model, SiblingDecoding(siblings=6, seed=3, repulsion=0), ids, mask, **draw)
    out = grow(model, SiblingDecoding(siblings=6, seed=3, repulsion=5.0, threshold=MIDDLE), ids, mask, **draw)
    changed = 0
    for a, b in zip(free.trees, out.trees, strict=True):
        for before, after in zip(a, b, strict=True):
            first = min(after.forks, default=NEW_TOKENS)
            assert before.tokens[:first] == after.tokens[:first]
            assert all(after.entropies[at] > MIDDLE for at in after.forks)
            changed += before.tokens != after.tokens
    assert changed > 2


# --- the same whatever is around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["siblings", "forks", "bigrams"])
def test_siblings_do_not_depend_on_the_batch_around_them(which: str) -> None:
    model = composed(dtype=torch.float64)
    ids, mask = padded()
    how = HOWS[which]
    seeded = functools.partial(how.loop, siblings=4, seed=3, max_total_tokens=48)
    together = grow(model, seeded(), ids, mask, **how.draw)
    assert [len(tree) for tree in together.trees] == [3, 4, 4]
    for row in range(3):
        alone = grow(model, seeded(stream_ids=[row]), ids[row : row + 1, 12 - int(mask[row].sum()) :], **how.draw)
        assert described(alone.trees[0]) == described(together.trees[row])
        assert alone.ledgers[0].spent == together.ledgers[row].spent
        assert alone.trees[0].weights() == pytest.approx(together.trees[row].weights(), rel=1e-4)
    order = [2, 0, 1]
    wider = [torch.nn.functional.pad(x[order], (4, 0), value=fill) for x, fill in ((ids, PAD), (mask, 0))]
    mixed = grow(model, seeded(stream_ids=order), *wider, **how.draw)
    assert [described(mixed.trees[order.index(row)]) for row in range(3)] == list(map(described, together.trees))


def test_seeds(model: Any) -> None:
    ids, mask = padded()
    trees = [grow(model, SiblingDecoding(threshold=MIDDLE, seed=seed), ids, mask).trees for seed in (1, 2, 1)]
    assert described(trees[0][0]) == described(trees[2][0]) != described(trees[1][0])
    two = grow(model, SiblingDecoding(threshold=MIDDLE, seed=1), ids[:1], mask[:1], num_return_sequences=2)
    assert described(two.trees[0]) == described(trees[0][0]) != described(two.trees[1])


@pytest.mark.parametrize("kinds", [("mistral", "llama", "gemma3"), ("qwen3", "llama", "llama")], ids="-".join)
def test_members_with_sliding_windows(kinds: tuple[str, ...]) -> None:
    ids, mask = padded()
    model = composed(*kinds)
    out = grow(model, SiblingDecoding(threshold=LOW, siblings=3, seed=1), ids, mask, max_new_tokens=14)
    check_branches(model, out, ids, mask)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "mistral", "gpt2"])
def test_plain_models_with_other_states(kind: str) -> None:
    ids = padded()[0][:1]
    model = shared(kind, 1)
    out = grow(model, SiblingDecoding(threshold=LOW, siblings=3, seed=1), ids)
    check_branches(model, out, ids, torch.ones_like(ids))


def test_as_many_prompts_as_tokens_and_no_cache(model: Any) -> None:
    """Tensors of the batch are told by their number of rows: three prompts of three tokens must not confuse it."""
    ids = padded()[0][:, 9:].contiguous()
    loop = SiblingDecoding(threshold=MIDDLE, siblings=3, seed=3)
    out = grow(model, loop, ids)
    check_branches(model, out, ids, torch.ones_like(ids))
    without = grow(model, loop, ids, use_cache=False)
    assert list(map(described, out.trees)) == list(map(described, without.trees))
    assert torch.equal(grow(model, loop, ids, return_dict_in_generate=False), out.sequences)


# --- costs and budgets ----------------------------------------------------------------------------------------------


def test_a_prompt_is_forwarded_once() -> None:
    model = composed()
    ids, mask = padded()
    before = dict(model.token_forwards)
    ends = list(range(3, 60))
    out = grow(model, SiblingDecoding(threshold=MIDDLE, siblings=6, seed=3), ids, mask, eos_token_id=ends)
    assert len({len(b) for tree in out.trees for b in tree}) > 2, "rows end at different steps"
    generated = sum(tree.tokens for tree in out.trees)
    for role, count in model.token_forwards.items():
        # Padding is forwarded too; the last token of a sibling never is.
        assert count - before[role] == ids.numel() + generated - 18


def test_a_plain_model_forwards_its_prompt_once() -> None:
    model = copy.deepcopy(shared("llama", 1))
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(tuple(args[0].shape)))
    ids, mask = padded()
    grow(model, SiblingDecoding(siblings=4, repulsion=0, seed=3), ids, mask, eos_token_id=None)
    assert seen == [(3, 12), *[(12, 1)] * 9]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    siblings=st.integers(1, 6),
    repulsion=st.sampled_from([0.0, 0.5, 9.0]),
    ngram=st.sampled_from([None, 2, 3]),
    budget=st.none() | st.integers(6, 40),
    length=st.integers(1, 8),
    top_k=st.sampled_from([0, 1, 2, 4]),
)
def test_budgets_hold(
    seed: int, siblings: int, repulsion: float, ngram: int | None, budget: int | None, length: int, top_k: int
) -> None:
    ids = torch.tensor([[3, 4, 5, 1, 4], [PAD, PAD, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    how = How(repulsion=repulsion, ngram=ngram, temperature=1.5, top_k=top_k)
    loop = how.loop(siblings=siblings, seed=seed, max_total_tokens=budget)
    out = grow(small_model(), loop, ids, mask, max_new_tokens=length, eos_token_id=EOS, **how.draw)
    for tree, prompt in zip(out.trees, (ids[0], ids[1, 2:]), strict=True):
        room = siblings if budget is None else max(1, min(siblings, (budget - len(prompt)) // length))
        assert len(tree) == room
        if budget is not None:
            ledger = out.ledgers[tree.prompt]
            assert ledger.spent == len(prompt) + tree.tokens <= budget
            assert ledger.held == 0
            assert ledger.by == {"prompt": len(prompt), "generated": tree.tokens}
        for branch in tree:
            assert branch.finished == (branch.tokens[-1] == EOS)
            assert EOS not in branch.tokens[:-1]
            short = budget is not None and len(branch) == budget - len(prompt)
            assert branch.finished or len(branch) == length or (short and room == 1)
        want, _ = log_weights_of(small_model(), prompt, texts_of(tree), how)
        assert [b.log_weight + math.log(room) for b in tree] == pytest.approx(want, abs=1e-3)


def test_a_budget_without_a_token_after_the_prompt_is_refused(model: Any) -> None:
    ids, mask = padded()
    with pytest.raises(BudgetError, match="at least 13: prompt 0 has 12 tokens.*got 12. Raise"):
        grow(model, SiblingDecoding(repulsion=0, max_total_tokens=12), ids, mask)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold: expected a finite number of nats; got None. `proxytune calibrate`"),
        ({"repulsion": 0, "ngram": 2}, "threshold: expected a finite number of nats; got None"),
        ({"repulsion": 0, "fork_temperature": 1.0}, "threshold: expected a finite number of nats; got None"),
        ({"where": "start"}, "where: expected 'forks' or 'random'; got 'start'"),
        ({"threshold": NAN}, "threshold: expected a finite number of nats; got nan"),
        ({"threshold": ForkThreshold.streaming()}, "threshold: expected a fixed or calibrated threshold"),
        ({"threshold": 1, "siblings": 0}, "siblings: expected a whole number, at least 1; got 0. Pass e.g. Sibling"),
        ({"threshold": 1, "siblings": 2.5}, "siblings: expected a whole number, at least 1; got 2.5"),
        ({"threshold": 1, "siblings": True}, "siblings: expected a whole number, at least 1; got True"),
        (
            {"threshold": 1, "repulsion": -0.5},
            r"repulsion: expected a number of nats in \[0, 1000\]; got -0.5. Pass 0",
        ),
        ({"threshold": 1, "repulsion": NAN}, r"repulsion: expected a number of nats in \[0, 1000\]; got nan"),
        ({"threshold": 1, "repulsion": INF}, r"repulsion: expected a number of nats in \[0, 1000\]; got inf"),
        ({"threshold": 1, "repulsion": "1"}, r"repulsion: expected a number of nats in \[0, 1000\]; got '1'"),
        ({"threshold": 1, "repulsion": True}, r"repulsion: expected a number of nats in \[0, 1000\]; got True"),
        ({"threshold": 1, "ngram_repulsion": -1}, r"ngram_repulsion: expected a number of nats in \[0, 1000\]; got -1"),
        ({"threshold": 1, "ngram": 1}, "ngram: expected a whole number, at least 2; got 1"),
        ({"threshold": 1, "ngram": 2.0}, "ngram: expected a whole number, at least 2; got 2.0"),
        ({"where": "random", "share": 1.0}, "share: expected a number in \\(0, 1\\); got 1.0"),
        ({"threshold": 1, "fork_temperature": 0}, "fork_temperature: expected a finite number > 0; got 0"),
        ({"threshold": 1, "max_total_tokens": 0}, "max_total_tokens: expected a whole number of tokens, at least 1"),
        ({"threshold": 1, "seed": 1 << 63}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "impl": "cuda"}, "impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SiblingDecoding(**options)


def test_calls_that_cannot_be_followed_are_refused(model: Any) -> None:
    ids, mask = padded()
    loop = SiblingDecoding(threshold=1.0)
    message = (
        "SiblingDecoding without sampling: expected do_sample=True; got greedy decoding. Greedy siblings would all"
    )
    with pytest.raises(UnsupportedModeError, match=message):
        grow(model, loop, ids, mask, do_sample=False)
    with pytest.raises(UnsupportedModeError, match="SiblingDecoding: expected greedy decoding or sampling"):
        grow(model, loop, ids, mask, num_beams=2)
    with pytest.raises(UnsupportedModeError, match="output_scores: expected none with SiblingDecoding"):
        grow(model, loop, ids, mask, output_scores=True)
    with pytest.raises(InputError, match="row"):
        grow(model, SiblingDecoding(threshold=1.0, stream_ids=[0, 1]), ids, mask)
    if hasattr(model, "members"):
        with pytest.raises(UnsupportedModeError, match="streamer: expected none with SiblingDecoding"):
            grow(model, loop, ids, mask, streamer=Streamer())
        other = SiblingDecoding(threshold=ForkThreshold(MIDDLE, alpha=2.0))
        with pytest.raises(InputError, match=f"threshold: expected a threshold calibrated at α = {ALPHA}; got α = 2.0"):
            grow(model, other, ids, mask)


@pytest.mark.parametrize(("value", "said"), [(NAN, "NaN or"), (-INF, "−inf for every token")])
def test_a_row_without_a_distribution_is_named(model: Any, value: float, said: str) -> None:
    ids, mask = padded()
    spoil = Break(value, 14, int(ids[1, 11]))
    with pytest.raises(NumericalError, match=f"prompt 1, branch 0: row 3 of 9, step 2 .*{said}"):
        grow(
            model,
            SiblingDecoding(threshold=LOW, siblings=3, seed=1),
            ids,
            mask,
            logits_processor=[spoil],
            eos_token_id=None,
        )


def test_the_public_name() -> None:
    assert proxytune.SiblingDecoding is SiblingDecoding
