"""Does a confidence tell right from wrong, and which vote follows?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval, interval
from proxytune.stats.calibration import auroc
from proxytune.voting.confidence import WINDOW, TraceScore
from proxytune.voting.vote import How, Sample, Score, sample_scores

__all__ = ["Choice", "choose_vote"]


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
