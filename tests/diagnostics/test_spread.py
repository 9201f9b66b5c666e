"""Variance across samples, on prompts whose chances are drawn from a beta distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, run, shuffled, text

from proxytune.diagnostics import spread
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace


def policy(seed: int, *, prompts: int = 30, samples: int = 6) -> Trace:
    """Chances are uniform on [0, 1]."""
    rng = np.random.default_rng(seed)
    right = rng.random((prompts, samples)) < rng.random((prompts, 1))
    return run([text(i, grade=float(r), answer=str(r)) for i, row in enumerate(right) for r in row])


def rows(*right: float, prompts: int = 6, **fields: Any) -> Trace:
    return run([text(i, grade=one, **fields) for i in range(prompts) for one in right])


def test_variance_and_shares_cover_the_truth() -> None:
    found = [spread(policy(seed), 4, **FAST) for seed in range(50)]
    assert sum(1 / 6 in one.variance for one in found) >= 42  # E[p(1 − p)]
    assert sum(0.2 in one.all_right for one in found) >= 42  # E[p⁴]
    assert sum(0.2 in one.all_wrong for one in found) >= 42
    assert sum(0.4 in one.without for one in found) >= 42
    assert sum(one.disagreement is not None and 1 / 3 in one.disagreement for one in found) >= 42  # E[2p(1 − p)]


def test_spread_in_closed_form() -> None:
    found = spread(rows(1, 0, 0, 0))
    assert (found.samples, found.variance.value, found.without.value) == (4, 0.25, 0.0)
    assert found.disagreement is None
    two = spread(rows(1, 0, 0, 0), 2)
    assert (two.all_wrong.value, two.all_right.value) == (0.5, 0.0)
    mixed = run([text(i, grade=float(i < 2), answer="x") for i in range(8) for _ in range(3)])
    found = spread(mixed)
    assert (found.all_right.value, found.all_wrong.value, found.without.value) == (0.25, 0.75, 1.0)
    assert found.disagreement == Interval(0, 0, pytest.approx(1 - 0.025 ** (1 / 8)))
    assert "With 3 samples each, 100 % [63.1, 100] of the prompts have no variance" in found.says


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(0)
    assert_same(spread(trace, **FAST), spread(shuffled(trace), **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: spread(rows(1)), "at least two samples of each prompt; got 6 of 6 prompts with one. Draw several"),
        (lambda: spread(rows(1, 0), 3), "samples: expected .* from 2 to 2; got 3. Draw more samples: a prompt has 2"),
        (lambda: spread(rows(1, 0), 1), "samples: expected"),
        (lambda: spread(rows(1, 0, prompts=4)), "at least 5 prompts"),
        (lambda: spread(run([text(i // 2) for i in range(12)])), "a grade for each text"),
        (lambda: spread(rows(1, 0, facts={"weight": 1})), "independent samples of each prompt"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
