"""Search scaling: success against the budget that was spent, and what more of it would buy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from proxytune.diagnostics.prompts import (
    Finding,
    Floats,
    Resamples,
    counts,
    figure,
    graded,
    numbers_of,
    prompts_of,
    said,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace

__all__ = ["BUDGETS", "SearchScaling", "search_scaling"]

BUDGETS = 4
"""The fewest that the curve is fitted to."""

_MOST_BUDGETS = 50
_EXPONENTS = np.geomspace(0.05, 4.0, 40)


@dataclass(frozen=True, kw_only=True)
class SearchScaling(Finding):
    """Success against budget, as measured and as fitted.

    The fit is `success = ceiling − lost · (budget / smallest)^−γ`: each doubling buys the same part of what is left. It
    is meant for the measured budgets and one doubling more.

    Attributes:
        measured: Budget → share of prompts solved.
        fitted: Budget → the same by the fit.
        doubling: What twice the largest budget would add to success, by the fit.
        doubling_at_start: What doubling the smallest budget added, by the fit.
        ceiling: What no budget exceeds, by the fit, at most 1; its interval is wide unless the curve has become flat.
        exponent: γ, from 0.05 to 4; the larger, the sooner the curve is flat.
        rmse: Root mean square of the measured points' distance from the fit.
        diminishing: Whether doublings are told to buy less and less, by the measured points: their curvature over log
            budget lies below 0.
    """

    measured: Mapping[float, Interval]
    fitted: Mapping[float, float]
    doubling: Interval
    doubling_at_start: Interval
    ceiling: Interval
    exponent: float
    rmse: float
    diminishing: bool


def search_scaling(trace: Trace, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> SearchScaling:
    """Fit success against budget over at least four budgets, by least squares.

    Each text of the trace is what a search came back with, `facts["budget"]` the tokens that it was allowed.

    Args:
        trace: A graded text for each prompt and budget (or several, whose mean counts).
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts: all their budgets together.
        seed: Seed of the resamples.

    Raises:
        InputError: If a text has no grade or no budget, there are fewer than four budgets or more than fifty, or fewer
            than five prompts have all of them.
    """
    what = "search_scaling"
    prompts = prompts_of(trace, what)
    rights, spent = graded(prompts, what), numbers_of(prompts, "budget", what)
    budgets = np.unique(np.concatenate(spent))
    if not BUDGETS <= len(budgets) <= _MOST_BUDGETS:
        raise InputError.of(
            what,
            expected=f"{BUDGETS} to {_MOST_BUDGETS} budgets, each given to all prompts",
            got=f"{len(budgets)}, from {budgets[0]:g} to {budgets[-1]:g}",
            remedy="Record the budget that was allowed, in facts['budget']; search at more of them.",
        )
    complete = [i for i, row in enumerate(spent) if len(np.unique(row)) == len(budgets)]
    resamples = Resamples(len(complete), f"{what}: prompts with all budgets", level=level, draws=draws, seed=seed)
    table = np.array([[rights[i][spent[i] == budget].mean() for budget in budgets] for i in complete])
    ratios = budgets / budgets[0]

    # The fit to all prompts stands before those to the resamples.
    times = np.concatenate([np.ones((1, len(complete))), resamples.times])
    fits = _fit(ratios, times @ table / times.sum(1, keepdims=True))
    ceiling, lost, exponent = fits[:, 0]

    def interval(values: Floats) -> Interval:
        return resamples.interval(float(values[0]), values[1:])

    def gain(at: float) -> Interval:
        """What doubling a budget, in units of the smallest, adds."""
        return interval(fits[1] * (at ** -fits[2] - (2 * at) ** -fits[2]))

    doubling = gain(float(ratios[-1]))
    # Of the measured points, not of the fit, which cannot but bend: the square's coefficient in log budget.
    slowing = resamples.mean(table @ np.linalg.pinv(np.vander(np.log(ratios), 3))[0])
    mean = table.mean(0)
    fitted = ceiling - lost * ratios**-exponent
    told = "returns diminish" if slowing.high < 0 else "that returns diminish is not told"
    return SearchScaling(
        says=(
            f"Doubling the largest budget, {figure(budgets[-1])}, would add {said(doubling, points=True)} of success; "
            f"{told}."
        ),
        **counts([prompts[i] for i in complete]),
        measured={float(b): resamples.share(table[:, j]) for j, b in enumerate(budgets)},
        fitted=dict(zip(budgets.tolist(), fitted.tolist(), strict=True)),
        doubling=doubling,
        doubling_at_start=gain(1.0),
        ceiling=interval(np.minimum(fits[0], 1.0)),
        exponent=float(exponent),
        rmse=float(np.sqrt(((mean - fitted) ** 2).mean())),
        diminishing=slowing.high < 0,
    )


def _fit(ratios: Floats, success: Floats) -> Floats:
    """Ceiling, what is lost at the smallest budget, and exponent, `[3, N]`, of each row of `success`, `[N, budgets]`.

    Least squares: for each exponent of a grid the best ceiling and loss ≥ 0, then the best exponent.
    """
    rows = len(success)
    best, found = np.full(rows, np.inf), np.zeros((3, rows))
    mean = success.mean(1)
    for exponent in _EXPONENTS:
        x = ratios**-exponent
        away = x - x.mean()
        slope = (success - mean[:, None]) @ away / (away @ away)
        lost = np.maximum(-slope, 0.0)  # a curve that falls is flat
        ceiling = mean + lost * x.mean()
        error = ((success - ceiling[:, None] + lost[:, None] * x) ** 2).sum(1)
        better = error < best - 1e-12
        best = np.where(better, error, best)
        found = np.where(better, [ceiling, lost, np.full(rows, exponent)], found)
    return found
