"""The tiles' sums, each relative to its own maximum, merged into those of the row."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP

__all__ = ["first_moments", "tempered"]


@triton.jit
def first_moments(part, t, there, tiles, relative):
    """Of the row at temperature 1.

    Args:
        part: The row's fields, see `tiles.FIELDS`.
        t: Block of tile numbers.
        there: Block of bool: which there are.
        tiles: Number of tiles.
        relative: Block, tile's maximum − top, not below `CLAMP`.

    Returns:
        Σ exp(z − top), and the mean of z − top.
    """
    weight = tl.exp(relative)
    s = tl.load(part + 1 * tiles + t, mask=there, other=0.0)
    t1 = tl.load(part + 2 * tiles + t, mask=there, other=0.0)
    total = tl.sum(s * weight, axis=0)
    return total, tl.div_rn(tl.sum((t1 + relative * s) * weight, axis=0), total)


@triton.jit
def tempered(part, t, there, tiles, relative, temperature, is_fork, FORK: tl.constexpr):
    """Of the row at the temperature it is drawn at.

    Args:
        part: The row's fields, see `tiles.FIELDS`.
        t: Block of tile numbers.
        there: Block of bool: which there are.
        tiles: Number of tiles.
        relative: Block, tile's maximum − top.
        temperature: Scalar.
        is_fork: Whether it is a fork's.
        FORK: Whether it can be.

    Returns:
        The tiles' masses, a block, each relative to its maximum; (tile's maximum − top) / T, a block; 1/T; and
        Σ exp((z − top)/T).
    """
    mass = tl.load(part + 4 * tiles + t, mask=there, other=0.0)
    if FORK:
        mass = tl.where(is_fork, tl.load(part + 5 * tiles + t, mask=there, other=0.0), mass)
    inverse = tl.div_rn(1.0, temperature)
    relative = relative * inverse
    return mass, relative, inverse, tl.sum(mass * tl.exp(tl.maximum(relative, CLAMP)), axis=0)
