"""K1: one pass over the members' rows. Each program reduces one tile of one row to a few sums."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP, FINITE, combined

__all__ = ["FIELDS", "steer_tiles"]

FIELDS = ("max", "s", "t1", "t2", "mass", "fork mass", "base max", "base s", "shift", "live")
"""The numbers per tile, in the order of the workspace `[B, FIELDS, tiles]`.

With d = z − the tile's maximum: "s", "t1", "t2" sum e^d, d·e^d, d²·e^d; "mass" and "fork mass" sum e^(d/T); "base s" is
"s" of the base; "shift" sums e^d · (d − d of the base); "live" counts columns above −inf.
"""


@triton.jit
def _tile(
    logits, temperature, fork_temperature, part, groups, scores,
    row, tile, V, tiles, scores_stride,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, FIELDS: tl.constexpr,
    RAW: tl.constexpr, MOMENTS: tl.constexpr, MASS: tl.constexpr, FORK: tl.constexpr, KL: tl.constexpr,
    GROUPS: tl.constexpr, LIVE: tl.constexpr, SCORES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    cols = tile * TILE + tl.arange(0, TILE)
    z, base = combined(logits, row, cols, M, PER_ROW, FULL)
    if SCORES:
        if FULL:
            tl.store(scores + row * scores_stride + cols, z)
        else:
            tl.store(scores + row * scores_stride + cols, z, mask=cols < V)
    out = part + row * FIELDS * tiles + tile
    # NaN becomes +inf, so that a maximum of +inf marks both; reductions do not treat NaN consistently.
    z = tl.where(z == z, z, float("inf"))
    if GROUPS:
        PER_TILE: tl.constexpr = TILE // GROUP
        g = tl.max(tl.reshape(z, (PER_TILE, GROUP)), axis=1)
        tl.store(groups + (row * tiles + tile) * PER_TILE + tl.arange(0, PER_TILE), g)
        top = tl.maximum(tl.max(g, axis=0), FINITE)
    else:
        top = tl.maximum(tl.max(z, axis=0), FINITE)
    tl.store(out, top)
    if LIVE:
        tl.store(out + 9 * tiles, tl.sum((z > float("-inf")).to(tl.float32), axis=0))
    d = z - top
    if MASS:
        inverse = tl.div_rn(1.0, tl.load(temperature + row))
        # Clamped after the division: masked tokens have no mass at any temperature.
        tl.store(out + 4 * tiles, tl.sum(tl.exp(tl.maximum(d * inverse, CLAMP)), axis=0))
    if FORK:
        inverse = tl.div_rn(1.0, tl.load(fork_temperature + row))
        tl.store(out + 5 * tiles, tl.sum(tl.exp(tl.maximum(d * inverse, CLAMP)), axis=0))
    if RAW:
        d = tl.maximum(d, CLAMP)
        e = tl.exp(d)
        tl.store(out + 1 * tiles, tl.sum(e, axis=0))
        if MOMENTS:
            de = d * e
            tl.store(out + 2 * tiles, tl.sum(de, axis=0))
            tl.store(out + 3 * tiles, tl.sum(de * d, axis=0))
        if KL:
            base_top = tl.maximum(tl.max(base, axis=0), FINITE)
            base_d = tl.maximum(base - base_top, FINITE)
            tl.store(out + 6 * tiles, base_top)
            tl.store(out + 7 * tiles, tl.sum(tl.exp(tl.maximum(base_d, CLAMP)), axis=0))
            # Each relative to its own maximum, so that large logits lose no digits. Where z is −inf, its weight is 0.
            tl.store(out + 8 * tiles, tl.sum((tl.maximum(z - top, FINITE) - base_d) * e, axis=0))


@triton.jit
def steer_tiles(
    members, strides, widths, weights, offsets, floors, temperature, fork_temperature, part, groups, scores,
    V, inside, tiles, scores_stride,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, FIELDS: tl.constexpr,
    RAW: tl.constexpr, MOMENTS: tl.constexpr, MASS: tl.constexpr, FORK: tl.constexpr, KL: tl.constexpr,
    GROUPS: tl.constexpr, LIVE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Combine a tile and reduce it. Grid (B · tiles); tiles and warps are those of any batch, so a row has one result.

    `part`, `groups` and `scores` (float32 `[B, V]`, row stride `scores_stride`) are outputs; `inside` is the number of
    columns that every member has. Flags select the fields: RAW "s", MOMENTS "t1" and "t2", MASS "mass", FORK "fork
    mass", KL "base max", "base s" and "shift", LIVE "live"; GROUPS the groups' maxima; SCORES the combined logits.
    """
    # One grid dimension: the others are limited to 65,535, and a prompt may have more rows.
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    logits = (members, strides, widths, weights, offsets, floors)
    if tile * TILE + TILE <= inside:
        _tile(
            logits, temperature, fork_temperature, part, groups, scores,
            row, tile, V, tiles, scores_stride, M, PER_ROW, TILE, GROUP, FIELDS,
            RAW, MOMENTS, MASS, FORK, KL, GROUPS, LIVE, SCORES, True,
        )  # fmt: skip
    else:
        _tile(
            logits, temperature, fork_temperature, part, groups, scores,
            row, tile, V, tiles, scores_stride, M, PER_ROW, TILE, GROUP, FIELDS,
            RAW, MOMENTS, MASS, FORK, KL, GROUPS, LIVE, SCORES, False,
        )  # fmt: skip
