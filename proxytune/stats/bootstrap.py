"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from proxytune.errors import InputError
from proxytune.stats.calibration import _checked, _same, auroc
from proxytune.validation import share, whole

__all__ = ["Interval", "interval"]


Metric = Callable[..., float]


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval from `low` to `high`."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def interval(
    metric: Metric,
    scores: ArrayLike,
    right: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A metric with its percentile bootstrap interval.

    Args:
        metric: `auroc`, `brier`, `ece`, or another function of `(scores, right)`. With groups, `auroc` compares within
            them.
        scores: `[N]`.
        right: `[N]`, bool.
        groups: `[N]`: resample whole groups (problems), whose samples are correlated. None resamples single samples.
        level: Confidence level, in (0, 1).
        draws: Number of resamples. Those where the metric is undefined (e.g. all right) are skipped.
        seed: The same seed gives the same interval.

    Raises:
        InputError: As the metric; also if most resamples are skipped.
    """
    values, truth = _checked(scores, right)
    level, draws = share("level", level), whole("draws", draws, "of resamples", least=1)
    units = np.arange(len(values)) if groups is None else np.unique(_same(groups, values), return_inverse=True)[1]
    order = np.argsort(units, kind="stable")
    sizes = np.bincount(units)
    starts = np.cumsum(sizes) - sizes
    by_group = groups is not None and metric is auroc
    rng, got = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        lengths = sizes[drawn]
        # A problem that is drawn twice counts as two problems.
        copy = np.repeat(np.arange(len(drawn)), lengths)
        within = np.arange(len(copy)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = order[np.repeat(starts[drawn], lengths) + within]
        try:
            got.append(metric(values[rows], truth[rows], *((copy,) if by_group else ())))
        except InputError:
            continue
    value = metric(values, truth, *((units,) if by_group else ()))
    if len(got) * 2 < draws:
        raise InputError.of(
            "interval",
            expected="right and wrong answers in most resamples",
            got=f"{draws - len(got)} of {draws} resamples without both",
            remedy="Use more problems.",
        )
    low, high = np.quantile(got, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
