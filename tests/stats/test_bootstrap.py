"""Bootstrap intervals cover what they are of."""

from typing import Any

import numpy as np
import pytest

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval, interval, ratio_interval
from proxytune.stats.calibration import auroc, brier


def test_intervals_cover() -> None:
    """A 90 % interval of a known AUROC, on 40 data sets; by problem where samples of one problem stand together."""
    rng, covered = np.random.default_rng(1), 0
    for seed in range(40):
        right = rng.random(200) < 0.5
        scores = rng.normal(size=200) + right  # AUROC Φ(1/√2) = 0.7602
        found = interval(auroc, scores, right, level=0.9, draws=150, seed=seed)
        assert found.low <= found.value <= found.high
        covered += 0.7602 in found
    assert 30 <= covered <= 40
    problem = np.repeat(np.arange(20), 10)
    one = np.repeat(rng.random(20) < 0.5, 10)  # a problem is all right or all wrong: 20 data points, not 200
    by_problem = interval(brier, np.full(200, 0.3), one, problem)
    by_sample = interval(brier, np.full(200, 0.3), one)
    assert by_problem.high - by_problem.low > 2 * (by_sample.high - by_sample.low)
    assert interval(brier, np.full(200, 0.3), one, problem) == by_problem


def test_intervals_of_ratios_cover() -> None:
    """Texts whose tokens are alike: units of 1 to 9 tokens, each with a mean of its own around −2."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(40):
        counts = rng.integers(1, 10, size=60)
        sums = counts * rng.normal(-2.0, 1.0, size=60)
        found = ratio_interval(sums, counts, level=0.9, draws=150, seed=seed)
        assert found.value == pytest.approx(sums.sum() / counts.sum())
        covered += -2.0 in found
    assert 30 <= covered <= 40
    assert found == ratio_interval(sums, counts, level=0.9, draws=150, seed=39)
    assert ratio_interval([3.0], [2]) == Interval(1.5, 1.5, 1.5)
    lowest = ratio_interval([-np.inf, 1.0], [1, 1])
    assert lowest == Interval(-np.inf, -np.inf, -np.inf)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ratio_interval([], []), "ratio_interval: expected a sum and a count above 0 for each unit"),
        (lambda: ratio_interval([1.0, 2.0], [1]), "expected a sum and a count above 0"),
        (lambda: ratio_interval([1.0], [0]), "got sums \\[1.\\], counts \\[0.\\]"),
        (lambda: ratio_interval([np.nan], [1]), "expected a sum and a count above 0"),
        (lambda: interval(auroc, [1, 2, 3], [True, False, False], [0, 0, 1], draws=9, level=2), "level: expected"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
