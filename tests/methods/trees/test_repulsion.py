"""Who repels whom, and by how much, on the host, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from proxytune.budget.ledger import TokenLedger
from proxytune.methods.trees.frontier import RowDraws
from proxytune.methods.trees.repulsion import MOST_FOLLOWERS, SiblingFrontier


def found(*tokens: int, keys: Sequence[float] = (), wants: bool = True) -> RowDraws:
    keys = keys or [2.0 - i for i in range(len(tokens))]
    return RowDraws(tokens, [-1.0] * len(tokens), keys, [-1.5] * len(tokens), 1.5, 0.75, wants)


def sibling_frontier(prompts: int = 1, **more: Any) -> SiblingFrontier:
    budget = more.pop("budget", None)
    ledgers = None if budget is None else [TokenLedger(budget) for _ in range(prompts)]
    defaults = {"siblings": 3, "repulsion": 0.5, "ngram": None, "ngram_repulsion": 0.5, "length": 9}
    return SiblingFrontier(prompts, **defaults | {"ledgers": ledgers} | more)


def test_siblings_decide_in_turn() -> None:
    one = sibling_frontier(2)
    assert one.rows == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert one.most_draws() == 3
    near = [1.0, 0.7, 0.4]
    first = [found(7, 8, 9, keys=near) for _ in range(3)]
    other = [found(7, 8, 9, keys=near, wants=i > 0) for i in range(3)]
    parents, tokens = one.advance([*first, *other])
    # 7; then 8, as 7 has lost half a nat; then 7, as both have. In the other tree the first row says: no fork.
    assert (parents, tokens) == ([0, 1, 2, 3, 4, 5], [7, 8, 7, 7, 7, 7])
    assert one.penalties == [{}, {7: 0.5}, {7: 0.5, 8: 0.5}, {}, {}, {}]
    assert [b.forks for b in one.trees[0]] == [[], [0], [0]]
    assert one.retire([False] * 6) == list(range(6))
    # The first and the third have said the same so far; the second is alone.
    assert one.most_draws() == 3
    assert one.advance([found(1, 2)] * 6)[1] == [1, 1, 1, 1, 1, 1]
    assert one.penalties[:3] == [{}, {}, {1: 0.5}]
    assert one.penalties[3:] == [{}, {1: 0.5}, {1: 1.0}]
    assert one.retire([True, False, True, True, True, True]) == [1]
    assert one.most_draws() == 1
    assert one.advance([found(4)]) == ([0], [4])
    assert one.penalties == [{}]


def test_tokens_that_there_are_none_of_are_never_chosen() -> None:
    one = sibling_frontier(siblings=2, repulsion=9.0)
    none = -math.inf
    assert one.advance([found(5, -1, keys=[1.0, none]), found(5, -1, keys=[1.0, none])])[1] == [5, 5]


def test_ngrams_of_other_siblings() -> None:
    one = sibling_frontier(siblings=2, repulsion=0.0, ngram=2, ngram_repulsion=0.25)
    assert one.most_draws() == 1
    for pair, known in (((1, 1), [{}, {}]), ((2, 3), [{}, {}]), ((1, 1), [{}, {}]), ((2, 9), [{3: 0.25}, {2: 0.25}])):
        assert one.advance([found(t, 50, 51, 52) for t in pair])[1] == list(pair)
        assert one.penalties == known
        one.retire([False, False])
    # The first has said 1 2 1 2, the second 1 3 1 9.
    one.advance([found(1, 50), found(1, 50)])
    assert one.penalties == [{}, {}]
    assert one.retire([False, True]) == [0]
    assert one.most_draws() == 3
    one.advance([found(4, 50, 51)])
    # The second is finished, and still repels.
    assert one.penalties == [{3: 0.25, 9: 0.25}]


def test_of_many_followers_the_most_frequent_repel() -> None:
    many = MOST_FOLLOWERS + 5
    one = sibling_frontier(siblings=2, repulsion=0.0, ngram=2, length=999)
    script = list(itertools.chain.from_iterable((0, 100 + i) for i in (*range(many), many - 1, many - 2)))
    for token in script:
        one.advance([found(7), found(token)])
        one.retire([False, False])
    one.advance([found(0), found(8)])
    one.retire([False, False])
    assert one.most_draws() == 1 + MOST_FOLLOWERS
    one.advance([found(1), found(9)])
    kept = [100 + many - 2, 100 + many - 1, *range(100, 100 + MOST_FOLLOWERS - 2)]
    assert one.penalties[0] == {token: 1.0 if token >= 100 + many - 2 else 0.5 for token in kept}
