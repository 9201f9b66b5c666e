"""Which level of which form to spend a budget on, by a calibration run.

Of the levels that fit the budget, the one most often right within it wins; among equals the one that spends less. A
rule that takes a cheaper level whenever the data cannot separate it from the best would, with few problems, nearly
always take the cheapest. To trade accuracy for tokens, set `tolerance`. The chosen level's accuracy is slightly too
high, since it is measured on the problems it was chosen by. Intervals are percentile bootstraps over problems, paired
between levels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import BudgetError, InputError
from proxytune.search.calibration_run import CalibrationRun, PolicyForm, Trial
from proxytune.stats.bootstrap import Interval
from proxytune.validation import choice, finite, share, whole

__all__ = ["LEAST_PROBLEMS", "LevelReport", "Plan", "plan"]

LEAST_PROBLEMS = 20
"""Fewest problems, of a kind or in all, to decide by."""


@dataclass(frozen=True)
class LevelReport:
    """What the calibration run says about one level.

    Attributes:
        level: Number of samples or extensions.
        accuracy: Share of problems that it had right within the budget, with its interval.
        behind: Accuracy of the best level that fits, less this one's; paired. If the interval contains 0, the data do
            not separate the two.
        tokens: Mean tokens spent, prompt included.
        high_tokens: Tokens not exceeded on the share `quantile` of the problems.
        fits: Whether `high_tokens` is within the budget.
    """

    name: str
    form: PolicyForm
    level: int
    accuracy: Interval
    behind: Interval
    tokens: float
    high_tokens: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What to spend a budget on, and why.

    Attributes:
        budget: Tokens available, prompt included.
        basis: The problems used: "all kinds", or "kind 'x'".
        problems: How many these are.
        calibrated: Whether they decided; False if they were too few and the default was taken.
        levels: All levels, in the order of the run.
        parallel: The most accurate parallel level that fits; None if none does. `sequential` likewise.
        difference: Accuracy of `parallel` less that of `sequential`, paired; None unless both exist.
    """

    chosen: LevelReport
    why: str
    budget: int
    basis: str
    problems: int
    calibrated: bool
    levels: tuple[LevelReport, ...]
    parallel: LevelReport | None
    sequential: LevelReport | None
    difference: Interval | None

    @property
    def form(self) -> PolicyForm:
        """The chosen form."""
        return self.chosen.form


def plan(
    run: CalibrationRun,
    budget: int,
    kind: str | None = None,
    *,
    names: Collection[str] | None = None,
    tolerance: float = 0.0,
    quantile: float = 0.5,
    least: int = LEAST_PROBLEMS,
    default: PolicyForm = "parallel",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Plan:
    """Choose a level.

    If the kind has at least `least` problems, they alone decide; else all problems do, and the plan says so. If these
    are fewer than `least` too, the largest level of the default form that fits is taken.

    Args:
        run: The calibration run.
        budget: Tokens available, prompt included. If it is smaller than the run's budget, levels that it would cut
            short count as worse.
        kind: The kind of the task; None for any.
        names: The policies to choose from; None for all in the run.
        tolerance: Accuracy to give up for fewer tokens, in [0, 1): of the levels this close to the best, the one with
            the lowest mean cost is taken.
        quantile: A level fits if it stayed within the budget on this share of the problems, in (0, 1]. The other
            problems count as wrong, since the ledger would cut them short.
        least: Fewest problems to decide by.
        default: The form to take if there are fewer.
        level: Level of the intervals.
        draws: Bootstrap resamples.
        seed: Seed of the resamples; it affects the intervals only.

    Raises:
        BudgetError: If no level fits.
        InputError: If a setting is out of range, or a name is not in the run.
    """
    budget, least = whole("budget", budget, least=1), whole("least", least, "of problems", least=1)
    draws, level = whole("draws", draws, "of resamples", least=1), share("level", level)
    finite("tolerance", tolerance, least=0.0, below=1.0, remedy="0.01 is one point of a hundred.")
    choice("default", default, get_args(PolicyForm))
    trials = _chosen_from(run, names)
    rows, basis = _basis(run, kind, least)
    tokens = np.stack([trial.tokens[rows] for trial in trials], 1)  # [P, L]
    # Attempts over the budget would be cut short, so they count as wrong. If levels were only dropped, one would look
    # as good as ever just below the threshold, and which of two is dropped would be chance.
    right = (np.stack([trial.right[rows] for trial in trials], 1) & (tokens <= budget)).astype(np.float64)  # [P, L]
    # An observed cost: at least that share of the problems stayed within it.
    high = np.quantile(tokens, share("quantile", quantile), axis=0, method="inverted_cdf").astype(int)
    fits = np.flatnonzero(high <= budget).tolist()
    if not fits:
        cheapest = int(high.argmin())
        raise BudgetError.of(
            "budget",
            expected=f"at least {high[cheapest]} tokens, which {trials[cheapest].name!r}, the cheapest level, did not "
            f"exceed on {quantile:.0%} of the calibration problems",
            got=f"{budget}",
            remedy="Raise max_total_tokens, or calibrate a cheaper level.",
        )
    n, counts, means = len(rows), right.sum(0), tokens.mean(0)
    resampled = _resampled(right, draws, seed)  # [draws, L]

    def most_accurate(among: Sequence[int]) -> int:
        return min(among, key=lambda i: (-counts[i], means[i], trials[i].name))

    def interval(value: float, samples: NDArray[np.float64]) -> Interval:
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(value), float(low), float(high))

    def lead(i: int, j: int) -> Interval:
        return interval((counts[i] - counts[j]) / n, resampled[:, i] - resampled[:, j])

    best = most_accurate(fits)
    reports = tuple(
        LevelReport(
            trial.name,
            trial.form,
            trial.level,
            accuracy=interval(counts[i] / n, resampled[:, i]),
            behind=lead(best, i),
            tokens=float(means[i]),
            high_tokens=int(high[i]),
            fits=i in fits,
        )
        for i, trial in enumerate(trials)
    )
    of_form = {form: [i for i in fits if trials[i].form == form] for form in get_args(PolicyForm)}
    p, s = (most_accurate(of_form[form]) if of_form[form] else None for form in ("parallel", "sequential"))
    if n < least:
        chosen = max(of_form[default] or fits, key=lambda i: (trials[i].level, counts[i], -means[i], trials[i].name))
    elif tolerance:
        near = [i for i in fits if counts[best] - counts[i] <= tolerance * n + 1e-9]
        chosen = min(near, key=lambda i: (means[i], -counts[i], trials[i].name))
    else:
        chosen = best
    found = Plan(
        chosen=reports[chosen],
        why="",
        budget=budget,
        basis=basis,
        problems=n,
        calibrated=n >= least,
        levels=reports,
        parallel=None if p is None else reports[p],
        sequential=None if s is None else reports[s],
        difference=None if p is None or s is None else lead(p, s),
    )
    why = _why(found, least, default, reports[best])
    if run.budget is not None and run.budget < budget:
        why += f"; measured under {run.budget} tokens for each problem, fewer than there are now"
    return replace(found, why=why)


def _chosen_from(run: CalibrationRun, names: Collection[str] | None) -> list[Trial]:
    if names is None:
        return list(run.trials)
    unknown = sorted(set(names) - set(run.names))
    if unknown or not names:
        raise InputError.of(
            "names",
            expected=f"policies of the calibration run: {', '.join(map(repr, run.names))}",
            got=", ".join(map(repr, unknown)) or "none",
            remedy="Calibrate them too, or leave them out.",
        )
    return [trial for trial in run.trials if trial.name in names]


def _basis(run: CalibrationRun, kind: str | None, least: int) -> tuple[NDArray[np.intp], str]:
    """Indices of the problems to decide by, and a name for them."""
    everything = np.arange(run.problems)
    if kind is None:
        return everything, "all kinds"
    rows = run.of_kind(kind)
    if len(rows) >= least:
        return rows, f"kind {kind!r}"
    return everything, f"all kinds, since kind {kind!r} has {len(rows)} of the {least} that it takes"


def _resampled(right: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Accuracies over resampled problems, `[draws, L]`, from right `[P, L]`."""
    rng, n = np.random.default_rng(seed), len(right)
    return np.stack([right[rng.integers(n, size=n)].mean(0) for _ in range(draws)])


def _why(found: Plan, least: int, default: PolicyForm, best: LevelReport) -> str:
    chosen = found.chosen
    if not found.calibrated:
        short = f"{found.problems} calibration problems ({found.basis}) are too few to go by, it takes {least}"
        if chosen.form == default:
            return f"{short}: the default, {default}, at the largest level that fits, {chosen.name!r}"
        return f"{short}, and no {default} level fits {found.budget} tokens: {chosen.name!r}"
    said = f"{_figures(chosen)} of {found.problems} problems ({found.basis})"
    if chosen is not best:
        said += f"; the most accurate is {_figures(best)}, which is within the tolerance"
    if found.difference is None or found.parallel is None or found.sequential is None:
        return f"{said}; no level of the other form fits {found.budget} tokens"
    other = found.sequential if chosen.form == "parallel" else found.parallel
    d = found.difference
    verdict = "the data do not tell the forms apart" if 0 in d else "the data tell the forms apart"
    return (
        f"{said}; the best of the other form: {_figures(other)}; parallel less sequential: "
        f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], {verdict}"
    )


def _figures(report: LevelReport) -> str:
    a = report.accuracy
    return (
        f"{report.form} {report.name!r}, {report.tokens:.0f} tokens, right on {100 * a.value:.1f} % "
        f"[{100 * a.low:.1f}, {100 * a.high:.1f}]"
    )
