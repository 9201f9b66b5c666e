"""A budget that leaves tokens: what it had no room for is said, and further rounds spend what is left."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import PAD, shared
from support.trees import LOW, START, described, grow

from proxytune.errors import BudgetWarning, InputError
from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.rounds import grow_in_rounds
from proxytune.methods.trees.sibling_decoding import SiblingDecoding

MODEL = functools.partial(shared, "llama", 5, 64)
FORKS = ForkDecoding(threshold=LOW, branches=6, seed=1)
SIBLINGS = SiblingDecoding(siblings=6, repulsion=0.0, seed=1)
LOOPS = pytest.mark.parametrize("loop", [FORKS, SIBLINGS], ids=["forks", "siblings"])
ENDS = {"do_sample": True, "top_k": 0, "temperature": 1.5, "eos_token_id": list(range(2, 64, 4)), "pad_token_id": PAD}
"""A quarter of the words ends a text: most are short."""
GREEDY = {"do_sample": False, "temperature": None, "top_k": None}


def rounds(loop: TreeLoop, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        return grow_in_rounds(MODEL(), loop, ids, attention_mask=mask, **ENDS | kwargs)


@LOOPS
@pytest.mark.parametrize("most", [40, 60])
def test_a_loose_length_starves_no_branch(loop: TreeLoop, most: int) -> None:
    """One round has room for one text of `most` tokens; in fact all six fit."""
    ids = torch.tensor([START])
    loop = replace(loop, max_total_tokens=len(START) + 60)
    (alone,) = grow(MODEL(), loop, ids, max_new_tokens=most, **ENDS).trees
    (tree,) = rounds(loop, ids, max_new_tokens=most)
    assert alone.starved
    assert len(alone) < 4
    assert (len(tree), tree.planned, tree.cut, tree.starved) == (6, 6, 0, False)
    assert tree.tokens <= 60
    assert [b.number for b in tree] == list(range(6))
    assert sum(tree.weights()) == pytest.approx(1)
    assert tree.render().count("weight") == 6


@LOOPS
def test_rounds_are_calls_of_the_loop_with_what_is_left(loop: TreeLoop) -> None:
    ids, mask = torch.tensor([[PAD, *START], [6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    loop = replace(loop, max_total_tokens=40, stream_ids=[5, 8])
    found = rounds(loop, ids, mask, streams=10, max_new_tokens=30)
    for row, (tree, stream, length) in enumerate(zip(found, (5, 8), (3, 4), strict=True)):
        expected: list[list[Any]] = []
        log_weights: list[list[float]] = []
        left, reserve, missing = 40, None, 6
        while missing and (reserve is None or left - length >= reserve):
            how = replace(
                loop.asking_for(missing),
                stream_ids=[stream + 10 * len(expected)],
                max_total_tokens=left,
                reserve=reserve,
            )
            out = grow(MODEL(), how, ids[row : row + 1], mask[row : row + 1], max_new_tokens=30, **ENDS)
            expected.append([b.along("tokens") for b in out.trees[0]])
            log_weights.append(out.log_weights.tolist())
            left -= out.trees[0].tokens
            lengths = [len(tokens) for tokens in itertools.chain(*expected)]
            missing, reserve = 6 - len(lengths), math.ceil(sum(lengths) / len(lengths))
        assert len(expected) > 1
        assert [b.along("tokens") for b in tree] == list(itertools.chain(*expected))
        assert tree.tokens == 40 - left <= 40 - length
        # Each round's estimate counts with its share of the leaves.
        shares = [math.log(len(one) / len(tree)) for one in log_weights]
        by_hand = [w + share for one, share in zip(log_weights, shares, strict=True) for w in one]
        assert [b.log_weight for b in tree] == pytest.approx(by_hand)


def test_greedy_trees_are_not_repeated() -> None:
    loop = replace(FORKS, max_total_tokens=len(START) + 21)
    (tree,) = rounds(loop, torch.tensor([START]), max_new_tokens=20, **GREEDY)
    (alone,) = grow(MODEL(), loop, torch.tensor([START]), max_new_tokens=20, **ENDS | GREEDY).trees
    assert alone.starved
    assert described(tree) == described(alone)


def test_without_a_shortage_there_is_one_round() -> None:
    ids = torch.tensor([START])
    for loop in (FORKS, replace(FORKS, max_total_tokens=500)):
        (alone,) = grow(MODEL(), loop, ids, max_new_tokens=8, **ENDS).trees
        (tree,) = grow_in_rounds(MODEL(), loop, ids, max_new_tokens=8, **ENDS)
        assert described(tree) == described(alone)
        assert tree.weights() == alone.weights()


@LOOPS
def test_a_shortage_is_said(loop: TreeLoop) -> None:
    ids = torch.tensor([START, START])
    loop = replace(loop, max_total_tokens=len(START) + 10)
    said = r"prompt 0, and so for 1 more: 6 texts planned, [12] ran, . of them cut: max_total_tokens=13 had no room"
    with pytest.warns(BudgetWarning, match=said + ".*grow_in_rounds.$"):
        MODEL().generate(ids, custom_generate=loop, max_new_tokens=9, **ENDS | {"eos_token_id": None})
    with pytest.warns(BudgetWarning, match=said + ".*or raise max_total_tokens.$"):
        grow_in_rounds(MODEL(), loop, ids, max_new_tokens=9, **ENDS | {"eos_token_id": None})


@LOOPS
def test_a_text_longer_than_its_reservation_goes_on_while_there_is_budget(loop: TreeLoop) -> None:
    ids = torch.tensor([START])
    fixed: dict[str, Any] = {"max_new_tokens": 8, **ENDS, "eos_token_id": None}
    loop = loop.asking_for(2)
    (free,) = grow(MODEL(), loop, ids, **fixed).trees
    (enough,) = grow(MODEL(), replace(loop, max_total_tokens=3 + 16, reserve=2), ids, **fixed).trees
    assert [b.along("tokens") for b in enough] == [b.along("tokens") for b in free]
    assert (enough.no_room, enough.cut) == (False, 2)  # by the length
    out = grow(MODEL(), replace(loop, max_total_tokens=3 + 11, reserve=2), ids, **fixed)
    assert out.ledgers[0].spent == 3 + 11
    assert out.trees[0].starved
    for cut, whole in zip(out.trees[0], free, strict=True):
        assert len(cut) < 8
        assert whole.along("tokens")[: len(cut)] == cut.along("tokens")


def test_wrong_use_is_refused() -> None:
    ids = torch.tensor([START])
    with pytest.raises(InputError, match="no argument that the rounds set themselves; got num_return_sequences"):
        grow_in_rounds(MODEL(), FORKS, ids, num_return_sequences=2)
    with pytest.raises(InputError, match="reserve: expected max_total_tokens with it; got no budget"):
        replace(FORKS, reserve=3)
    with pytest.raises(InputError, match="reserve: expected a whole number of tokens, at least 1; got 0"):
        replace(FORKS, reserve=0, max_total_tokens=9)
