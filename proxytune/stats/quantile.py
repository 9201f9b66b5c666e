"""The threshold that a given share of values exceeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxytune.errors import InputError
from proxytune.validation import proper_share

__all__ = ["as_values", "share_threshold"]


def share_threshold(entropies: Any, share: float) -> tuple[float, float]:
    """The threshold that a share of the values, in (0, 1), exceeds; or the nearest share that ties allow.

    Returns:
        The threshold h, midway between two values so that rounding moves no token across it, and the share of the
        values above it. h is negative if all values must exceed it and some are 0.

    Raises:
        InputError: If there are no values, one is not finite or negative, or the share is not in (0, 1).
    """
    proper_share(share)
    values = np.sort(as_values(entropies))
    n = len(values)
    if not n:
        raise InputError.of("entropies", expected="some tokens", got="none", remedy="Calibrate on more text.")
    if not (np.isfinite(values[-1]) and values[0] >= 0):  # NaN is sorted to the end
        raise InputError.of(
            "entropies",
            expected="finite numbers ≥ 0, in nats",
            got=repr(float(values[-1] if values[0] >= 0 else values[0])),
            remedy="A row of logits with NaN or +inf has no entropy: see where the model makes them.",
        )
    # Cuts i: values[i:] are forks. Only where two neighbours differ, and at both ends.
    cuts = np.concatenate([[0], np.flatnonzero(values[1:] > values[:-1]) + 1, [n]])
    distance = np.abs((n - cuts) / n - share)
    cut = int(cuts[np.flatnonzero(distance == distance.min())[-1]])  # of two equally near shares, the smaller
    if cut == n:
        h = float(values[-1])
    elif cut == 0:
        h = float(values[0]) / 2 or -1.0
    else:
        low, high = float(values[cut - 1]), float(values[cut])
        h = float(np.float32((low + high) / 2))  # entropies are compared in float32
        h = h if low <= h < high else low
    return h, (n - cut) / n


def as_values(entropies: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A tensor on any device, an array or a sequence of numbers, of any shape, as a flat float64 array."""
    if hasattr(entropies, "detach"):  # a tensor; numpy has no bfloat16
        entropies = entropies.detach().double().cpu().numpy()
    return np.asarray(entropies, dtype=np.float64).ravel()
