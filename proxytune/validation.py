"""Which prefixes of token ids were seen before, exactly, and how much of another one that covers.

A trie in one dictionary, from (node, token) to node. Hashes of whole prefixes would be smaller, but a collision would
pass for a text that was seen; a set of all prefixes is quadratic in the length. Here each node is a token that was new.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError, ProxytuneError

__all__ = [
    "Ids",
    "finite",
    "not_finite",
    "numbers",
    "proper_share",
    "refuse_seed",
    "share",
    "token_ids",
    "validate_alpha",
    "whole",
]

Ids = Sequence[int] | bytes

_WIDTHS = (1, 2, 4, 8)


def token_ids(key: Ids, length: int | None = None) -> list[int]:
    """Token ids as Python's own ints, whatever they came in; a tensor's elements would not be found again.

    Args:
        key: A sequence of ints, or `bytes` of `length` equally wide ints in the machine's byte order.
        length: How many tokens; needed for bytes. Of a sequence the first `length`, all if None.

    Returns:
        `[length]`, or fewer if there are fewer.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(key, bytes):
        if length is None or (length and len(key) / length not in _WIDTHS) or (not length and key):
            raise InputError.of(
                "prefix",
                expected="bytes of `length` ints, each 1, 2, 4 or 8 bytes wide",
                got=f"{len(key)} bytes and length={length}",
                remedy="Pass the ids as a sequence of ints, or the number of tokens with their bytes.",
            )
        width = len(key) // length if length else 1
        return [int.from_bytes(key[i : i + width], sys.byteorder) for i in range(0, len(key), width)]
    try:
        ids = [operator.index(token) for token in key]
    except TypeError:
        ids = [-1]
    if any(token < 0 for token in ids):
        raise InputError.of(
            "prefix",
            expected="token ids (ints, at least 0), or the name of a tree node (a str or an int)",
            got=repr(key)[:80],
            remedy="Pass e.g. input_ids[0].tolist(), without padding.",
        )
    return ids if length is None else ids[:length]


def whole(name: str, value: Any, what: str = "of tokens", *, least: int = 0) -> int:
    """Check that a value is a whole number.

    Args:
        name: The argument.
        value: Its value.
        what: What it counts, after "a whole number".
        least: The smallest that is right.

    Returns:
        An int.

    Raises:
        InputError: If it is not.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    # True is an int to Python, and no number of tokens.
    if number is None or isinstance(value, bool) or number < least:
        raise InputError.of(
            name, expected=f"a whole number {what}, at least {least}", got=repr(value), remedy="Pass an int."
        )
    return number


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


def validate_alpha(alpha: object) -> float:
    """Check that α is a finite number.

    Args:
        alpha: The strength of the shift. Any finite real number; negative values steer away from the expert.

    Returns:
        α as a float.

    Raises:
        InputError: If α is NaN, infinite, or no real number.
    """
    value = math.nan
    if isinstance(alpha, Real) and not isinstance(alpha, bool):  # NumPy's scalars are Real too
        with contextlib.suppress(OverflowError):  # an int beyond the range of floats
            value = float(alpha)
    if not math.isfinite(value):
        raise InputError.of(
            "alpha",
            expected="a finite number (0 is the base, 1 the full shift)",
            got=repr(alpha),
            remedy="Pass e.g. alpha=1.0.",
        )
    return value


def numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Check that values are finite numbers, at least one.

    Args:
        name: What they are.
        values: `[N]`.

    Returns:
        `[N]`, float64.

    Raises:
        InputError: If they are not `[N]` numbers, if there is none, or one is NaN or infinite.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size:
        raise InputError.of(
            name,
            expected="a sequence of numbers, not empty",
            got=f"shape {list(array.shape)}" if array.ndim != 1 else repr(values)[:80],
            remedy="Pass one number for each.",
        )
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise not_finite(name, f"{array[at]} at {at}")
    return array


def not_finite(name: str, got: str) -> ProxytuneError:
    """The error for a NaN or an infinity.

    Args:
        name: What is not finite.
        got: What it is.

    Returns:
        An `InputError`.
    """
    return InputError.of(
        name,
        expected="finite numbers",
        got=got,
        remedy="Confidences come from the distribution before truncation, where no token is at −inf.",
    )


def share(name: str, value: Any, most: float) -> float:
    """Check that a value is a positive number up to a limit.

    Args:
        name: The setting.
        value: Its value.
        most: The limit, e.g. 100 for percent.

    Returns:
        A float.

    Raises:
        InputError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise InputError.of(
            name, expected=f"a number in (0, {most:g}]", got=repr(value), remedy=f"The largest is {most:g}."
        )
    return float(value)


def refuse_seed(seed: object, loop: str) -> None:
    """Refuse what is no key.

    Args:
        seed: What was given; None is for a new one in each call.
        loop: The name of what it was given to, for the message.

    Raises:
        InputError: If it is no whole number of 64 bits.
    """
    whole = isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 1 << 63
    if seed is not None and not whole:
        raise InputError.of(
            "seed",
            expected="a whole number of 64 bits, or None",
            got=repr(seed),
            remedy=f"Pass e.g. {loop}(seed=0).",
        )
