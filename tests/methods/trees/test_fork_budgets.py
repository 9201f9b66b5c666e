"""Caps, gaps and budgets of fork trees."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import EOS, PAD
from support.trees import LOW, START, check_branches, composed, grow, padded, small_model

from proxytune.errors import BudgetError
from proxytune.methods.trees.fork_decoding import ForkDecoding


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
