"""Small arrays: NumPy's on the CPU, where a call costs a third of torch's, and torch's elsewhere.

Code on both kinds uses operators, indexing, `sum`, `any` and these functions. Columns are along axis 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "Array", "as_float", "as_long", "as_tensor", "at_least", "clone", "columns_of_largest", "count_up", "exp", "filled",
    "joined", "largest", "log", "log_sum_exp", "peak", "take", "where",
]  # fmt: skip

Array = Any
"""A `torch.Tensor` or a NumPy array."""


def as_tensor(x: Array) -> torch.Tensor:
    """A tensor on the array's memory if that is in order, else on a copy."""
    return torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x


def exp(x: Array) -> Array:
    """`e^x`."""
    return np.exp(x) if isinstance(x, np.ndarray) else x.exp()


def log(x: Array) -> Array:
    """`ln x`."""
    return np.log(x) if isinstance(x, np.ndarray) else x.log()


def at_least(x: Array, low: float) -> Array:
    """`max(x, low)`; NaN stays."""
    return np.maximum(x, low) if isinstance(x, np.ndarray) else x.clamp(min=low)


def where(condition: Array, x: Array, other: Array) -> Array:
    """`x` where the condition holds, else `other`."""
    return np.where(condition, x, other) if isinstance(condition, np.ndarray) else torch.where(condition, x, other)


def filled(x: Array, mask: Array, value: float) -> Array:
    """`x` with `value` where `mask`."""
    if isinstance(x, np.ndarray):
        return np.where(mask, x.dtype.type(value), x)
    return x.masked_fill(mask, value)


def joined(parts: Sequence[Array], axis: int) -> Array:
    """Arrays one after the other."""
    return np.concatenate(parts, axis) if isinstance(parts[0], np.ndarray) else torch.cat(list(parts), axis)


def peak(x: Array) -> Array:
    """The maximum over the last axis; NaN if there is one."""
    return x.max(-1) if isinstance(x, np.ndarray) else x.amax(-1)


def as_float(x: Array) -> Array:
    """In float32."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def as_long(x: Array) -> Array:
    """In int64."""
    return x.astype(np.int64) if isinstance(x, np.ndarray) else x.long()


def clone(x: Array) -> Array:
    """The same on memory of its own."""
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def take(x: Array, index: Array) -> Array:
    """From each row of `[B, N]` its columns `index`, `[B, n]`."""
    if not isinstance(x, np.ndarray):
        return x.gather(1, index)
    return x[0][index] if len(x) == 1 else x[np.arange(len(x))[:, None], index]


def count_up(count: int, like: Array) -> Array:
    """0, 1, 2, …, `[count]`, int64, of the kind and on the device of `like`."""
    return np.arange(count) if isinstance(like, np.ndarray) else torch.arange(count, device=like.device)


def log_sum_exp(x: Array) -> Array:
    """`log Σ e^x` of each row, `[B]`."""
    if not isinstance(x, np.ndarray):
        return x.logsumexp(1)
    if not x.shape[1]:
        return np.full(len(x), -np.inf, np.float32)
    top = np.maximum(x.max(1, keepdims=True), np.finfo(np.float32).min)
    return (np.log(np.exp(x - top).sum(1, dtype=np.float64)) + top[:, 0]).astype(np.float32)


def largest(keys: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of `[B, n]` and their columns, `[B, count]`, falling; −inf where there are fewer columns.

    The first of equal ones, if it is one, as in the kernel.
    """
    if isinstance(keys, np.ndarray):
        if count == 1 and keys.shape[1]:
            index = keys.argmax(1)[:, None]
            return take(keys, index), index
        missing = count - keys.shape[1]
        if missing > 0:
            keys = np.pad(keys, ((0, 0), (0, missing)), constant_values=-np.inf)
        index = np.argsort(-keys, 1, kind="stable")[:, :count]
        return take(keys, index), index
    missing = count - keys.shape[1]
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing), value=-torch.inf)
    return keys.max(1, keepdim=True) if count == 1 else keys.topk(count, dim=1)


def columns_of_largest(x: Array, count: int) -> Array:
    """The columns of each row's `count` largest of a NumPy array `[B, n]`, rising; the first of equal ones."""
    # np.argpartition takes 7 to 17 times as long where most values are equal, as in masked rows; a sort does not.
    least = np.fmin(np.sort(x, 1)[:, -count, None], np.inf)
    found = ~(x <= least)  # NaN too, which a sort takes for the largest
    found |= (x == least) & ((x == least).cumsum(1) <= count - found.sum(1, keepdims=True))
    found &= found.cumsum(1) <= count
    return found.nonzero()[1].reshape(len(x), count)
