"""Whether a confidence tells right from wrong on a calibration set, and which vote follows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval, interval
from proxytune.stats.calibration import auroc
from proxytune.voting.confidence import WINDOW, TraceScore
from proxytune.voting.vote import How, Sample, Score, refuse_other, sample_scores

__all__ = ["Choice", "choose_vote"]


@dataclass(frozen=True)
class Choice:
    """The way to vote, and the evidence for it.

    Attributes:
        how: The `how` of `vote`.
        score: The score that vote and calibration use.
        why: The reason, with the figures.
        auroc: AUROC within problems, with its interval; None if there were too few answers to tell.
        pooled: AUROC over all answers together, for comparison; None likewise.
        right: Right answers in problems that also have wrong ones; `wrong` likewise.
        unanswered: Samples without an answer, counted as neither.
    """

    how: How
    score: Score
    why: str
    auroc: Interval | None
    pooled: float | None
    right: int
    wrong: int
    unanswered: int


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
    """The vote in question (`how`) if a calibration set supports it, else plain majority.

    It is supported if the AUROC of right against wrong answers within problems has an interval wholly above ½. Stopped
    samples and samples without an answer are left out; the latter are reported.

    Args:
        problems: The samples of each problem.
        truths: The right answer to each.
        how: The vote in question.
        score: The trace score of `"confidence"` and `"deepconf"`; the other votes have their own.
        window: Tokens per group, or a share of the length.
        least: Minimum number of right, and of wrong, answers in problems that have both.
        least_problems: Minimum number of problems that have both.
        level: Confidence level of the interval.
        draws: Number of resamples, of whole problems.
        seed: Seed of the resamples.

    Raises:
        InputError: If the numbers of problems and truths differ, a truth is None, a problem has something else than
            samples, or a record is missing.
    """
    if len(problems) != len(truths) or not problems or any(truth is None for truth in truths):
        raise InputError.of(
            "truths",
            expected="at least one problem, and one right answer other than None for each",
            got=f"{len(problems)} problems and {len(truths)} truths, {sum(t is None for t in truths)} of them None",
            remedy="Leave out problems whose right answer is unknown.",
        )
    for number, samples in enumerate(problems):
        refuse_other(samples, f"the samples of problem {number}")
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
