"""How well confidences tell right from wrong answers: AUROC, Brier score, expected calibration error.

A vote compares samples of one problem, so what counts for it is whether right answers score higher than wrong ones
*within* a problem. Over all problems together a confidence may look good only because it knows which problems are hard.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import numbers, whole

__all__ = ["auroc", "brier", "ece"]


def auroc(scores: ArrayLike, right: ArrayLike, groups: ArrayLike | None = None) -> float:
    """P(a right answer scores higher than a wrong one), ties counting ½; ½ is no signal.

    Args:
        scores: `[N]`; larger is more confident.
        right: `[N]`, bool.
        groups: `[N]`, the problem of each; only pairs within a problem are compared. None compares all pairs.

    Raises:
        InputError: If scores are empty or not finite, lengths differ, or there is no pair of right and wrong.
    """
    values, truth = _checked(scores, right)
    problem = (
        np.zeros(len(values), np.intp) if groups is None else np.unique(_same(groups, values), return_inverse=True)[1]
    )
    # Sort into blocks of equal score within a problem: a right answer beats the wrong ones in earlier blocks.
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
    """The Brier score: the mean of `(probability − right)²` over `[N]` answers, in [0, 1]; smaller is better.

    Raises:
        InputError: If they are empty, not in [0, 1], or lengths differ.
    """
    values, truth = _checked(probabilities, right, probabilities=True)
    return float(np.mean((values - truth) ** 2))


def ece(probabilities: ArrayLike, right: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error, `Σ (n_b/N) |mean probability − share right|` over bins of equal mass.

    In [0, 1]; smaller is better. Equal probabilities always share a bin (that of their middle rank), so the order does
    not matter.

    Raises:
        InputError: If probabilities are empty, not in [0, 1], lengths differ, or there are no bins.
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
            remedy="A confidence in nats is not a probability: fit probabilities to it first.",
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
