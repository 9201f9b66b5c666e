"""Coverage of simulated policies: chances are drawn from a beta distribution, so pass@k is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, covered, run, shuffled, text

from proxytune.diagnostics import coverage, crossing
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.importance import kool_log_weights
from proxytune.trace import Trace


def policy(seed: int, a: float, b: float, *, prompts: int = 30, samples: int = 8) -> Trace:
    rng = np.random.default_rng(seed)
    right = rng.random((prompts, samples)) < rng.beta(a, b, size=(prompts, 1))
    return run([text(i, grade=float(r)) for i, row in enumerate(right) for r in row])


def truth(a: float, b: float, k: int) -> float:
    return 1 - math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(a + b + k))


def test_the_curve_covers_the_truth() -> None:
    found = [coverage(policy(seed, 0.5, 1.5), **FAST).curve for seed in range(40)]
    for k in (1, 2, 4, 8):
        assert sum(truth(0.5, 1.5, k) in curve[k] for curve in found) >= 34, k


def test_the_weighted_curve_covers_the_truth() -> None:
    """Leaves of probability 1/8, 2/8, 4/8 and 1/8, each always drawn: weights are exact."""
    shares, at = (0.125, 0.25, 0.5, 0.125), 2

    def curve(seed: int) -> Interval:
        right = np.random.default_rng(seed).random((25, 4)) < 0.4
        texts = [
            text(i, grade=float(r), facts={"weight": w})
            for i, row in enumerate(right)
            for r, w in zip(row, shares, strict=True)
        ]
        return coverage(run(texts, loop="ForkDecoding"), weighted=True, **FAST).curve[at]

    subsets = [[i >> j & 1 for j in range(4)] for i in range(16)]
    expected = sum(0.4 ** sum(hit) * 0.6 ** (4 - sum(hit)) * (1 - (1 - np.dot(shares, hit)) ** at) for hit in subsets)
    assert covered(expected, curve, 40) >= 34


def test_leaves_of_trees_need_their_weights() -> None:
    """Three of five leaves drawn without replacement: half of the mass is right, on one leaf."""
    rng, log_p, kept = np.random.default_rng(0), np.log([0.5, 0.2, 0.15, 0.1, 0.05]), 3
    weighted, equal = [], []
    for i in range(400):
        perturbed = log_p + rng.gumbel(size=5)
        order = np.argsort(-perturbed)
        weights = np.exp(kool_log_weights(log_p[order[:kept]], perturbed[order[kept]]))
        for leaf, weight in zip(order, weights / weights.sum(), strict=False):
            weighted.append(text(i, grade=float(leaf == 0), facts={"weight": float(weight)}))
            equal.append(text(i, grade=float(leaf == 0)))
    found = coverage(run(weighted, loop="ForkDecoding"), weighted=True, **FAST).curve
    as_if_independent = coverage(run(equal), **FAST).curve
    assert abs(found[1].value - 0.5) < 0.05
    assert abs(found[2].value - 0.75) < 0.06, "rather low: so few leaves"
    assert as_if_independent[1].value < 0.36
    assert as_if_independent[3].value > 0.9 > 1 - 0.5**3


def test_the_crossing_covers_the_truth() -> None:
    """One policy always has 30 %; the other 90 % on half of the prompts, and nothing on the others."""

    def at(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        wide, narrow = np.full((40, 1), 0.3), 0.9 * (rng.random((40, 1)) < 0.5)
        runs = [
            run([text(i, grade=float(r)) for i, row in enumerate(rng.random((40, 4)) < p) for r in row])
            for p in (wide, narrow)
        ]
        found = crossing(*runs, **FAST)
        return found.at or Interval(math.inf, math.inf, math.inf)

    # Behind by 0.15 at 1 sample, ahead by 0.015 at 2.
    assert covered(2 ** (0.15 / 0.165), at, 40) >= 34


def rows(*right: float, prompts: int = 20, **facts: Any) -> Trace:
    return run([text(i, grade=one, facts=facts) for i in range(prompts) for one in right])


def test_curves_that_cross_and_curves_that_do_not() -> None:
    narrow = run([text(i, grade=float(i % 2)) for i in range(40) for _ in range(4)])
    wide = rows(1, 0, 0, 0, prompts=40)
    found = crossing(narrow, wide)
    assert found.told
    assert found.at is not None
    assert found.at.value == pytest.approx(2)
    assert found.difference[4].value == -0.5
    assert "The first leads below 2 [" in found.says
    apart = crossing(rows(1, 1, 0, 0), rows(1, 0, 0, 0))
    assert (apart.at, apart.told) == (None, False)
    assert "do not cross up to 4 samples; first less second is 25 points [25, 25] at 1" in apart.says
    same = crossing(wide, wide)
    assert same.at is None
    unsure = crossing(policy(0, 0.5, 1.5, prompts=6), policy(1, 0.5, 1.5, prompts=6), **FAST)
    assert not unsure.told


def test_extremes() -> None:
    missed = pytest.approx(1 - 0.025 ** (1 / 20))
    assert coverage(rows(0, 0, 0)).curve == {k: Interval(0, 0, missed) for k in (1, 2, 3)}
    assert coverage(rows(1)).curve == {1: Interval(1, pytest.approx(0.025 ** (1 / 20)), 1)}
    assert coverage(rows(1, 0), [2]).curve[2].value == 1.0
    assert coverage(rows(0.7)).curve[1].value == 0.0, "a partial grade is not right"


def test_the_order_of_texts_does_not_matter() -> None:
    one, other = policy(1, 0.5, 1.5), policy(2, 2, 3)
    assert_same(coverage(one, **FAST), coverage(shuffled(one), **FAST))
    assert_same(crossing(one, other, **FAST), crossing(shuffled(one), shuffled(other), **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: coverage(rows(1, 0, weight=0.5)), "independent samples of each prompt; got 20 of 20 prompts whose"),
        (lambda: crossing(rows(1, 0), rows(1, 0, weight=0.5)), "Pass weighted=True, with facts"),
        (lambda: coverage(replace(rows(1, 0), about={"loop": "SiblingDecoding"})), "got texts of SiblingDecoding"),
        (lambda: coverage(rows(1, 0), weighted=True), r"facts\['weight'\] in each text"),
        (lambda: coverage(rows(1, 0), [3]), "ks: expected .* from 1 to 2; got 3. Draw more samples: a prompt has 2"),
        (lambda: coverage(rows(1, 0), []), "ks: expected numbers of samples; got none"),
        (lambda: coverage(run([text(i) for i in range(9)])), "a grade for each text"),
        (lambda: crossing(rows(1), rows(1, prompts=4)), "at least 5 prompts that both have; got 4, of 20 and 4"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
