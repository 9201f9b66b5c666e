"""Checks of arguments: whole numbers, finite numbers, shares, arrays of numbers, token ids, seeds, choices.

Every check returns the value as Python's own type (or a NumPy array), or raises an `InputError` that says what was
expected, what came and what to do. NumPy scalars count as numbers, bools do not. Needs no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import operator
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError

__all__ = [
    "Ids",
    "TokenIds",
    "as_float",
    "as_int",
    "choice",
    "finite",
    "named_settings",
    "numbers",
    "proper_share",
    "refuse_seed",
    "share",
    "shown",
    "token_ids",
    "validate_alpha",
    "whole",
]

Ids = Sequence[int] | bytes
"""A text as token ids: a sequence of ints, or bytes of equally wide ints."""

TokenIds = int | Sequence[int]
"""One token id or several."""

_Value = TypeVar("_Value")

_WIDTHS = (1, 2, 4, 8)


def as_int(value: object) -> int | None:
    """A whole number as an int, or None.

    Ints, NumPy integer scalars and 0-dimensional integer tensors are whole numbers; bools, floats (2.0 too), strings
    and arrays of one element are not.
    """
    if type(value) is int:
        return value
    scalar: Any = value
    if isinstance(value, bool) or getattr(scalar, "ndim", 0) != 0 or str(getattr(scalar, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(scalar)
    except TypeError:
        return None


def as_float(value: object) -> float:
    """A real number as a float, maybe infinite; NaN for a bool, a string, a tensor or an int beyond float range."""
    if type(value) is float:
        return value
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's scalars are Real too
        with contextlib.suppress(OverflowError):
            return float(value)
    return math.nan


def shown(value: object, most: int | None = None) -> str:
    """A value's `repr` for a message, cut to `most` characters; its type where it has too many digits to be written."""
    try:
        text = repr(value)
    except ValueError:  # an int of too many digits
        return f"an {type(value).__name__} that cannot be shown"
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def whole(
    name: str,
    value: Any,
    what: str = "of tokens",
    *,
    least: int | None = 0,
    most: int | None = None,
    remedy: str = "Pass such a number.",
) -> int:
    """Check that a value is a whole number (see `as_int`) within its bounds.

    Args:
        name: The argument.
        value: Its value.
        what: What it counts, after "a whole number"; empty for nothing.
        least: The smallest allowed value; None for any.
        most: The largest allowed value; None for any. Needs `least`.
        remedy: What to do, for the message.
    """
    number = as_int(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        bounds = "" if least is None else f", at least {least}" if most is None else f", from {least} to {most}"
        raise InputError.of(
            name, expected=f"a whole number{what and ' '}{what}{bounds}", got=shown(value), remedy=remedy
        )
    return number


def finite(
    name: str,
    value: Any,
    what: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    remedy: str = "Pass such a number.",
) -> float:
    """Check that a value is a finite number (see `as_float`) within its bounds.

    Args:
        name: The argument.
        value: Its value.
        what: What it measures, after "a finite number", e.g. "of nats"; empty for nothing.
        least: The smallest allowed value; None for any.
        above: An exclusive lower bound.
        most: The largest allowed value; None for any. Needs `least` or `above`, like `below`.
        below: An exclusive upper bound.
        remedy: What to do, for the message.
    """
    number = as_float(value)
    if (
        not math.isfinite(number)
        or (least is not None and number < least)
        or (above is not None and number <= above)
        or (most is not None and number > most)
        or (below is not None and number >= below)
    ):
        low = f"[{least:g}" if least is not None else f"({above:g}" if above is not None else ""
        high = f"{most:g}]" if most is not None else f"{below:g})" if below is not None else ""
        if high:
            bounds = f" in {low}, {high}"
        else:
            bounds = f" ≥ {least:g}" if least is not None else f" > {above:g}" if above is not None else ""
        # A bounded range implies finite.
        kind = "a number" if high else "a finite number"
        raise InputError.of(name, expected=f"{kind}{what and ' '}{what}{bounds}", got=shown(value), remedy=remedy)
    return number


def share(name: str, value: Any, most: float = 1.0) -> float:
    """Check that a value is in (0, most], e.g. `most=100` for percent."""
    return finite(name, value, above=0.0, most=most, remedy=f"The largest is {most:g}.")


def proper_share(share: Any) -> float:
    """Check that a share of tokens is in (0, 1)."""
    return finite("share", share, above=0.0, below=1.0, remedy="Pass e.g. share=0.2 for a fifth of the tokens.")


def validate_alpha(alpha: object) -> float:
    """Check that α is a finite number; negative values steer away from the expert."""
    return finite("alpha", alpha, "(0 is the base, 1 the full shift)", remedy="Pass e.g. alpha=1.0.")


def numbers(
    name: str,
    values: ArrayLike,
    *,
    remedy: str = "See where the NaN or the infinity comes from, or leave that value out.",
) -> NDArray[np.float64]:
    """Check that values are a non-empty sequence `[N]` of finite numbers, and return them as float64.

    `remedy` is for the message about a value that is not finite.
    """
    try:
        array = np.asarray(values)
        # NumPy would parse strings as numbers.
        array = np.empty(0) if array.dtype.kind in "US" else array.astype(np.float64, copy=False)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size:
        raise InputError.of(
            name,
            expected="a sequence of numbers, not empty",
            got=f"shape {list(array.shape)}" if array.ndim != 1 else shown(values, 80),
            remedy="Pass one number for each.",
        )
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError.of(name, expected="finite numbers", got=f"{array[at]} at index {at}", remedy=remedy)
    return array


def token_ids(
    name: str,
    ids: TokenIds | bytes | None,
    what: str = "",
    *,
    length: int | None = None,
    single: bool = False,
    optional: bool = False,
    empty: bool = True,
) -> tuple[int, ...]:
    """Token ids as Python ints, whatever they came in: tensor elements hash by identity, so look-ups would miss them.

    Args:
        name: The argument.
        ids: A sequence of ints, or `bytes` of `length` equally wide ints in the machine's byte order.
        what: What is expected, for the message; by default token ids.
        length: How many tokens; needed for bytes. Of a sequence the first `length`, all if None.
        single: Whether one id by itself is allowed.
        optional: Whether None is allowed, for no ids.
        empty: Whether an empty sequence is allowed.
    """
    if isinstance(ids, bytes):
        return _of_bytes(name, ids, length)
    if ids is None and optional:
        return ()
    one = as_int(ids) if single else None
    try:
        given = list(ids) if one is None else [one]  # type: ignore[arg-type]
        out = tuple(map(operator.index, given))
    except TypeError:
        given, out = [], (-1,)
    if any(token < 0 for token in out) or not (out or empty) or any(isinstance(token, bool) for token in given):
        what = what or ("a token id or several" if single else "token ids")
        text = ids if isinstance(ids, str) else "</think>"
        raise InputError.of(
            name,
            expected=f"{what} (whole numbers, at least 0)",
            got=shown(ids, 80),
            remedy=f"Pass e.g. tokenizer.encode({shown(text, 40)}, add_special_tokens=False)."
            if single
            else "Pass e.g. input_ids[0].tolist(), without padding.",
        )
    return out if length is None else out[:length]


def _of_bytes(name: str, ids: bytes, length: int | None) -> tuple[int, ...]:
    if length is None or (length and len(ids) / length not in _WIDTHS) or (not length and ids):
        raise InputError.of(
            name,
            expected="bytes of `length` ints, each 1, 2, 4 or 8 bytes wide",
            got=f"{len(ids)} bytes and length={length}",
            remedy="Pass the ids as a sequence of ints, or the number of tokens with their bytes.",
        )
    width = len(ids) // length if length else 1
    return tuple(int.from_bytes(ids[i : i + width], sys.byteorder) for i in range(0, len(ids), width))


def refuse_seed(seed: object, loop: str) -> None:
    """Raise InputError unless a seed is None or a whole number of 64 bits; `loop` is named in the message."""
    number = as_int(seed)
    if seed is not None and (number is None or not -(1 << 63) <= number < 1 << 63):
        raise InputError.of(
            "seed",
            expected="a whole number of 64 bits, or None",
            got=shown(seed),
            remedy=f"Pass e.g. {loop}(seed=0).",
        )


def named_settings(cls: type[_Value]) -> type[_Value]:
    """A class decorator: an unknown keyword is an InputError with the nearest setting, not Python's TypeError."""
    make: Any = cls.__init__
    names = [name for name in inspect.signature(make).parameters if name != "self"]

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name, value in given.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise InputError.of(
                    name,
                    expected=f"a setting of {cls.__name__} ({', '.join(names)})",
                    got=f"{name}={shown(value, 80)}",
                    remedy=f"Did you mean {near[0]}?" if near else "Leave it out; settings of a call go to generate().",
                )
        make(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def choice(
    name: str, value: _Value, allowed: Sequence[str], otherwise: str = "", *, remedy: str = "Use one of these."
) -> _Value:
    """Check that a value is one of the `allowed` words.

    `otherwise` describes, for the message, another kind of value that the caller has already looked for, e.g. "a tuple
    of cycles". A near word replaces `remedy` in the message.
    """
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    *others, last = [*map(repr, allowed), *([otherwise] if otherwise else [])]
    raise InputError.of(
        name,
        expected=f"{', '.join(others)} or {last}" if others else last,
        got=shown(value, 80),
        remedy=f"Did you mean {near[0]!r}?" if near else remedy,
    )
