"""Spread: how much the samples of a prompt differ in their grades and answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from proxytune.diagnostics.coverage_curves import chance
from proxytune.diagnostics.prompts import (
    Finding,
    Resamples,
    counts,
    graded,
    prompts_of,
    refuse_single,
    refuse_weighted,
    said,
)
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace
from proxytune.validation import whole

__all__ = ["Spread", "spread"]


@dataclass(frozen=True, kw_only=True)
class Spread(Finding):
    """Variance across the samples of a prompt, mean over prompts.

    Attributes:
        samples: k, the number of samples that the three shares are of: they grow smaller with more.
        variance: Of the grade, without bias: 0 for a prompt that is always right or always wrong, at most 1/4.
        without: The chance that k samples of a prompt have one grade.
        all_right: That they are all right.
        all_wrong: That they are all wrong.
        disagreement: The chance that two samples have different answers; None if no text has an answer.
    """

    samples: int
    variance: Interval
    without: Interval
    all_right: Interval
    all_wrong: Interval
    disagreement: Interval | None


def spread(
    trace: Trace, samples: int | None = None, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Spread:
    """Cross-sample variance per prompt, and the share of prompts without any.

    A prompt whose samples are all right, or all wrong, teaches nothing to training that compares samples of a prompt
    (GRPO: the advantage of each is 0), and a vote over it changes nothing.

    Args:
        trace: The run, graded; independent samples of each prompt.
        samples: k, e.g. the group size of a training. None: the fewest that a prompt has.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If a text has no grade, samples depend on each other, a prompt has one text only or fewer than k, or
            there are fewer than five prompts.
    """
    what = "spread"
    prompts = prompts_of(trace, what)
    refuse_weighted(trace, prompts, what, "Draw independent samples.")
    refuse_single(prompts, what)
    k = fewest = min(map(len, prompts))
    if samples is not None:
        remedy = f"Draw more samples: a prompt has {fewest}."
        k = whole("samples", samples, "of samples", least=2, most=fewest, remedy=remedy)
    rights = graded(prompts, what)
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    wrong = np.array([1 - chance(row > 0, None, k) for row in rights])
    right = np.array([1 - chance(row == 0, None, k) for row in rights])
    without = resamples.share(wrong + right)
    answered = any(text.answer is not None for texts in prompts for text in texts)
    pairs = [[text.answer for text in texts] for texts in prompts]
    return Spread(
        says=(
            f"With {k} samples each, {said(without, percent=True)} of the prompts have no variance: all are "
            "right, or all are wrong."
        ),
        **counts(prompts),
        samples=k,
        variance=resamples.share([row.var(ddof=1) for row in rights], most=0.25),
        without=without,
        all_right=resamples.share(right),
        all_wrong=resamples.share(wrong),
        disagreement=resamples.share([_apart(row) for row in pairs]) if answered else None,
    )


def _apart(answers: list[str | None]) -> float:
    """The share of pairs that differ."""
    count = len(answers)
    same = sum(answers.count(one) - 1 for one in answers)
    return 1 - same / (count * (count - 1))
