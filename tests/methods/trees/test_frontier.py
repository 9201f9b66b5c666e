"""The live branches of fork trees on the host, by hand."""

from __future__ import annotations

import math
from typing import Any

from proxytune.budget.ledger import TokenLedger
from proxytune.methods.trees.frontier import ForkFrontier, RowDraws
from proxytune.stats.importance import log_importance


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
