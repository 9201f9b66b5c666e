"""How sure a model was while it wrote: confidence per token, per window and per trace, and what it filters (DeepConf).

After "Deep Think with Confidence" (Fu et al. 2025, arXiv 2508.15260) and self-certainty (Kang et al. 2025, 2502.18581).
All confidences are in nats, and **larger is more confident**: both measure how far the next-token distribution is from
spread out, by the log-probabilities of tokens that were *not* likely.

Here a trace is finished; `stopping` has the same while it is written, with the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import numbers, share, whole

__all__ = [
    "FINITE",
    "WINDOW",
    "TraceScore",
    "TraceScores",
    "group_confidence",
    "keep_top",
    "self_certainty",
    "threshold_of",
    "token_confidence",
    "trace_scores",
]

WINDOW = 2048
"""Tokens of a group, as in the paper."""

FINITE = "Confidences come from the distribution before truncation, where no token is at −inf."
"""The remedy for a confidence that is not finite."""

TraceScore = Literal["mean", "lowest_group", "bottom_groups", "tail"]


@dataclass(frozen=True)
class TraceScores:
    """The scores of one trace, in nats; larger is more confident.

    Attributes:
        mean: Over all tokens.
        lowest_group: The smallest group confidence.
        bottom_groups: The mean of the lowest tenth of the group confidences, at least of one.
        tail: The mean over the last window.
    """

    mean: float
    lowest_group: float
    bottom_groups: float
    tail: float


def token_confidence(log_probs: ArrayLike, k: int = 20) -> NDArray[np.float64]:
    """DeepConf's token confidence `C_t = −mean(log p of the k likeliest tokens)`.

    Args:
        log_probs: `[T, N ≥ k]`, log-probabilities in nats of at least the k likeliest tokens, in any order; of the
            distribution before truncation, where no token is at −inf.
        k: How many tokens.

    Returns:
        `[T]`, in nats.

    Raises:
        InputError: If there are fewer than k columns, or the k likeliest are not all finite and at most 0.
    """
    rows = np.asarray(log_probs, np.float64)
    if rows.ndim != 2 or not 1 <= k <= rows.shape[-1] or not rows.shape[0]:
        raise InputError.of(
            "log_probs",
            expected=f"[T, N] with T at least 1 and N at least k={k}",
            got=f"shape {list(rows.shape)}",
            remedy="Record the log-probabilities of the k likeliest tokens at every position.",
        )
    top = np.partition(rows, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :]
    _refuse_log_probs(top)
    return -top.mean(1)


def self_certainty(log_probs: ArrayLike) -> float:
    """Self-certainty: the mean over the text of `KL(uniform ‖ p) = −(1/V) Σ log(V p)`.

    Args:
        log_probs: `[T, V]`, log-probabilities in nats of the whole vocabulary.

    Returns:
        At least 0, in nats; larger is more certain.

    Raises:
        InputError: If it is empty, or not all finite and at most 0.
    """
    rows = np.asarray(log_probs, np.float64)
    if rows.ndim != 2 or not rows.size:
        raise InputError.of(
            "log_probs", expected="[T, V], not empty", got=f"shape {list(rows.shape)}", remedy="Pass one row per token."
        )
    _refuse_log_probs(rows)
    return float(-(rows.mean(1) + math.log(rows.shape[1])).mean())


def group_confidence(confidences: ArrayLike, window: int | float = WINDOW) -> NDArray[np.float64]:
    """Mean confidence of every window of neighbouring tokens.

    Args:
        confidences: `[T]`, in nats.
        window: Tokens of a group W; or, for short answers, a share of the length in (0, 1). A trace that is shorter
            than the window is one group.

    Returns:
        `[max(1, T − W + 1)]`, in the order of the text.

    Raises:
        InputError: If confidences are empty or not finite, or the window is neither.
    """
    values = numbers("confidences", confidences, remedy=FINITE)
    width = min(_window(window, len(values)), len(values))
    # Prefix sums in the order of the text, as a tracker that sees one token at a time adds them up.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[width:] - sums[:-width]) / width


def trace_scores(confidences: ArrayLike, window: int | float = WINDOW) -> TraceScores:
    """All four scores of one trace.

    Args:
        confidences: `[T]`, in nats.
        window: As in `group_confidence`.

    Returns:
        The scores.

    Raises:
        InputError: As `group_confidence`.
    """
    groups = group_confidence(confidences, window)
    bottom = np.sort(groups)[: max(1, len(groups) // 10)]
    return TraceScores(
        mean=float(np.mean(np.asarray(confidences, np.float64))),
        lowest_group=float(groups.min()),
        bottom_groups=float(bottom.mean()),
        tail=float(groups[-1]),
    )


def threshold_of(scores: ArrayLike, eta: float) -> float:
    """The (100 − η)-th percentile, interpolated linearly: what a trace has to reach to be among the top η %.

    Args:
        scores: `[N]`, one per trace.
        eta: η in (0, 100]: 10 is strict, 90 lenient, 100 keeps all.

    Returns:
        The threshold.

    Raises:
        InputError: If scores are empty or not finite, or η is out of its range.
    """
    return float(np.percentile(numbers("scores", scores, remedy=FINITE), 100.0 - share("eta", eta, 100.0)))


def keep_top(scores: ArrayLike, eta: float) -> NDArray[np.bool_]:
    """DeepConf's filter: the top η % of the traces; what ties with the threshold is kept.

    At least one trace is kept, and a larger η keeps all that a smaller one does.

    Args:
        scores: `[N]`, one per trace.
        eta: η in (0, 100].

    Returns:
        `[N]`, whether each is kept.

    Raises:
        InputError: As `threshold_of`.
    """
    values = numbers("scores", scores, remedy=FINITE)
    return values >= threshold_of(values, eta)


def _refuse_log_probs(rows: NDArray[np.float64]) -> None:
    # Rounding may leave a certain token a little above 0.
    if not np.isfinite(rows).all() or (rows > 1e-3).any():
        raise InputError.of(
            "log_probs",
            expected="log-probabilities in nats: finite, at most 0",
            got=f"values from {rows.min()} to {rows.max()}",
            remedy="Pass log_softmax of the distribution before truncation.",
        )


def _window(window: Any, length: int) -> int:
    if isinstance(window, float) and 0 < window < 1:
        return max(1, round(window * length))
    return whole("window", window, "of tokens, or a share of the length in (0, 1) of a finished trace", least=1)
