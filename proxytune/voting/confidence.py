"""Confidence of finished traces, per token, window and trace, and DeepConf's filter.

After "Deep Think with Confidence" (Fu et al. 2025, arXiv 2508.15260) and self-certainty (Kang et al. 2025, 2502.18581).
All confidences are in nats and **larger is more confident**: they grow as tokens that were *not* likely lose
probability. `proxytune.voting.stopping` computes the same numbers while a trace is written.
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
"""Tokens per group, as in the paper."""

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
    """DeepConf's token confidence `C_t = −mean(log p of the k most likely tokens)`, `[T]`, nats.

    Args:
        log_probs: `[T, N ≥ k]`, nats, of at least the k most likely tokens in any order; before truncation, so that
            none is −inf.
        k: How many tokens.

    Raises:
        InputError: If there are fewer than k columns, or the k most likely are not all finite and ≤ 0.
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
    """Self-certainty: the mean over the text of `KL(uniform ‖ p) = −(1/V) Σ log(V p)`, nats, ≥ 0.

    `log_probs` is `[T, V]`, over the whole vocabulary; InputError if it is empty, or not all finite and ≤ 0.
    """
    rows = np.asarray(log_probs, np.float64)
    if rows.ndim != 2 or not rows.size:
        raise InputError.of(
            "log_probs", expected="[T, V], not empty", got=f"shape {list(rows.shape)}", remedy="Pass one row per token."
        )
    _refuse_log_probs(rows)
    return float(-(rows.mean(1) + math.log(rows.shape[1])).mean())


def group_confidence(confidences: ArrayLike, window: int | float = WINDOW) -> NDArray[np.float64]:
    """Mean confidence of every window of W neighbouring tokens: `[max(1, T − W + 1)]`, in the order of the text.

    Args:
        confidences: `[T]`, nats.
        window: Tokens per group W; or, for short answers, a share of the length in (0, 1). A shorter trace is one
            group.

    Raises:
        InputError: If confidences are empty or not finite, or the window is neither.
    """
    values = numbers("confidences", confidences, remedy=FINITE)
    width = min(_window(window, len(values)), len(values))
    # Prefix sums in the order of the text, so that `ConfidenceTracker` gets the same numbers token by token.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[width:] - sums[:-width]) / width


def trace_scores(confidences: ArrayLike, window: int | float = WINDOW) -> TraceScores:
    """All four scores of a trace with confidences `[T]` in nats; window and InputError as in `group_confidence`."""
    groups = group_confidence(confidences, window)
    bottom = np.sort(groups)[: max(1, len(groups) // 10)]
    return TraceScores(
        mean=float(np.mean(np.asarray(confidences, np.float64))),
        lowest_group=float(groups.min()),
        bottom_groups=float(bottom.mean()),
        tail=float(groups[-1]),
    )


def threshold_of(scores: ArrayLike, eta: float) -> float:
    """The (100 − η)-th percentile of the scores, linearly interpolated: what the top η % of traces reach.

    η is in (0, 100]: 10 is strict, 90 lenient, 100 keeps all. InputError if scores are empty or not finite, or η is out
    of range.
    """
    return float(np.percentile(numbers("scores", scores, remedy=FINITE), 100.0 - share("eta", eta, 100.0)))


def keep_top(scores: ArrayLike, eta: float) -> NDArray[np.bool_]:
    """DeepConf's filter: whether each trace is among the top η %; ties with the threshold are kept.

    At least one trace is kept, and a larger η keeps all that a smaller one does. InputError as `threshold_of`.
    """
    values = numbers("scores", scores, remedy=FINITE)
    return values >= threshold_of(values, eta)


def _refuse_log_probs(rows: NDArray[np.float64]) -> None:
    # Rounding may put the log-probability of a certain token slightly above 0; a mask may be a finite number.
    if not np.isfinite(rows).all() or (rows > 1e-3).any() or (rows < -5000).any():
        raise InputError.of(
            "log_probs",
            expected="log-probabilities in nats: finite, at most 0, and no mask (finfo.min, or less than −5000)",
            got=f"values from {rows.min()} to {rows.max()}",
            remedy="Pass log_softmax of the distribution before truncation.",
        )


def _window(window: Any, length: int) -> int:
    if isinstance(window, float) and 0 < window < 1:
        return max(1, round(window * length))
    return whole("window", window, "of tokens, or a share of the length in (0, 1) of a finished trace", least=1)
