"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from proxytune.errors import InputError
from proxytune.stats.calibration import _checked, _same, auroc
from proxytune.validation import share, whole

__all__ = ["Interval", "interval", "ratio_interval"]


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


def ratio_interval(
    sums: ArrayLike, counts: ArrayLike, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """`Σ sums / Σ counts` with its percentile bootstrap interval, whole units drawn again.

    Args:
        sums: `[N]`, of each unit (text, problem); −inf gives −inf throughout.
        counts: `[N]`, how many each has, above 0; ones for a mean over units.
        level: Confidence level, in (0, 1).
        draws: Number of resamples. The same seed draws the same units.
        seed: The seed.

    Raises:
        InputError: If there are no units, lengths differ, a sum is NaN or +inf, or a count is not above 0.
    """
    level, draws = share("level", level), whole("draws", draws, "of resamples", least=1)
    top, bottom = np.asarray(sums, float), np.asarray(counts, float)
    fits = top.ndim == 1 and top.shape == bottom.shape and len(top) > 0
    if not fits or not (top < np.inf).all() or not ((bottom > 0) & (bottom < np.inf)).all():
        raise InputError.of(
            "ratio_interval",
            expected="a sum and a count above 0 for each unit, at least one",
            got=f"sums {np.array2string(top, threshold=6)[:80]}, counts {np.array2string(bottom, threshold=6)[:80]}",
            remedy="Pass arrays of one length, without NaN.",
        )
    value = float(top.sum() / bottom.sum())
    if not np.isfinite(value):
        return Interval(value, value, value)
    rng, count = np.random.default_rng(seed), len(top)
    drawn = (rng.integers(count, size=count) for _ in range(draws))
    found = [top[units].sum() / bottom[units].sum() for units in drawn]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
