"""What a calibration run finds: the threshold above which a given share of entropies lies, and how it is written down.

Needs no torch, so that a recipe can be read without it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from proxytune.errors import InputError

__all__ = ["MEASURES", "ForkCalibration", "Measure", "as_values", "finite", "proper_share", "share_threshold"]

Measure = Literal["raw", "scaled", "truncated"]
"""Of what the entropy is: the combined logits; these at the sampling temperature; these after top-k, top-p, min-p."""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class ForkCalibration:
    """What a calibration run found, as the recipe keeps it.

    Attributes:
        share: The share of tokens that were to be forks, in (0, 1).
        nats: The entropy h above which a token is one; finite.
        tokens: How many tokens it was measured on.
        temperature: At which they were sampled; None for given texts.
        measure: Of what the entropy was taken.
        alpha: The α of the shift at that time; None if it was not noted, or there was none.

    Raises:
        InputError: If a value is out of its range.
    """

    share: float
    nats: float
    tokens: int
    temperature: float | None = None
    measure: Measure = "raw"
    alpha: float | None = None

    def __post_init__(self) -> None:
        proper_share(self.share)
        finite("nats", self.nats)
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise InputError.of(
                "tokens", expected="a whole number ≥ 1", got=repr(self.tokens), remedy="Calibrate on some text."
            )
        if self.temperature is not None:
            finite("temperature", self.temperature, positive=True)
        if self.measure not in MEASURES:
            raise InputError.of(
                "measure", expected=" or ".join(map(repr, MEASURES)), got=repr(self.measure), remedy="Use one of these."
            )
        if self.alpha is not None:
            finite("alpha", self.alpha)


def share_threshold(entropies: Any, share: float) -> tuple[float, float]:
    """The threshold above which a given share of values lies, or as nearly as their ties allow.

    Args:
        entropies: Values of any shape, nats: a tensor, an array or a sequence; finite.
        share: The share that is to lie above, in (0, 1).

    Returns:
        The threshold h, nats, midway between two values so that rounding moves no token across it; and the share of
        the values above it. h is negative where all values have to be above it and some are 0.

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
    cut = int(cuts[np.flatnonzero(distance == distance.min())[-1]])  # the fewer forks of two that are as near
    if cut == n:
        h = float(values[-1])
    elif cut == 0:
        h = float(values[0]) / 2 or -1.0
    else:
        low, high = float(values[cut - 1]), float(values[cut])
        h = float(np.float32((low + high) / 2))  # what entropies are compared in
        h = h if low <= h < high else low
    return h, (n - cut) / n


def as_values(entropies: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Entropies as a flat array.

    Args:
        entropies: A tensor on any device, an array, or a sequence of numbers; any shape.

    Returns:
        `[n]`, float64.
    """
    if hasattr(entropies, "detach"):  # a tensor; bfloat16 has no counterpart in numpy
        entropies = entropies.detach().double().cpu().numpy()
    return np.asarray(entropies, dtype=np.float64).ravel()


def finite(name: str, value: Any, *, positive: bool = False) -> float:
    """Check a setting.

    Args:
        name: Its name, for the message.
        value: What was given.
        positive: Whether it has to be above 0.

    Returns:
        The value as a float.

    Raises:
        InputError: If it is no finite number, or not above 0.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int beyond the range of floats
            number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise InputError.of(
            name, expected="a finite number" + (" > 0" if positive else ""), got=repr(value), remedy="Correct it."
        )
    return number


def proper_share(share: Any) -> float:
    """Check a share of tokens.

    Args:
        share: What was given.

    Returns:
        The share as a float.

    Raises:
        InputError: If it does not lie between 0 and 1, both excluded.
    """
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) < 1:
        raise InputError.of(
            "share",
            expected="a number between 0 and 1, both excluded",
            got=repr(share),
            remedy="Pass e.g. 0.2 for a fifth of the tokens.",
        )
    return float(share)
