"""Philox-4x32-10, and uniform, exponential, Gumbel and normal variates from its words."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["exponential", "gumbel", "normal", "philox", "unit"]

_Array = np.ndarray[Any, Any]
_Words = TypeVar("_Words", torch.Tensor, _Array)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32-10: four words, int64 in [0, 2³²), from the key `seed` (int64, all 64 bits) and the counter's words.

    The counter's words are int64 in [0, 2³²), too; all shapes broadcast.
    """
    given = (seed, c0, c1, c2, c3)
    if any(x.device.type != "cpu" for x in given):
        return _rounds(*given)
    # On the CPU, NumPy on the same memory is faster at so many small operations.
    words = philox_in_numpy(*(x.numpy() for x in given))
    return tuple(torch.from_numpy(x.astype(np.int64)) for x in words)  # type: ignore[return-value]


def _rounds(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # Products of two words fill 64 bits and may be negative as int64; masking after the shift corrects that.
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


_FACTORS = np.array(_MULTIPLIERS, np.uint64)[:, None]
_BUMPS = np.arange(_ROUNDS, dtype=np.uint32)[:, None, None] * np.array(_WEYL, np.uint32)[:, None]
_LOW = 0 if sys.byteorder == "little" else 1


_BLOCK = 1 << 14
"""Counters whose words are computed at once: what more of them need would not stay in the cache."""


def philox_in_numpy(seed: _Array, c0: _Array, c1: _Array, c2: _Array, c3: _Array) -> tuple[_Array, ...]:
    """`philox` of int64 arrays: four words, uint32.

    Three operations per round, on two words at once: the halves of a product are read through a view. Nothing is
    broadcast inside the loop, which on few numbers would take twice the time.
    """
    counter = np.broadcast(c0, c1, c2, c3, seed)
    shape, count = counter.shape, counter.size
    given = np.empty((6, *shape), np.uint32)
    given[0], given[1], given[2], given[3], given[4], given[5] = c0, c2, c1, c3, seed, seed >> 32  # 32 bits of each
    flat = given.reshape(6, count)
    each = min(count, _BLOCK)
    keys = np.empty((_ROUNDS, 2, each), np.uint32)
    factors = np.empty((2, each), np.uint64)
    factors[:] = _FACTORS
    # Two products in turns, since the last one's halves are still read.
    both = np.empty((2, 2, each), np.uint64)
    halves = both.view(np.uint32).reshape(2, 2, each, 2)[:, ::-1]
    products = tuple(zip(both, halves[..., 1 - _LOW], halves[..., _LOW], strict=True)) * (_ROUNDS // 2)
    for start in range(0, count, each or 1):
        block = flat[:, start : start + each]
        if (left := block.shape[1]) < each:
            keys, factors = keys[..., :left], factors[:, :left]
            products = tuple((p[:, :left], high[:, :left], low[:, :left]) for p, high, low in products)
        x, y = block[:2], block[2:4]
        np.add(block[4:], _BUMPS, out=keys)  # modulo 2³²
        for (p, high, low), key in zip(products, keys, strict=True):
            np.multiply(x, factors, out=p)
            np.bitwise_xor(high, y, out=x)
            np.bitwise_xor(x, key, out=x)
            y = low
        block[2:4] = y
    return given[0, ...], given[2, ...], given[1, ...], given[3, ...]  # arrays for a single counter, too


def gumbel(words: _Words) -> _Words:
    """Standard Gumbel variates `−log E`, float32 between −3.2 and 22.9, with E ~ Exp(1) from all 32 bits of a word.

    A word r stands for u = (r + ½)/2³², and E = −log(1 − u). For small u (large variates) 1 − u loses digits, so E is
    its series there. Elsewhere 1 − u is computed from the complement of r, so that E stays finite.
    """
    if isinstance(words, np.ndarray):
        return -np.log(exponential(words))
    return -torch.log(exponential(words))


def normal(words: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Standard normal variates `√(2E) · cos 2πu` (Box and Muller 1958), float32 between −6.8 and 6.8.

    E ~ Exp(1) is made of `words`, u of `others`.
    """
    return torch.sqrt(2.0 * exponential(words)) * torch.cos(6.283185307179586 * unit(others))


def exponential(words: _Words) -> _Words:
    """Standard exponential variates E = −log(1 − u) of words, see `gumbel`: float32, between 1.2e-10 and 22.9."""
    u, v = unit(words), unit(_MASK - words)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    if isinstance(words, np.ndarray):
        return np.where(u < 0.015625, series, -np.log(v))
    return torch.where(u < 0.015625, series, -torch.log(v))


def unit(words: _Words) -> _Words:
    """Uniform variates u = (r + ½) / 2³² of words r, int64, or in NumPy uint32: float32, in (0, 1]."""
    # In two parts, since float32 holds only 24 bits; the second part matters where the first is small.
    high, low = words >> 8, words & 255
    if isinstance(high, np.ndarray):
        high, low = high.astype(np.float32), low.astype(np.float32)
    else:
        high, low = high.float(), low.float()
    return (high + 0.5) * 5.9604644775390625e-08 + (low - 127.5) * 2.3283064365386963e-10  # 2⁻²⁴, 2⁻³²
