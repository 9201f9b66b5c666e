"""Can a confidence tell right from wrong? AUROC, Brier, ECE with intervals; and the choice of a vote that follows.

A vote compares samples of one problem. So what counts for it is whether, *within* a problem, right answers score higher
than wrong ones. Over all problems together a confidence may look good because it knows which problems are hard, and
still be of no use to a vote; `choose_vote` therefore looks at pairs of the same problem only, and resamples problems.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import whole
from proxytune.voting.confidence import WINDOW, TraceScore, numbers, share
from proxytune.voting.vote import How, Sample, Score, sample_scores

__all__ = ["Choice", "Interval", "auroc", "brier", "choose_vote", "ece", "interval"]

Metric = Callable[..., float]


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap interval.

    Attributes:
        value: The figure.
        low: The lower end.
        high: The upper end.
    """

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


@dataclass(frozen=True)
class Choice:
    """Which way to vote, and why.

    Attributes:
        how: The `how` of `vote`.
        score: The score it goes by; also of the calibration.
        why: The reason, with the figures.
        auroc: Right against wrong within problems, and its interval; None if there were too few to tell.
        pooled: AUROC over all answers together, for comparison; None likewise.
        right: Right answers in problems that also have wrong ones.
        wrong: Wrong answers in problems that also have right ones.
        unanswered: Samples without an answer, which are neither.
    """

    how: How
    score: Score
    why: str
    auroc: Interval | None
    pooled: float | None
    right: int
    wrong: int
    unanswered: int


def auroc(scores: ArrayLike, right: ArrayLike, groups: ArrayLike | None = None) -> float:
    """P(a right answer scores higher than a wrong one), a tie counting ½; ½ is no signal.

    Args:
        scores: `[N]`; larger is more confident.
        right: `[N]`, bool.
        groups: `[N]`, the problem of each; only pairs within a problem are compared. None for all pairs.

    Returns:
        In [0, 1].

    Raises:
        InputError: If scores are empty or not finite, lengths differ, or there is no pair of right and wrong.
    """
    values, truth = _checked(scores, right)
    problem = (
        np.zeros(len(values), np.intp) if groups is None else np.unique(_same(groups, values), return_inverse=True)[1]
    )
    # Blocks of equal score within a problem, in order: a right answer beats the wrong ones of the blocks before.
    order = np.lexsort((values, problem))
    v, g, t = values[order], problem[order], truth[order]
    first = np.concatenate([[True], (np.diff(v) != 0) | (np.diff(g) != 0)])
    block = np.cumsum(first) - 1
    rights, wrongs = np.bincount(block, t), np.bincount(block, ~t)
    of = g[first]  # the problem of each block
    wrong_of, right_of = np.bincount(of, wrongs), np.bincount(of, rights)
    earlier = np.cumsum(wrong_of) - wrong_of
    below = np.cumsum(wrongs) - wrongs - earlier[of]
    pairs = float(right_of @ wrong_of)
    if pairs == 0:
        raise InputError.of(
            "right",
            expected="right and wrong answers" + (" to the same problem" if groups is not None else ""),
            got=f"{int(truth.sum())} right of {len(truth)}",
            remedy="Calibrate on problems that are sometimes answered right and sometimes wrong.",
        )
    return float(rights @ (below + 0.5 * wrongs)) / pairs


def brier(probabilities: ArrayLike, right: ArrayLike) -> float:
    """The Brier score: the mean of `(probability − right)²`.

    Args:
        probabilities: `[N]`, in [0, 1], that each is right.
        right: `[N]`, bool.

    Returns:
        In [0, 1]; smaller is better.

    Raises:
        InputError: If they are empty, not in [0, 1], or lengths differ.
    """
    values, truth = _checked(probabilities, right, probabilities=True)
    return float(np.mean((values - truth) ** 2))


def ece(probabilities: ArrayLike, right: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error, `Σ (n_b/N) |mean probability − share right|` over bins of equal mass.

    Equal probabilities are always in one bin (that of the middle of their ranks), so the order does not matter.

    Args:
        probabilities: `[N]`, in [0, 1].
        right: `[N]`, bool.
        bins: The number of bins.

    Returns:
        In [0, 1]; smaller is better.

    Raises:
        InputError: If they are empty, not in [0, 1], lengths differ, or there are no bins.
    """
    values, truth = _checked(probabilities, right, probabilities=True)
    bins = whole("bins", bins, "of bins", least=1)
    _, tied, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - sizes / 2  # in (0, N)
    of = np.minimum((middle * bins / len(values)).astype(int), bins - 1)[tied]
    gaps = np.bincount(of, values - truth)  # n_b times the difference
    return float(np.abs(gaps).sum() / len(values))


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
        metric: `auroc`, `brier`, `ece`, or another of `(scores, right)`. With groups, `auroc` compares within them.
        scores: `[N]`.
        right: `[N]`, bool.
        groups: `[N]`: resample whole groups (problems), whose samples are not independent. None: resample samples.
        level: The level of the interval, in (0, 1).
        draws: How many resamples. Those in which the metric has no value (all right) do not count.
        seed: The same seed gives the same interval.

    Returns:
        The figure and its interval.

    Raises:
        InputError: As the metric; also if most resamples have no value.
    """
    values, truth = _checked(scores, right)
    level, draws = share("level", level, 1.0), whole("draws", draws, "of resamples", least=1)
    units = np.arange(len(values)) if groups is None else np.unique(_same(groups, values), return_inverse=True)[1]
    order = np.argsort(units, kind="stable")
    sizes = np.bincount(units)
    starts = np.cumsum(sizes) - sizes
    by_group = groups is not None and metric is auroc
    rng, got = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        lengths = sizes[drawn]
        # A problem that is drawn twice is two problems.
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
            expected="data of which most resamples have right and wrong answers",
            got=f"{draws - len(got)} of {draws} resamples without",
            remedy="Use more problems.",
        )
    low, high = np.quantile(got, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def choose_vote(
    problems: Sequence[Sequence[Sample]],
    truths: Sequence[Hashable],
    how: How = "deepconf",
    *,
    score: TraceScore = "lowest_group",
    window: int | float = WINDOW,
    least: int = 20,
    least_problems: int = 5,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Choice:
    """Whether a calibration set supports a vote by confidence; plain majority if not.

    The vote is supported if the AUROC of right against wrong answers within problems is above ½ with its whole
    interval. Stopped samples and samples without an answer are left out of it; the latter are reported.

    Args:
        problems: The samples of each problem.
        truths: The right answer of each.
        how: The vote in question.
        score: The trace score of `"confidence"` and `"deepconf"`; the other ways have theirs.
        window: Tokens of its groups, or a share of the length.
        least: So many right, and so many wrong, there have to be, in problems that have both.
        least_problems: So many problems with both there have to be.
        level: The level of the interval.
        draws: The resamples, of whole problems.
        seed: Of the resamples.

    Returns:
        The choice and its reason.

    Raises:
        InputError: If the numbers of problems and truths differ, a truth is None, or a record is missing.
    """
    if len(problems) != len(truths) or not problems or any(truth is None for truth in truths):
        raise InputError.of(
            "truths",
            expected="one right answer for each of the problems, at least one problem and none of them None",
            got=f"{len(problems)} problems and {len(truths)} truths, {sum(t is None for t in truths)} of them None",
            remedy="Leave out problems whose answer is not known.",
        )
    by: Score = "self_certainty" if how == "borda" else "margin" if how == "margin" else score
    answered = [(i, s) for i, p in enumerate(problems) for s in p if not s.stopped and s.answer is not None]
    unanswered = sum(s.answer is None and not s.stopped for p in problems for s in p)
    of = np.array([i for i, _ in answered], np.intp)
    right = np.array([s.answer == truths[i] for i, s in answered], bool)
    rights, totals = (np.bincount(of, w, minlength=len(problems)) for w in (right, None))
    both = (rights > 0) & (rights < totals)
    n_right, n_wrong = int(rights[both].sum()), int((totals - rights)[both].sum())

    def choice(chosen: How, why: str, found: Interval | None = None, pooled: float | None = None) -> Choice:
        return Choice(chosen, by, why, found, pooled, n_right, n_wrong, unanswered)

    if how == "majority":
        return choice("majority", "majority was asked for; it needs no confidence")
    if min(n_right, n_wrong) < least or both.sum() < least_problems:
        return choice(
            "majority",
            f"too few to tell: {n_right} right and {n_wrong} wrong answers in {int(both.sum())} problems that have "
            f"both; it takes {least} of each in {least_problems}",
        )
    scores = sample_scores([s for _, s in answered], by, window=window)
    found = interval(auroc, scores, right, of, level=level, draws=draws, seed=seed)
    pooled = auroc(scores, right)
    figures = f"AUROC of {by} within problems is {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    if found.low > 0.5:
        return choice(how, f"{figures}: it tells right from wrong", found, pooled)
    reason = "right answers score lower than wrong ones" if found.high < 0.5 else "it cannot tell right from wrong"
    return choice("majority", f"{figures}: {reason}", found, pooled)


def _checked(
    scores: ArrayLike, right: ArrayLike, *, probabilities: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = numbers("probabilities" if probabilities else "scores", scores)
    if probabilities and ((values < 0) | (values > 1)).any():
        raise InputError.of(
            "probabilities",
            expected="values in [0, 1]",
            got=f"from {values.min()} to {values.max()}",
            remedy="A confidence in nats is no probability; fit one first.",
        )
    truth = np.asarray(right)
    if truth.shape != values.shape or not (truth.dtype == bool or np.isin(truth, (0, 1)).all()):
        raise InputError.of(
            "right",
            expected=f"{len(values)} booleans, one per score",
            got=f"shape {list(truth.shape)}, {truth.dtype}",
            remedy="Pass whether each answer is right.",
        )
    return values, truth.astype(bool)


def _same(groups: ArrayLike, values: NDArray[np.float64]) -> NDArray[np.generic]:
    array = np.asarray(groups)
    if array.shape != values.shape:
        raise InputError.of(
            "groups",
            expected=f"{len(values)}, one per score",
            got=f"shape {list(array.shape)}",
            remedy="Pass the problem's number for each.",
        )
    return array
