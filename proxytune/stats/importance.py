"""What a sample weighs: by its rank, or by how a tree drew it; and expectations under such weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.methods.trees.frontier import log_importance
from proxytune.voting.confidence import numbers

__all__ = ["borda_points", "kool_log_weights", "weighted_mean"]


def borda_points(scores: ArrayLike, power: float = 0.5) -> NDArray[np.float64]:
    """Borda votes `(N − r + 1)^p` by rank r, the largest score first; equal scores share their ranks' votes equally.

    Args:
        scores: `[N]`.
        power: p ≥ 0.

    Returns:
        `[N]`.

    Raises:
        InputError: If scores are empty or not finite, or p is negative or not finite.
    """
    values = numbers("scores", scores)
    if numbers("power", [power])[0] < 0:
        raise InputError.of(
            "power", expected="at least 0", got=f"{power}", remedy="0 is the majority, 0.5 the default."
        )
    _, tied, sizes = np.unique(values, return_inverse=True, return_counts=True)
    points = np.arange(1, len(values) + 1, dtype=np.float64) ** power  # of the lowest first
    ends = np.cumsum(sizes)
    means = np.array([math.fsum(points[e - n : e]) / n for e, n in zip(ends, sizes, strict=True)])
    return means[tied]


def kool_log_weights(log_p: ArrayLike, kappa: ArrayLike) -> NDArray[np.float64]:
    """`log w`, w = p / (1 − exp(−exp(log p − κ))): weights of samples drawn without replacement by Gumbel-top-k.

    After Kool et al. 2019 (arXiv 1903.06059). A sample's w is multiplied down the tree, so log-weights add up; exp() of
    them is `Sample.weight`. For p far below exp(κ), w is exp(κ): also where p itself underflows, this is exact.

    Args:
        log_p: `[N]`, log-probabilities of the k drawn, at most 0.
        kappa: κ, the (k+1)-th largest perturbed log-probability, one or `[N]`; −inf if there was none: then w = p.

    Returns:
        `[N]`, float64.

    Raises:
        InputError: If log-probabilities are not finite or above 0, or κ is NaN or +inf.
    """
    values = numbers("log_p", log_p)
    limit = np.asarray(kappa, np.float64)
    if (values > 1e-6).any():
        raise InputError.of(
            "log_p", expected="at most 0", got=f"{values.max()}", remedy="Pass log-probabilities, not probabilities."
        )
    if np.isnan(limit).any() or (limit == np.inf).any() or limit.shape not in ((), values.shape):
        raise InputError.of(
            "kappa",
            expected=f"one number or {len(values)}, finite or −inf",
            got=repr(kappa)[:80],
            remedy="Pass the (k+1)-th perturbed log-probability.",
        )
    pairs = zip(values.tolist(), np.broadcast_to(limit, values.shape).tolist(), strict=True)
    return np.array([log_importance(p, k) for p, k in pairs])


def weighted_mean(values: ArrayLike, log_weights: ArrayLike, *, normalised: bool = True) -> float:
    """The expectation of a function of samples with weights.

    Args:
        values: `[N]`, e.g. 1.0 where the answer is right.
        log_weights: `[N]`, e.g. of `kool_log_weights`.
        normalised: Whether to divide by the sum of the weights: a little biased, far less variable, and never outside
            the range of the values. Without, Kool's unbiased estimate `Σ w f`.

    Returns:
        The estimate.

    Raises:
        InputError: If either is empty or not finite, or their lengths differ.
    """
    f, logs = numbers("values", values), numbers("log_weights", log_weights)
    if f.shape != logs.shape:
        raise InputError.of(
            "log_weights", expected=f"{len(f)}, one per value", got=f"{len(logs)}", remedy="Pass as many."
        )
    top = float(logs.max())
    if not normalised and top > 700:
        raise InputError.of(
            "log_weights", expected="weights that a float can hold", got=f"exp({top})", remedy="Use normalised=True."
        )
    weights = np.exp(logs - top)  # the heaviest is 1: tiny weights do not underflow together
    total = math.fsum(weights * f)
    return total / math.fsum(weights) if normalised else total * math.exp(top)
