"""Can a confidence tell right from wrong? AUROC, Brier, ECE with intervals; and the choice of a vote that follows.

A vote compares samples of one problem. So what counts for it is whether, *within* a problem, right answers score higher
than wrong ones. Over all problems together a confidence may look good because it knows which problems are hard, and
still be of no use to a vote; `choose_vote` therefore looks at pairs of the same problem only, and resamples problems.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import numbers, whole

__all__ = ["auroc", "brier", "ece"]


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
