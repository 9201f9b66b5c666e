"""Merges the tiles' sums, each relative to the tile's maximum, into those of the row."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP

__all__ = ["first_moments", "tempered"]


@triton.jit
def first_moments(part, t, there, tiles, relative):
    """Σ exp(z − top) and the mean of z − top at temperature 1; `relative` must be at least `CLAMP`."""
    weight = tl.exp(relative)
    s = tl.load(part + 1 * tiles + t, mask=there, other=0.0)
    t1 = tl.load(part + 2 * tiles + t, mask=there, other=0.0)
    total = tl.sum(s * weight, axis=0)
    return total, tl.div_rn(tl.sum((t1 + relative * s) * weight, axis=0), total)


@triton.jit
def tempered(part, t, there, tiles, relative, temperature, is_fork, FORK: tl.constexpr):
    """Masses at the temperature a row is drawn at.

    Returns:
        Blocks over tiles: the masses, each relative to the tile's maximum, and (tile's maximum − top) / T; then 1/T and
        Σ exp((z − top)/T).
    """
    mass = tl.load(part + 4 * tiles + t, mask=there, other=0.0)
    if FORK:
        mass = tl.where(is_fork, tl.load(part + 5 * tiles + t, mask=there, other=0.0), mass)
    inverse = tl.div_rn(1.0, temperature)
    relative = relative * inverse
    return mass, relative, inverse, tl.sum(mass * tl.exp(tl.maximum(relative, CLAMP)), axis=0)
