"""Importance weights of samples drawn without replacement, and expectations under them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import numbers

__all__ = ["kool_log_weights", "log_importance", "normalised", "weighted_mean"]


def kool_log_weights(log_p: ArrayLike, kappa: ArrayLike) -> NDArray[np.float64]:
    """`log w` with w = p / (1 − exp(−exp(log p − κ))): weights of samples drawn without replacement by Gumbel-top-k.

    After Kool et al. 2019 (arXiv 1903.06059). Down a tree weights multiply, so log-weights add; `exp` of the sum is
    `Sample.weight`. For p far below exp(κ), w is exp(κ), which is exact even where p underflows.

    Args:
        log_p: `[N]`, log-probabilities of the k samples, finite and ≤ 0, else InputError.
        kappa: κ, the (k+1)-th largest perturbed log-probability, one or `[N]`; −inf if there was none (then w = p).
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
    """The expectation of a function of weighted samples.

    Args:
        values: `[N]`, e.g. 1.0 where the answer is right.
        log_weights: `[N]`, e.g. of `kool_log_weights`.
        normalised: Divide by the sum of the weights: slightly biased, far less variable, and never outside the range of
            the values. If False, Kool's unbiased estimate `Σ w f`.

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


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights `[N]` that sum to 1, from finite log-weights `[N]`, N ≥ 1, in nats."""
    top = max(log_weights)  # the heaviest is 1: tiny weights do not underflow together
    raw = [math.exp(w - top) for w in log_weights]
    total = sum(raw)
    return [w / total for w in raw]


def log_importance(logprob: float, kappa: float) -> float:
    """The log of a draw's importance weight, `p / (1 − exp(−exp(log p − κ)))` (Kool et al. 2019, 1903.06059, eq. 5).

    `logprob` is log p under the distribution drawn from; κ is the largest perturbed log-probability not drawn, −inf if
    nothing was left.
    """
    rate = logprob - kappa
    if rate > 4.0:  # certain to be drawn: exp(−exp(4)) is 2e-24
        return logprob
    if rate < -36.0:  # log(1 − exp(−e^rate)) = rate − e^rate/2 + …; also where e^rate underflows
        return kappa
    return logprob - math.log(-math.expm1(-math.exp(rate)))
