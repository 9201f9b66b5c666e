"""AUROC, Brier score and ECE, against slow references and closed forms."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxytune.errors import InputError
from proxytune.stats.calibration import auroc, brier, ece

NAN = math.nan


def slow_auroc(scores: Sequence[float], right: Sequence[bool], groups: Sequence[int]) -> float:
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, t, g in zip(scores, right, groups, strict=True)
        for b, u, h in zip(scores, right, groups, strict=True)
        if t and not u and g == h
    ]
    return sum(pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=2, max_size=25))
def test_auroc_counts_pairs(rows: list[tuple[int, bool, int]]) -> None:
    scores, right, groups = zip(*rows, strict=True)
    assume(any(len({t for _, t, g in rows if g == h}) == 2 for h in range(3)))
    assert auroc(scores, right) == pytest.approx(slow_auroc(scores, right, [0] * len(rows)))
    assert auroc(scores, right, groups) == pytest.approx(slow_auroc(scores, right, groups))
    flipped = [-s for s in scores]
    assert auroc(flipped, right, groups) == pytest.approx(1 - auroc(scores, right, groups))


def test_brier_and_ece_in_closed_form() -> None:
    assert brier([1, 0, 0.5], [True, False, True]) == pytest.approx(0.25 / 3)
    p = np.repeat([0.1, 0.9], 10)
    right = np.array([1] + [0] * 9 + [1] * 9 + [0])
    assert ece(p, right) == pytest.approx(0, abs=1e-12)
    assert ece(p, 1 - right) == pytest.approx(0.8)
    assert ece([0.7] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.2), "equal probabilities are one bin"
    assert ece([0.2, 0.4], [0, 1], bins=1) == pytest.approx(0.2)
    assert ece([0.2, 0.4], [0, 1], bins=2) == pytest.approx(0.4)
    # The middle of three equal ones is in the lower half: not with 0.9, of which it would take the edge.
    assert ece([0.5, 0.5, 0.5, 0.9], [1, 1, 1, 0], bins=2) == pytest.approx((1.5 + 0.9) / 4)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_ece_does_not_depend_on_the_order(rows: list[tuple[float, bool]], random: Any) -> None:
    before = ece(*zip(*rows, strict=True), bins=4)
    random.shuffle(rows)
    assert ece(*zip(*rows, strict=True), bins=4) == pytest.approx(before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: auroc([1.0, 2.0], [True, True]), "right: expected right and wrong answers; got 2 right of 2"),
        (lambda: auroc([1.0, 2.0], [True, False], [0, 1]), "right and wrong answers to the same problem"),
        (lambda: auroc([1.0], [True, False]), "right: expected 1 booleans, one per score"),
        (lambda: auroc([NAN], [True]), "scores: expected finite numbers"),
        (lambda: auroc([1.0, 2.0], [True, False], [0]), "groups: expected 2, one per score"),
        (lambda: brier([1.5], [True]), r"probabilities: expected values in \[0, 1\]"),
        (lambda: ece([], []), "probabilities: expected a sequence of numbers, not empty"),
        (lambda: ece([0.5], [True], bins=0), "bins: expected a whole number"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
