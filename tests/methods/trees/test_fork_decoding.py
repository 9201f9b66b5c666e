"""Fork trees: every branch against a recomputation without a cache, the weights' law by enumeration, budgets, caps."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import next_logits
from support.tiny import EOS, PAD, build, shared, tokenizer
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxTimeCriteria,
    RwkvConfig,
    RwkvForCausalLM,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import FusedDecoding
from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, InputError, NumericalError, UnsupportedModeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.fork_decoding import ForkDecoding, TreeOutput
from proxytune.methods.trees.frontier import ForkFrontier, RowDraws
from proxytune.methods.trees.tree import Branch, ForkTree
from proxytune.stats.importance import kool_log_weights, log_importance

ALPHA = 0.7
NEW = 10
LOW, MIDDLE, HIGH = -1.0, 2.5, 99.0
"""Thresholds: every token is a fork, some are, none is."""


def composed(*kinds: str, dtype: torch.dtype | None = None, alpha: float = ALPHA) -> Any:
    kinds = kinds or ("llama", "gpt2", "gpt2")
    vocabs = (256, 250, 250)
    members = [
        shared(kind, i, vocab) if dtype is None else build(kind, i, vocab).to(dtype)
        for i, (kind, vocab) in enumerate(zip(kinds, vocabs, strict=True), 1)
    ]
    base, expert, antiexpert = members
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 12, 7 and 3 tokens, padded at the left."""
    ids = torch.randint(3, 240, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


def grow(model: Any, loop: ForkDecoding, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    defaults = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, custom_generate=loop, **defaults | kwargs)


def described(tree: ForkTree) -> list[Any]:
    """All that must not depend on the batch around it."""
    return [
        (b.number, None if b.parent is None else b.parent.number, b.start, b.tokens, b.forks, b.finished) for b in tree
    ]


@torch.no_grad()
def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits `[V]` after one unpadded prefix, without a cache."""
    if hasattr(model, "members"):
        return next_logits([m.model for m in model.members], ALPHA, ids)
    return model(ids[None], use_cache=False).logits[0, -1].float()


# --- every branch is what the model says of it ----------------------------------------------------------------------

WHERE: dict[str, dict[str, Any]] = {
    "forks": {"threshold": MIDDLE},
    "every-token": {"threshold": LOW, "children": 3},
    "random": {"where": "random", "share": 0.4},
    "start": {"where": "start"},
}


def check_branches(model: Any, out: TreeOutput, ids: torch.Tensor, mask: torch.Tensor) -> None:
    row = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            tokens = branch.along("tokens")
            assert int(out.prompts[row]) == tree.prompt
            assert out.sequences[row].tolist() == [*prompt.tolist(), *tokens] + [PAD] * (
                out.sequences.shape[1] - len(prompt) - len(tokens)
            )
            text = prompt[kept]
            for token, logprob, entropy, confidence in zip(
                tokens,
                branch.along("logprobs"),
                branch.along("entropies"),
                branch.along("confidences"),
                strict=True,
            ):
                logp = reference_logits(model, text).log_softmax(-1)
                finite = logp[logp > -torch.inf]
                assert logprob == pytest.approx(float(logp[token]), abs=1e-3)
                assert entropy == pytest.approx(float(-(finite.exp() * finite).sum()), abs=1e-3)
                assert confidence == pytest.approx(float(-logp.topk(20).values.mean()), abs=1e-3)
                text = torch.cat([text, torch.tensor([token])])
            row += 1
    assert row == len(out.sequences) == len(out.log_weights)
    assert out.log_weights.isfinite().all()


@pytest.mark.smoke
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
def test_every_branch_equals_a_recomputation(model: Any, where: str, do_sample: bool) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(branches=5, seed=3, **WHERE[where]), ids, mask, do_sample=do_sample)
    check_branches(model, out, ids, mask)
    assert sum(len(tree) for tree in out.trees) > 3


@pytest.mark.parametrize(
    "kinds",
    [("mistral", "llama", "gemma3"), ("gemma3", "gpt2", "mistral"), ("qwen3", "llama", "llama")],
    ids="-".join,
)
def test_members_with_sliding_windows(kinds: tuple[str, ...]) -> None:
    ids, mask = padded()
    model = composed(*kinds)
    out = grow(model, ForkDecoding(threshold=LOW, branches=6, min_gap=2, seed=1), ids, mask, max_new_tokens=14)
    check_branches(model, out, ids, mask)
    assert [len(tree) for tree in out.trees] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "mistral", "gpt2"])
def test_plain_models_with_other_states(kind: str) -> None:
    # Without padding: some of these treat it differently themselves.
    ids = padded()[0][:1]
    model = shared(kind, 1)
    out = grow(model, ForkDecoding(threshold=LOW, branches=4, min_gap=2, seed=1), ids)
    check_branches(model, out, ids, torch.ones_like(ids))
    assert len(out.trees[0]) == 4


def test_a_recurrent_model_s_rows_take_their_state_along() -> None:
    recurrent = build("mamba", 1, 64)
    for weight in recurrent.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for seed in (18, 19):  # of the first, a child takes the place of another prompt's row that has ended
        loop = ForkDecoding(threshold=1.0, branches=3, seed=seed)
        out = grow(recurrent, loop, ids, torch.ones_like(ids), max_new_tokens=5, eos_token_id=list(range(20, 44)))
        check_branches(recurrent, out, ids, torch.ones_like(ids))


def test_a_model_that_keeps_its_state_otherwise_needs_to_go_without() -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=64, context_length=64, pad_token_id=PAD, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with pytest.raises(UnsupportedModeError, match=r"use_cache: .* for ForkDecoding.*Pass use_cache=False\."):
        grow(model, ForkDecoding(threshold=LOW), ids, pad_token_id=PAD)
    out = grow(model, ForkDecoding(threshold=LOW, seed=1), ids, pad_token_id=PAD, use_cache=False, max_new_tokens=4)
    check_branches(model, out, ids, torch.ones_like(ids))


def test_without_a_cache_it_is_the_same(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    a, b = (grow(model, loop, ids, mask, use_cache=cache) for cache in (True, False))
    assert list(map(described, a.trees)) == list(map(described, b.trees))


def test_without_the_report_come_the_sequences(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    want = grow(model, loop, ids, mask).sequences
    assert torch.equal(grow(model, loop, ids, mask, return_dict_in_generate=False), want)


# --- the weights ----------------------------------------------------------------------------------------------------

TREES = 2500
SMALL = 6


@functools.cache
def small_model() -> Any:
    return build("llama", 5, vocab=SMALL)


@functools.cache
def law(temperature: float, top_k: int, length: int, ends: bool) -> dict[tuple[int, ...], float]:
    """The probability of every full sequence, by enumeration."""
    model, out = small_model(), {}

    def go(text: tuple[int, ...], p: float) -> None:
        if len(text) == length or (ends and text and text[-1] == EOS):
            out[text] = p
            return
        with torch.no_grad():
            logits = model(torch.tensor([(*START, *text)]), use_cache=False).logits[0, -1].double() / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        for token, q in enumerate(logits.softmax(-1).tolist()):
            if q:
                go((*text, token), p * q)

    go((), 1.0)
    assert math.fsum(out.values()) == pytest.approx(1)
    return out


START = (3, 4, 5)


def estimates(trees: Sequence[ForkTree], p: dict[tuple[int, ...], float], weigh: Any) -> np.ndarray:
    """Differences from p in standard errors, `[N]`; sequences too rare for a normal law are put together."""
    common = [s for s, q in p.items() if q >= 0.004]
    place = {s: i for i, s in enumerate(common)}
    found = np.zeros((len(trees), len(common) + 1))
    for row, tree in enumerate(trees):
        for branch, weight in zip(tree, weigh(tree), strict=True):
            found[row, place.get(tuple(branch.along("tokens")), len(common))] += weight
    want = np.array([p[s] for s in common])
    want = np.append(want, 1 - want.sum())
    error = np.maximum(found.std(0), 1e-6) / math.sqrt(len(trees))
    return (found.mean(0) - want) / error


def kool(tree: ForkTree) -> list[float]:
    return [math.exp(branch.log_weight) for branch in tree]


def equal(tree: ForkTree) -> list[float]:
    return [1 / len(tree)] * len(tree)


LAWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forks": ({"threshold": 1.2, "branches": 4}, {"top_k": 5}),
    "forks-hot": ({"threshold": 0.9, "branches": 5, "children": 3}, {"temperature": 1.7, "top_k": 4}),
    "forks-gap": ({"threshold": LOW, "branches": 4, "min_gap": 2}, {"temperature": 0.8, "top_k": 3}),
    "random": ({"where": "random", "share": 0.4, "branches": 4, "children": 3}, {"temperature": 1.3, "top_k": 5}),
    "random-k": ({"where": "random", "share": 0.5, "branches": 4}, {"temperature": 1.3, "top_k": 3}),
    "start": ({"where": "start", "branches": 3}, {"temperature": 1.2, "top_k": 4}),
    "start-all": ({"where": "start", "branches": 4}, {"temperature": 1.2, "top_k": 4}),
    "start-some-left": ({"where": "start", "branches": 4}, {"top_k": 3}),
    "budget": ({"threshold": 1.0, "branches": 5, "max_total_tokens": 10}, {"ends": True}),
}


@pytest.mark.parametrize("which", LAWS)
def test_the_weights_are_unbiased_and_equal_ones_are_not(which: str) -> None:
    options, draw = LAWS[which]
    length, ends = 3, draw.get("ends", False)
    temperature, top_k = draw.get("temperature", 1.0), draw.get("top_k", 0)
    ids = torch.tensor([START]).repeat(TREES, 1)
    loop = ForkDecoding(seed=11, stream_ids=range(TREES), **options)
    more = {"eos_token_id": EOS if ends else None, "temperature": temperature, "top_k": top_k}
    out = grow(small_model(), loop, ids, max_new_tokens=length, **more)
    p = law(temperature, top_k, length, ends)
    z = estimates(out.trees, p, kool)
    assert np.abs(z).max() < 4, z
    assert Counter(len(tree) > 1 for tree in out.trees)[True] > TREES // 20
    # The control: what the weights are for.
    biased = estimates(out.trees, p, equal)
    assert np.abs(biased).max() > 8, biased
    # Σ w is 1 on average, and exactly after normalisation.
    totals = np.array([sum(kool(tree)) for tree in out.trees])
    assert abs(totals.mean() - 1) < 4 * totals.std() / math.sqrt(TREES) + 1e-6
    normalised = np.array([math.fsum(tree.weights()) for tree in out.trees])
    assert np.abs(normalised - 1).max() < 1e-12
    assert out.weights.tolist() == [w for tree in out.trees for w in tree.weights()]
    assert out.log_weights.tolist() == [b.log_weight for tree in out.trees for b in tree]


def test_all_children_at_the_start_weigh_their_probabilities() -> None:
    ids = torch.tensor([START])
    out = grow(small_model(), ForkDecoding(where="start", branches=SMALL, seed=1), ids, max_new_tokens=1)
    logp = reference_logits(small_model(), ids[0]).log_softmax(-1)
    assert sorted(b.tokens[0] for b in out.trees[0]) == list(range(SMALL))
    for branch in out.trees[0]:
        assert branch.log_weight == pytest.approx(float(logp[branch.tokens[0]]), abs=1e-5)


# --- the same as the fused loop, and the same whatever is around it -------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize("single", [{"branches": 1, "threshold": LOW}, {"branches": 8, "threshold": HIGH}])
def test_a_tree_of_one_branch_is_the_fused_loop(model: Any, single: dict[str, Any], do_sample: bool) -> None:
    ids, mask = padded()
    more = {"do_sample": do_sample, "temperature": 1.3, "top_k": 20} if do_sample else {"do_sample": False}
    want = grow(model, FusedDecoding(seed=5), ids, mask, **more).sequences
    out = grow(model, ForkDecoding(seed=5, **single), ids, mask, **more)
    assert torch.equal(out.sequences, want)
    assert out.log_weights.tolist() == [0, 0, 0]
    assert out.weights.tolist() == [1, 1, 1]


def test_before_its_first_fork_a_tree_is_the_fused_loop(model: Any) -> None:
    ids, mask = padded()
    want = grow(model, FusedDecoding(seed=5), ids, mask).sequences
    out = grow(model, ForkDecoding(seed=5, threshold=MIDDLE), ids, mask)
    for tree, text in zip(out.trees, want, strict=True):
        # The branch that goes on has the first draw, the fused loop's own: it never leaves it.
        first = tree.branches[0].tokens
        assert first == text[12 : 12 + len(first)].tolist()


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize("where", WHERE)
def test_a_tree_does_not_depend_on_the_batch_around_it(where: str, do_sample: bool) -> None:
    model = composed(dtype=torch.float64)
    ids, mask = padded()
    seeded = functools.partial(ForkDecoding, branches=5, seed=3, max_total_tokens=60, **WHERE[where])
    together = grow(model, seeded(), ids, mask, do_sample=do_sample)
    for row in range(3):
        alone = grow(
            model, seeded(stream_ids=[row]), ids[row : row + 1, 12 - int(mask[row].sum()) :], do_sample=do_sample
        )
        assert described(alone.trees[0]) == described(together.trees[row])
        assert alone.ledgers[0].spent == together.ledgers[row].spent
        assert alone.trees[0].weights() == pytest.approx(together.trees[row].weights(), rel=1e-4)
    order = [2, 0, 1]
    wider = [torch.nn.functional.pad(x[order], (4, 0), value=fill) for x, fill in ((ids, PAD), (mask, 0))]
    mixed = grow(model, seeded(stream_ids=order), *wider, do_sample=do_sample)
    assert [described(mixed.trees[order.index(row)]) for row in range(3)] == list(map(described, together.trees))


def test_another_seed_gives_another_tree(model: Any) -> None:
    ids, mask = padded()
    trees = [grow(model, ForkDecoding(threshold=MIDDLE, seed=seed), ids, mask).trees for seed in (1, 2, 1)]
    assert described(trees[0][0]) == described(trees[2][0]) != described(trees[1][0])
    torch.manual_seed(4)
    drawn = [grow(model, ForkDecoding(threshold=MIDDLE), ids, mask).sequences for _ in range(2)]
    torch.manual_seed(4)
    again = grow(model, ForkDecoding(threshold=MIDDLE), ids, mask).sequences
    assert torch.equal(drawn[0], again)
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


def test_returned_sequences_are_trees_of_their_own(model: Any) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(threshold=MIDDLE, seed=1), ids[:1], mask[:1], num_return_sequences=3)
    assert len(out.trees) == 3
    assert described(out.trees[0]) != described(out.trees[1])


# --- caps, gaps and budgets -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    branches=st.integers(1, 9),
    children=st.integers(2, 4),
    min_gap=st.integers(1, 4),
    where=st.sampled_from(["forks", "random", "start"]),
    threshold=st.sampled_from([LOW, 1.0, 1.4]),
    budget=st.none() | st.integers(6, 60),
    length=st.integers(1, 8),
    do_sample=st.booleans(),
    top_k=st.sampled_from([0, 1, 2, 4]),
)
def test_caps_gaps_and_budgets_hold(
    seed: int,
    branches: int,
    children: int,
    min_gap: int,
    where: Any,
    threshold: float,
    budget: int | None,
    length: int,
    do_sample: bool,
    top_k: int,
) -> None:
    ids = torch.tensor([[3, 4, 5, 1, 4], [PAD, PAD, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    loop = ForkDecoding(
        threshold=threshold,
        branches=branches,
        children=children,
        min_gap=min_gap,
        where=where,
        share=0.5,
        max_total_tokens=budget,
        seed=seed,
    )
    draw = {"temperature": 1.5, "top_k": top_k} if do_sample else {"do_sample": False}
    out = grow(small_model(), loop, ids, mask, max_new_tokens=length, eos_token_id=EOS, **draw)
    for tree, prompt in zip(out.trees, (5, 3), strict=True):
        assert 1 <= len(tree) <= branches
        if budget is not None:
            ledger = out.ledgers[tree.prompt]
            assert ledger.spent == prompt + tree.tokens <= budget
            assert ledger.held == 0
            assert ledger.by == {"prompt": prompt, "generated": tree.tokens}
        for branch in tree:
            tokens = branch.along("tokens")
            assert branch.tokens
            assert len(branch) == len(tokens) <= length
            assert branch.finished == (tokens[-1] == EOS)
            assert EOS not in tokens[:-1]
            # Only the first may be cut by the budget; children that were started are finished.
            assert branch.finished or len(branch) == length or (budget is not None and branch.number == 0)
            on_path = [
                f
                for one, then in itertools.pairwise([*branch.path(), None])
                for f in one.forks
                if then is None or f < then.start
            ]
            on_path = sorted([*on_path, *(b.start for b in branch.path()[1:])])
            assert all(b - a >= min_gap for a, b in itertools.pairwise(on_path)), on_path
            assert where != "start" or on_path in ([], [0])
            for fork in branch.forks:
                born = [b for b in tree if b.parent is branch and b.start == fork]
                first = [branch.tokens[fork - branch.start], *(b.tokens[0] for b in born)]
                assert len(first) == len(set(first))
                assert 2 <= len(first) <= (branches if where == "start" else children)
        starts = {(b.parent.number, b.start) for b in tree.branches[1:]}
        assert starts == {(b.number, f) for b in tree for f in b.forks}
        assert top_k != 1 or not do_sample or len(tree) == 1


def test_forks_wait_until_their_children_can_be_finished() -> None:
    """At the boundary: one token less than a child may need, and there is no child."""
    ids = torch.tensor([START])
    loop = functools.partial(ForkDecoding, threshold=LOW, branches=2, seed=1)
    for missing, leaves in ((0, 2), (1, 2), (3, 2), (4, 1)):
        # The first path may need 4; a fork at token t takes 4 − t more, the last at t = 3 one.
        out = grow(small_model(), loop(max_total_tokens=3 + 4 + 4 - missing), ids, max_new_tokens=4, eos_token_id=None)
        (tree,), (ledger,) = out.trees, out.ledgers
        assert len(tree) == leaves
        assert leaves == 1 or tree.branches[1].start == missing
        assert ledger.spent == 3 + 4 + (4 - missing if leaves == 2 else 0)
        assert all(len(b) == 4 for b in tree)


def test_a_budget_shorter_than_the_length_cuts_the_first_branch() -> None:
    ids = torch.tensor([START])
    out = grow(small_model(), ForkDecoding(threshold=LOW, seed=1, max_total_tokens=5), ids, eos_token_id=None)
    assert [len(b) for b in out.trees[0]] == [2]
    assert not out.trees[0].branches[0].finished
    assert out.ledgers[0].left == 0


@pytest.mark.parametrize("budget", [1, 11, 12])
def test_a_budget_without_a_token_after_the_prompt_is_refused(model: Any, budget: int) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=LOW, max_total_tokens=budget)
    with pytest.raises(BudgetError, match=f"at least 13: prompt 0 has 12 tokens.*got {budget}. Raise"):
        grow(model, loop, ids, mask)


def test_a_child_in_the_place_of_a_row_that_ended() -> None:
    """The last row forks and ends at once: the batch keeps its number of rows, but not its rows."""
    model = composed()
    ids, mask = padded()
    loop = ForkDecoding(where="start", branches=2, seed=3)
    first = int(grow(model, loop, ids[:1], mask[:1]).trees[0].branches[0].tokens[0])
    out = grow(model, loop, ids[:1], mask[:1], eos_token_id=first)
    assert [len(b) > 1 for b in out.trees[0]] == [False, True]
    check_branches(model, out, ids[:1], mask[:1])
    second = int(grow(model, loop, ids[:1], mask[:1]).trees[0].branches[1].tokens[0])
    out = grow(model, loop, ids[:1], mask[:1], eos_token_id=second)
    assert [len(b) > 1 for b in out.trees[0]] == [True, False]
    check_branches(model, out, ids[:1], mask[:1])


# --- what it costs --------------------------------------------------------------------------------------------------


def test_finished_rows_leave() -> None:
    model = composed()
    ids, mask = padded()
    before = dict(model.token_forwards)
    out = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=list(range(3, 60)))
    generated = sum(tree.tokens for tree in out.trees)
    leaves = sum(len(tree) for tree in out.trees)
    lengths = {len(b) for tree in out.trees for b in tree}
    assert len(lengths) > 2, "rows end at different steps"
    # Padding of the prompts is forwarded too; the last token of a leaf never is.
    for role, count in model.token_forwards.items():
        assert count - before[role] == ids.numel() + generated - leaves


class Late(LogitsProcessor):
    """Certain of one token up to a length of text: entropy 0 there."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, scores.argmax(-1, keepdim=True), 0.0)


def test_forks_past_the_middle_cost_at_most_0_7_of_independent_samples() -> None:
    model = composed()
    ids, mask = padded()
    ids, mask, w, new = ids[:1], mask[:1], 8, 40
    more = {"max_new_tokens": new, "eos_token_id": None, "logits_processor": [Late(12 + 21)]}
    before = model.token_forwards["base"]
    out = grow(model, ForkDecoding(threshold=1.0, branches=w, seed=1), ids, mask, **more)
    tree = model.token_forwards["base"] - before
    assert len(out.trees[0]) == w
    assert min(b.start for b in out.trees[0].branches[1:]) > new / 2
    before = model.token_forwards["base"]
    grow(model, FusedDecoding(seed=1), ids, mask, num_return_sequences=w, **more)
    samples = model.token_forwards["base"] - before
    assert samples == w * (12 + new - 1)
    assert tree <= 0.7 * samples


# --- ends, processors, greedy children ------------------------------------------------------------------------------


def test_ends_are_told_from_cuts(model: Any) -> None:
    ids, mask = padded()
    free = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=None)
    assert not any(b.finished for tree in free.trees for b in tree)
    assert {len(b) for tree in free.trees for b in tree} == {NEW}
    end = free.trees[0].branches[0].tokens[4]
    out = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=end)
    for tree in out.trees:
        for branch in tree:
            tokens = branch.along("tokens")
            assert branch.finished == (tokens[-1] == end)
            assert end not in tokens[:-1]
    assert out.trees[0].branches[0].finished


def test_stop_strings(model: Any) -> None:
    ids, mask = padded()
    words = tokenizer()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    free = grow(model, loop, ids, mask, eos_token_id=None)
    letter = words.decode(free.trees[0].branches[0].tokens[3])
    criterion = StopStringCriteria(words, [letter])
    out = grow(model, loop, ids, mask, eos_token_id=None, stopping_criteria=[criterion])
    first = out.trees[0].branches[0]
    assert first.finished
    assert len(first) <= 4
    if not hasattr(model, "members"):
        return
    named = grow(model, loop, ids, mask, eos_token_id=None, stop_strings=[letter], tokenizer=words)
    assert list(map(described, named.trees)) == list(map(described, out.trees))


def test_time_that_is_up_cuts_all_branches(model: Any) -> None:
    ids, mask = padded()
    criterion = MaxTimeCriteria(0.0, time.time() - 1)
    out = grow(model, ForkDecoding(threshold=LOW, branches=5, seed=3), ids, mask, stopping_criteria=[criterion])
    assert {len(b) for tree in out.trees for b in tree} == {1}
    assert not any(b.finished for tree in out.trees for b in tree)


def test_penalties_run_before_the_draw(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=LOW, branches=6, seed=3)
    out = grow(model, loop, ids, mask, no_repeat_ngram_size=1, suppress_tokens=[7, 9], eos_token_id=None)
    for tree, prompt in zip(out.trees, ids, strict=True):
        for branch in tree:
            tokens = branch.along("tokens")
            assert len(tokens) == len(set(tokens))
            assert not set(tokens) & set(prompt.tolist())
            assert not {7, 9} & set(branch.along("tokens"))
    # What is recorded is of the distribution after them: the first token's neighbours are masked.
    logits = reference_logits(model, ids[0]).clone()
    logits[[*ids[0].tolist(), 7, 9]] = -torch.inf
    logits[PAD] = -torch.inf if PAD in ids[0] else logits[PAD]
    assert out.trees[0].branches[0].logprobs[0] == pytest.approx(
        float(logits.log_softmax(-1)[out.trees[0].branches[0].tokens[0]]), abs=1e-3
    )


def test_greedy_children_are_the_most_probable_tokens(model: Any) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(threshold=MIDDLE, children=3, branches=7), ids, mask, do_sample=False)
    seen = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            for fork in branch.forks:
                text = torch.cat([prompt[kept], torch.tensor(branch.along("tokens")[:fork], dtype=torch.long)])
                best = reference_logits(model, text).log_softmax(-1).topk(3)
                born = [b for b in tree if b.parent is branch and b.start == fork]
                tokens = [branch.tokens[fork - branch.start], *(b.tokens[0] for b in born)]
                assert tokens == best.indices.tolist()[: len(tokens)]
                seen += 1
            # A leaf weighs the probability of what was chosen at its forks.
            at = {b.start for b in branch.path()[1:]} | {
                f
                for one, then in itertools.pairwise([*branch.path(), None])
                for f in one.forks
                if then is None or f < then.start
            }
            logprobs = branch.along("logprobs")
            assert branch.log_weight == pytest.approx(sum(logprobs[f] for f in at), abs=1e-4)
    assert seen > 2


def test_chain_of_thought_decoding(model: Any) -> None:
    """Greedy from each of the W most probable first tokens."""
    ids, mask = padded()
    out = grow(model, ForkDecoding(where="start", branches=4), ids, mask, do_sample=False, eos_token_id=None)
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        first = reference_logits(model, prompt[kept]).topk(4).indices.tolist()
        assert [b.tokens[0] for b in tree] == first
        for branch in tree:
            text = torch.cat([prompt[kept], torch.tensor(branch.tokens[:1])])[None]
            want = model.generate(text, do_sample=False, max_new_tokens=NEW - 1, eos_token_id=None)
            assert branch.tokens == want[0, int(kept.sum()) :].tolist()


def test_greedy_children_are_never_masked_tokens() -> None:
    ids = torch.tensor([START])
    out = grow(
        small_model(),
        ForkDecoding(where="start", branches=5),
        ids,
        do_sample=False,
        suppress_tokens=[0, 1, 2, 3],
        eos_token_id=None,
        max_new_tokens=3,
    )
    assert sorted(b.tokens[0] for b in out.trees[0]) == [4, 5]
    assert all(set(b.tokens) <= {4, 5} for b in out.trees[0])


def test_the_temperature_of_forks(model: Any) -> None:
    """Cold elsewhere: between forks the tree is greedy; at forks it is drawn."""
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=4, seed=2, fork_temperature=1.0)
    out = grow(model, loop, ids, mask, temperature=1e-3)
    seen = Counter()
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            text = prompt[kept]
            for token, entropy in zip(branch.along("tokens"), branch.along("entropies"), strict=True):
                greedy = token == int(reference_logits(model, text).argmax())
                assert greedy or entropy > MIDDLE
                seen[greedy] += 1
                text = torch.cat([text, torch.tensor([token])])
    assert min(seen[True], seen[False]) > 3


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold: expected a finite number of nats; got None. `proxytune calibrate`"),
        ({"where": "end"}, "where: expected 'forks', 'random' or 'start'; got 'end'"),
        ({"where": "random", "fork_temperature": 1.0}, "threshold: expected a finite number of nats; got None"),
        ({"threshold": "high"}, "threshold: expected a finite number of nats; got 'high'"),
        ({"threshold": float("nan")}, "threshold: expected a finite number of nats; got nan"),
        ({"threshold": float("inf")}, "threshold: expected a finite number of nats"),
        ({"threshold": ForkThreshold.streaming()}, "threshold: expected a fixed or calibrated one"),
        ({"threshold": ForkThreshold(1.0, measure="scaled")}, "threshold: expected one of the raw entropy"),
        ({"threshold": 1, "branches": 0}, "branches: expected a whole number, at least 1; got 0"),
        ({"threshold": 1, "branches": 2.0}, "branches: expected a whole number, at least 1; got 2.0"),
        ({"threshold": 1, "branches": True}, "branches: expected a whole number"),
        ({"threshold": 1, "children": 1}, "children: expected a whole number, at least 2; got 1"),
        ({"threshold": 1, "min_gap": 0}, "min_gap: expected a whole number, at least 1; got 0"),
        ({"where": "random", "share": 1.0}, "share: expected a number in \\(0, 1\\); got 1.0"),
        ({"where": "random", "share": float("nan")}, "share: expected a number in"),
        ({"threshold": 1, "fork_temperature": 0}, "fork_temperature: expected a finite number > 0; got 0"),
        (
            {"threshold": 1, "max_total_tokens": 0},
            "max_total_tokens: expected a whole number of tokens, at least 1; got 0",
        ),
        ({"threshold": 1, "max_total_tokens": 9.5}, "max_total_tokens: expected a whole number"),
        ({"threshold": 1, "seed": 1 << 63}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "seed": "x"}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "impl": "cuda"}, "impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ForkDecoding(**options)


class Streamer(BaseStreamer):
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"streamer": Streamer()}, "streamer"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"cache_implementation": "static"}, "a static cache"),
    ],
)
def test_what_a_tree_cannot_give_is_refused(kwargs: dict[str, Any], what: str) -> None:
    ids, mask = padded()
    with pytest.raises(UnsupportedModeError, match=f"{what}: expected none with ForkDecoding"):
        grow(composed(), ForkDecoding(threshold=1.0), ids, mask, **kwargs)


def test_other_modes_and_batches_are_refused(model: Any) -> None:
    ids, mask = padded()
    with pytest.raises(UnsupportedModeError, match="ForkDecoding: expected greedy decoding or sampling"):
        grow(model, ForkDecoding(threshold=1.0), ids, mask, num_beams=2)
    with pytest.raises(InputError, match="row"):
        grow(model, ForkDecoding(threshold=1.0, stream_ids=[0, 1]), ids, mask)


def test_a_calibrated_threshold_belongs_to_its_alpha(model: Any) -> None:
    ids, mask = padded()
    want = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask).trees
    for alpha in (None, ALPHA):
        threshold = ForkThreshold(MIDDLE, share=0.2, measure="raw", alpha=alpha)
        got = grow(model, ForkDecoding(threshold=threshold, seed=3), ids, mask).trees
        assert list(map(described, got)) == list(map(described, want))
    if hasattr(model, "members"):
        with pytest.raises(InputError, match="threshold: expected one calibrated at α = 0.7; got at α = 2.0"):
            grow(model, ForkDecoding(threshold=ForkThreshold(MIDDLE, alpha=2.0)), ids, mask)


def test_leaves_need_a_padding_token() -> None:
    plain = copy.deepcopy(shared("llama", 1))
    plain.config.pad_token_id = plain.generation_config.pad_token_id = None
    with pytest.raises(InputError, match="pad_token_id: expected a padding token, since leaves differ in length"):
        grow(plain, ForkDecoding(threshold=1.0), padded()[0][:1], eos_token_id=None, pad_token_id=None)


class Break(LogitsProcessor):
    """Spoils one prompt's rows from some length on."""

    def __init__(self, value: float, length: int, token: int) -> None:
        self.value, self.length, self.token = value, length, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self.length:
            return scores
        return torch.where((input_ids[:, 11] == self.token)[:, None], self.value, scores)


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or"), (-math.inf, "−inf for every token")])
def test_a_row_without_a_distribution_is_named(model: Any, value: float, said: str, do_sample: bool) -> None:
    ids, mask = padded()
    spoil = Break(value, 14, int(ids[1, 11]))
    loop = ForkDecoding(threshold=LOW, branches=3, seed=1)
    with pytest.raises(NumericalError, match=f"prompt 1, branch 0: row 1 of .*, step 2 .*{said}"):
        grow(model, loop, ids, mask, logits_processor=[spoil], do_sample=do_sample, eos_token_id=None)


def test_an_interrupted_cache_is_not_reused(model: Any) -> None:
    ids, mask = padded()
    a = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask)
    b = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask, past_key_values=DynamicCache())
    assert list(map(described, a.trees)) == list(map(described, b.trees))


# --- the host's side alone ------------------------------------------------------------------------------------------


def exact(logprob: float, kappa: float) -> float:
    """log p − log(1 − exp(−exp(log p − κ))) in 120 digits."""
    getcontext().prec = 120
    p, k = Decimal(logprob), Decimal(kappa)
    return float(p - (1 - (-((p - k).exp())).exp()).ln())


@pytest.mark.parametrize("logprob", [-1e-9, -0.3, -2.0, -20.0, -80.0])
@pytest.mark.parametrize("rate", [-90.0, -36.1, -35.9, -12.0, -1.0, 0.0, 1.0, 3.99, 4.01, 5.0])
def test_log_importance_in_120_digits(logprob: float, rate: float) -> None:
    kappa = logprob - rate
    assert log_importance(logprob, kappa) == pytest.approx(exact(logprob, kappa), rel=1e-12, abs=1e-12)


def test_log_importance_at_the_ends() -> None:
    assert log_importance(-3.0, -math.inf) == -3.0
    assert log_importance(-3.0, -1e9) == -3.0
    assert log_importance(-3000.0, -1.0) == -1.0  # e^rate underflows
    for logprob, kappa in itertools.product([-0.1, -5.0, -800.0], [-math.inf, -40.0, -4.0, 0.0, 20.0]):
        assert kool_log_weights([logprob], kappa)[0] == pytest.approx(log_importance(logprob, kappa), abs=1e-12)


def drawn(*tokens: int, at_fork: bool = True) -> RowDraws:
    p = [-0.5 - i for i in range(len(tokens))]
    return RowDraws(tokens, p, [x + 0.25 for x in p], [2 * x for x in p], 1.5, 0.75, at_fork)


def fork_frontier(prompts: int = 1, **more: Any) -> ForkFrontier:
    budget = more.pop("budget", None)
    ledgers = None if budget is None else [TokenLedger(budget) for _ in range(prompts)]
    return ForkFrontier(prompts, **{"branches": 3, "children": 2, "min_gap": 2, "length": 5, "ledgers": ledgers} | more)


def test_a_fork_in_a_grove() -> None:
    one = fork_frontier(2)
    assert one.rows == [(0, 0), (1, 0)]
    assert one.most_draws() == 3
    parents, tokens = one.advance([drawn(7, 8, 9), drawn(4, 5, 6, at_fork=False)])
    assert (parents, tokens) == ([0, 1, 0], [7, 4, 8])
    assert one.retire([False] * 3) == [0, 1, 2]
    assert one.rows == [(0, 0), (1, 0), (0, 1)]
    first, second = one.trees[0].branches
    kappa = -2.5 + 0.25
    assert first.log_weight == log_importance(-0.5, kappa)
    assert second.log_weight == log_importance(-1.5, kappa)
    assert (first.tokens, first.logprobs, first.forks) == ([7], [-1.0], [0])
    assert (second.tokens, second.logprobs, second.parent) == ([8], [-3.0], first)
    # The gap keeps both of them from forking again at once; the other tree may.
    assert one.can_fork() == [False, True, False]
    parents, tokens = one.advance([drawn(1, 2, 3), drawn(1, 2, 3), drawn(1, 2, 3)])
    assert (parents, tokens) == ([0, 1, 2, 1], [1, 1, 1, 2])
    assert one.retire([True, False, False, False]) == [1, 2, 3]
    assert first.finished
    assert one.can_fork() == [False, True, False]
    one.advance([drawn(1, 2, 3) for _ in range(3)])
    assert one.trees[0].branches[2].parent is second
    assert one.trees[0].branches[2].along("tokens") == [8, 1, 2]
    assert one.can_fork()[1] is False  # three leaves are all
    assert one.retire([False] * len(one.rows), halt=True) == []


def test_two_rows_of_a_tree_share_its_last_place() -> None:
    one = fork_frontier(min_gap=1)
    one.advance([drawn(1, 2, 3)])
    assert one.retire([False, False]) == [0, 1]
    parents, _ = one.advance([drawn(1, 2, 3), drawn(1, 2, 3)])
    assert parents == [0, 1, 0]
    assert one.most_draws() == 1
    assert one.advance([drawn(4, at_fork=True)] * 3) == ([0, 1, 2], [4, 4, 4])


def test_nothing_to_draw_is_no_fork() -> None:
    one = fork_frontier(budget=20)
    assert one.advance([drawn(4, -1, -1)]) == ([0], [4])
    assert one.trees[0].branches[0].forks == []
    assert one.trees[0].branches[0].log_weight == 0.0
    assert one.can_fork() == [True]
    # Two tokens for three children: all that there are, with κ = −∞.
    two = fork_frontier(children=3, branches=4)
    none = [-math.inf, -math.inf]
    few = RowDraws([4, 5, -1, -1], [-0.5, -1.0, *none], [0.1, 0.0, *none], [0.0] * 4, 1.0, 1.0, True)
    assert two.advance([few]) == ([0, 0], [4, 5])
    assert [b.log_weight for b in two.trees[0]] == [-0.5, -1.0]


def test_a_finished_row_gives_its_tokens_back() -> None:
    one = fork_frontier(budget=8)  # 5 for the first, 3 left: a child at token 2 can be finished
    for _ in range(2):
        assert one.advance([drawn(1, 2, 3)]) == ([0], [1])
        assert one.retire([False]) == [0]
    assert one.advance([drawn(1, 2, 3)]) == ([0, 0], [1, 2])
    assert one.retire([True, False]) == [1]
    assert one._ledgers[0].held == 2
    assert one._ledgers[0].left == 2


def test_a_tree_in_text() -> None:
    root = Branch(0, tokens=[5, 6, 7], entropies=[1.0, 2.0, 3.0], finished=True)
    early = Branch(1, root, 1, math.log(0.5), tokens=[8], entropies=[2.0], finished=True)
    late = Branch(2, root, 2, math.log(0.25), tokens=[9, 9], entropies=[3.0, 0.0])
    nested = Branch(3, early, 2, math.log(0.25), tokens=[4], entropies=[0.5], finished=True)
    tree = ForkTree(0, [root, early, late, nested])
    assert tree.render() == (
        "0: 3 tokens, weight 0.500\n"
        "├─ 1 at token 1, H 2.00 nats: 1 tokens, weight 0.250\n"
        "│  └─ 3 at token 2, H 0.50 nats: 1 tokens, weight 0.125\n"
        "└─ 2 at token 2, H 3.00 nats: 2 tokens, cut, weight 0.125"
    )
    assert tree.render(lambda ids: "/".join(map(str, ids))).splitlines()[-1].endswith("weight 0.125  '9/9'")
    assert nested.along("tokens") == [5, 8, 4]
    assert (tree.tokens, len(tree), len(nested)) == (7, 4, 3)
