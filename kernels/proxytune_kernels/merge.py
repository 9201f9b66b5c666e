"""Merges the tiles' sums, each relative to the tile's maximum, into those of the row."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP

__all__ = ["moments", "tempered", "total_of"]


@triton.jit
def moments(s, t1, t2, relative):
    """Σ exp(z − top), and the means of z − top and of its square, at temperature 1; in one reduction.

    Blocks over tiles: the fields "s", "t1", "t2"; `relative` must be at least `CLAMP`.
    """
    weight = tl.exp(relative)
    first = (t1 + relative * s) * weight
    second = (t2 + 2.0 * relative * t1 + relative * relative * s) * weight
    sums = tl.sum(tl.join(tl.join(s * weight, first), tl.join(second, second)), axis=0)
    even, odd = tl.split(sums)  # the last axis is that of the inner joins' operands
    total, first = tl.split(even)
    second, unused = tl.split(odd)
    return total, tl.div_rn(first, total), tl.div_rn(second, total)


@triton.jit
def tempered(part, t, there, tiles, relative, temperature, is_fork, FORK: tl.constexpr):
    """Masses at the temperature a row is drawn at.

    Returns:
        Blocks over tiles: the masses, each relative to the tile's maximum, and (tile's maximum − top) / T; then 1/T.
    """
    mass = tl.load(part + 4 * tiles + t, mask=there, other=0.0)
    if FORK:
        mass = tl.where(is_fork, tl.load(part + 5 * tiles + t, mask=there, other=0.0), mass)
    inverse = tl.div_rn(1.0, temperature)
    return mass, relative * inverse, inverse


@triton.jit
def total_of(mass, relative):
    """Σ exp((z − top)/T) from the blocks of `tempered`."""
    return tl.sum(mass * tl.exp(tl.maximum(relative, CLAMP)), axis=0)
