"""The law of reward and entropy over checkpoints of a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Resamples,
    as_trace,
    counts,
    graded,
    keyed,
    over,
    refuse_weighted,
    said,
    values_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.student import t_quantile
from proxytune.trace import Trace

__all__ = ["CHECKPOINTS", "EntropyLaw", "entropy_law"]

CHECKPOINTS = 4
"""The fewest that the law is fitted to."""


@dataclass(frozen=True, kw_only=True)
class EntropyLaw(Finding):
    """The law fitted to checkpoints.

    Attributes:
        a: What a unit of `e^H` costs in R; above 0, entropy was traded for reward.
        b: R at `e^H = 0`.
        ceiling: `b − a`, what is left to reach when all entropy is spent; not cut to [0, 1].
        rmse: Root mean square of the checkpoints' distance from the law, in R.
        points: (H, R) of each checkpoint, in the order given.
    """

    a: Interval
    b: Interval
    ceiling: Interval
    rmse: float
    points: tuple[tuple[float, float], ...]


def entropy_law(checkpoints: Sequence[Trace], *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> EntropyLaw:
    """Fit `R = −a·e^H + b` (Cui et al. 2025, arXiv 2505.22617) to runs of at least four checkpoints, by least squares.

    R is the share of right texts and H the mean entropy of a checkpoint's own tokens, in nats. The law says what
    training buys with entropy, and where it ends: at H = 0, the ceiling is `b − a`. It is one over checkpoints of a
    training on the same prompts, never over temperatures of a model.

    Intervals are by Student's t, with checkpoints less 2 degrees of freedom. Their variance is that of the line, and of
    the prompts (resamples, the same for all checkpoints); both hold the noise of samples, so they are rather too wide
    than too narrow.

    Args:
        checkpoints: A graded run of each, of the texts that it wrote itself.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If there are fewer than four checkpoints, they share fewer than five prompts, a text has no grade,
            samples depend on each other, runs differ in temperature, or the entropies are all the same.
    """
    what = "entropy_law"
    traces = [as_trace(trace, f"checkpoints[{i}]") for i, trace in enumerate(checkpoints)]
    if len(traces) < CHECKPOINTS:
        raise InputError.of(
            what,
            expected=f"runs of at least {CHECKPOINTS} checkpoints",
            got=str(len(traces)),
            remedy="Record more checkpoints of the training; other temperatures of one model do not count.",
        )
    temperatures = {trace.about.get("temperature") for trace in traces}
    if len(temperatures) > 1:
        raise InputError.of(
            what,
            expected="checkpoints, run at one temperature",
            got=f"about['temperature'] of {', '.join(sorted(map(str, temperatures)))}",
            remedy="The law is over checkpoints; draw from each of them at the same temperature.",
        )
    found = [keyed(trace, given=False) for trace in traces]
    keys = sorted(set.intersection(*(set(one) for one in found)))
    resamples = Resamples(len(keys), f"{what}: prompts that all have", level=level, draws=draws, seed=seed)
    runs = [[one[key] for key in keys] for one in found]
    sums = []
    for trace, prompts in zip(traces, runs, strict=True):
        refuse_weighted(trace, prompts, what, "Draw independent samples of each checkpoint.")
        entropies = [np.array([float(one.sum()) for one in texts]) for texts in values_of(prompts, "entropy", what)]
        sums.append([
            [one.sum() for one in entropies],
            [sum(map(len, texts)) for texts in prompts],
            [one.mean() for one in graded(prompts, what)],
        ])  # fmt: skip
    totals = np.array(sums, float)  # [checkpoints, 3, prompts]

    def points(times: Floats) -> tuple[Floats, Floats]:
        """`e^H` and R of each checkpoint, `[N, checkpoints]`."""
        entropy, tokens, rewards = (times @ totals[:, i].T for i in range(3))
        return np.exp(over(entropy, tokens)), rewards / times.sum(1, keepdims=True)

    x, y = (one[0] for one in points(np.ones((1, len(keys)))))
    spread = float(((x - x.mean()) ** 2).sum())
    if spread <= 1e-12 * float((x**2).sum()):
        raise InputError.of(
            what,
            expected="checkpoints of different entropy",
            got=f"{math.log(x[0]):.4g} nats in all",
            remedy="Record checkpoints that lie further apart in the training.",
        )
    slope, start = (float(one[0]) for one in _line(x[None], y[None]))
    freedom = len(traces) - 2
    left = y - start - slope * x
    noise = float((left**2).sum()) / freedom
    bases, rewards = points(resamples.times)
    slopes, _ = _line(bases, rewards)
    reach = t_quantile((1 + level) / 2, freedom)

    # The distances from the line hold the noise of samples, and what differs between checkpoints; not what the prompts,
    # which all checkpoints share, do to all of them alike.
    of_slope = max(noise / spread, float(np.nanvar(slopes)))
    of_mean = noise / len(x) + float(rewards.mean(1).var())

    def interval(value: float, variance: float) -> Interval:
        half = reach * math.sqrt(variance)
        return Interval(value, value - half, value + half)

    def at(place: float) -> Interval:
        """The line's value at x."""
        return interval(start + slope * place, of_mean + of_slope * (place - x.mean()) ** 2)

    a, ceiling = interval(-slope, of_slope), at(1.0)
    trade = (
        f"entropy was traded for reward, with a ceiling of {said(ceiling)} when it is spent"
        if a.low > 0
        else "that entropy was traded for reward is not told"
    )
    return EntropyLaw(
        says=f"R = −a·e^H + b over {len(traces)} checkpoints, with a = {said(a)}: {trade}.",
        **counts([list(itertools.chain(*of_prompt)) for of_prompt in zip(*runs, strict=True)]),
        a=a,
        b=at(0.0),
        ceiling=ceiling,
        rmse=math.sqrt(float((left**2).mean())),
        points=tuple(zip(np.log(x).tolist(), y.tolist(), strict=True)),
    )


def _line(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Slope and start of the least-squares line through each row's points; NaN where x is all the same."""
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    slope = over((dx * dy).sum(1), (dx**2).sum(1))
    return slope, y.mean(1) - slope * x.mean(1)
