"""Philox-4x32-10, and uniform, exponential, Gumbel and normal variates from its words."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["exponential", "gumbel", "normal", "philox", "unit"]


_Words = TypeVar("_Words", torch.Tensor, np.ndarray[Any, np.dtype[Any]])


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
    words = _rounds(*(x.numpy().view(np.uint64) for x in given))
    return tuple(torch.from_numpy(np.asarray(x).view(np.int64)) for x in words)  # type: ignore[return-value]


def _rounds(seed: _Words, c0: _Words, c1: _Words, c2: _Words, c3: _Words) -> tuple[_Words, _Words, _Words, _Words]:
    # Products of two words fill 64 bits and may be negative as int64; masking after the shift corrects that.
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel variates `−log E`, float32 between −3.2 and 22.9, with E ~ Exp(1) from all 32 bits of a word.

    A word r stands for u = (r + ½)/2³², and E = −log(1 − u). For small u (large variates) 1 − u loses digits, so E is
    its series there. Elsewhere 1 − u is computed from the complement of r, so that E stays finite.
    """
    return -torch.log(exponential(words))


def normal(words: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Standard normal variates `√(2E) · cos 2πu` (Box and Muller 1958), float32 between −6.8 and 6.8.

    E ~ Exp(1) is made of `words`, u of `others`.
    """
    return torch.sqrt(2.0 * exponential(words)) * torch.cos(6.283185307179586 * unit(others))


def exponential(words: torch.Tensor) -> torch.Tensor:
    """Standard exponential variates E = −log(1 − u) of words, see `gumbel`: float32, between 1.2e-10 and 22.9."""
    u, v = unit(words), unit(_MASK - words)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return torch.where(u < 0.015625, series, -torch.log(v))


def unit(words: torch.Tensor) -> torch.Tensor:
    """Uniform variates u = (r + ½) / 2³² of words r: float32, in (0, 1]."""
    # In two parts, since float32 holds only 24 bits; the second part matters where the first is small.
    high = ((words >> 8).float() + 0.5) * 5.9604644775390625e-08  # 2⁻²⁴
    low = ((words & 255).float() - 127.5) * 2.3283064365386963e-10  # 2⁻³²
    return high + low
