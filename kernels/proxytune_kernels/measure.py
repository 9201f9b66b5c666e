"""K1: one pass over the members' rows. Each program reduces one tile of one row to a few sums."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP, FINITE, combined, combined_unmasked

__all__ = ["FIELDS", "steer_tiles"]

FIELDS = ("max", "s", "t1", "t2", "mass", "fork mass", "base max", "base s", "shift", "live")
"""The numbers per tile, in the order of the workspace `[B, FIELDS, tiles]`.

With d = z − the tile's maximum: "s", "t1", "t2" sum e^d, d·e^d, d²·e^d; "mass" and "fork mass" sum e^(d/T); "base s" is
"s" of the base; "shift" sums e^d · (d − d of the base); "live" counts columns above −inf.
"""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    logits, temperature, fork_temperature, part, groups, scores,
    row, tile, V, tiles, scores_stride,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, FIELDS: tl.constexpr,
    RAW: tl.constexpr, MOMENTS: tl.constexpr, MASS: tl.constexpr, FORK: tl.constexpr, KL: tl.constexpr,
    GROUPS: tl.constexpr, LIVE: tl.constexpr, SCORES: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Reduce a tile; FULL: all its columns are inside every member. Returns whether its numbers are stored.

    FAST, for full tiles without floors: no masks and no clamps. Stored if all logits are finite, and then with the same
    bits in the maxima and the scores.
    """
    cols = tile * TILE + tl.arange(0, TILE)
    if FAST:
        z, base = combined_unmasked(logits, row, cols, M, PER_ROW)
        scored = z + 0.0  # no −0, as in `combined`
    else:
        scored, base = combined(logits, row, cols, M, PER_ROW, FULL)
        # NaN becomes +inf, so that a maximum of +inf marks both; reductions do not treat NaN consistently.
        z = tl.where(scored == scored, scored, float("inf"))
    if GROUPS:
        PER_TILE: tl.constexpr = TILE // GROUP
        g = tl.max(tl.reshape(z, (PER_TILE, GROUP)), axis=1) + 0.0
        top = tl.maximum(tl.max(g, axis=0), FINITE)
    else:
        top = tl.maximum(tl.max(z, axis=0) + 0.0, FINITE)
    if KL:
        base_top = tl.maximum(tl.max(base, axis=0) + 0.0, FINITE)
    ok = tl.full((), 1, tl.int1)
    if FAST:
        # NaN and infinities reach the sum, and no difference to a top that is not huge overflows.
        ok = (tl.abs(tl.sum(z, axis=0)) < float("inf")) & (top < 1.0e30)
        if KL:
            ok = ok & (base_top < 1.0e30)
    if SCORES:
        if FULL:
            tl.store(scores + row * scores_stride + cols, scored, mask=ok)
        else:
            tl.store(scores + row * scores_stride + cols, scored, mask=cols < V)
    out = part + row * FIELDS * tiles + tile
    if GROUPS:
        tl.store(groups + (row * tiles + tile) * PER_TILE + tl.arange(0, PER_TILE), g, mask=ok)
    tl.store(out, top, mask=ok)
    if LIVE:
        live = tl.sum((z > float("-inf")).to(tl.float32), axis=0)
        tl.store(out + 9 * tiles, live, mask=ok)
    d = z - top
    if MASS:
        tl.store(out + 4 * tiles, _mass(d, tl.load(temperature + row), FAST), mask=ok)
    if FORK:
        tl.store(out + 5 * tiles, _mass(d, tl.load(fork_temperature + row), FAST), mask=ok)
    if RAW:
        if not FAST:
            d = tl.maximum(d, CLAMP)
        e = tl.exp2(d * LOG2E)
        tl.store(out + 1 * tiles, tl.sum(e, axis=0), mask=ok)
        if MOMENTS:
            de = d * e
            tl.store(out + 2 * tiles, tl.sum(de, axis=0), mask=ok)
            tl.store(out + 3 * tiles, tl.sum(de * d, axis=0), mask=ok)
        if KL:
            base_d = base - base_top
            if not FAST:
                base_d = tl.maximum(base_d, FINITE)
                d = tl.maximum(z - top, FINITE)
            tl.store(out + 6 * tiles, base_top, mask=ok)
            tl.store(out + 7 * tiles, _mass(base_d, 1.0, FAST), mask=ok)
            # Each relative to its own maximum, so that large logits lose no digits. Where z is −inf, its weight is 0.
            tl.store(out + 8 * tiles, tl.sum((d - base_d) * e, axis=0), mask=ok)
    return ok


@triton.jit
def _mass(d, temperature, FAST: tl.constexpr):
    x = d * (tl.div_rn(1.0, temperature) * LOG2E)
    if not FAST:
        x = tl.maximum(x, CLAMP)  # after the division: masked tokens have no mass at any temperature
    return tl.sum(tl.exp2(x), axis=0)


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
        done = tile < 0  # False, as a tensor
        if floors is None:  # what is below them would be −inf
            done = _tile(
                logits, temperature, fork_temperature, part, groups, scores,
                row, tile, V, tiles, scores_stride, M, PER_ROW, TILE, GROUP, FIELDS,
                RAW, MOMENTS, MASS, FORK, KL, GROUPS, LIVE, SCORES, True, True,
            )  # fmt: skip
        if not done:
            _tile(
                logits, temperature, fork_temperature, part, groups, scores,
                row, tile, V, tiles, scores_stride, M, PER_ROW, TILE, GROUP, FIELDS,
                RAW, MOMENTS, MASS, FORK, KL, GROUPS, LIVE, SCORES, True, False,
            )  # fmt: skip
    else:
        _tile(
            logits, temperature, fork_temperature, part, groups, scores,
            row, tile, V, tiles, scores_stride, M, PER_ROW, TILE, GROUP, FIELDS,
            RAW, MOMENTS, MASS, FORK, KL, GROUPS, LIVE, SCORES, False, False,
        )  # fmt: skip
