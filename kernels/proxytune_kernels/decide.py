"""K2: from the tiles' sums to a decision. Each program takes one row."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import LISTED, unit_bound
from proxytune_kernels.draw import confidence, draw_plain, draw_truncated
from proxytune_kernels.merge import moments, tempered, total_of
from proxytune_kernels.rows import CLAMP, FINITE, combined
from proxytune_kernels.runs import leave
from proxytune_kernels.truncate import wanted_at_first

__all__ = ["resolve"]


@triton.jit
def resolve(
    members, strides, widths, weights, offsets, floors,
    temperature, fork_temperature, fork_threshold, top_k, top_p, log_min_p, seed, stream, position, branch,
    part, groups, live_groups, block_ids, left,
    statistics, argmax, kept, fork, tokens, logprobs, draw_logprobs, keys,
    rows, tiles, n_groups, draws,
    M: tl.constexpr, PER_ROW: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, AT_ONCE: tl.constexpr, FIELDS: tl.constexpr,
    TILES_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr, ONE: tl.constexpr,
    RAW: tl.constexpr, MOMENTS: tl.constexpr, KL: tl.constexpr, ARGMAX: tl.constexpr, SAMPLE: tl.constexpr,
    FORK: tl.constexpr, TRUNCATED: tl.constexpr, CONFIDENCE: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """Merge the tiles, measure, and draw. Grid (B).

    Outputs: `statistics`, float32 `[6, B]`: lse, entropy, varentropy, KL, confidence, temperature; `argmax` and `kept`,
    int64 `[B]`; `fork`, bool `[B]`; `tokens`, int64 `[B, draws]` (the argmax without SAMPLE); `logprobs`,
    `draw_logprobs` and `keys`, float32 `[B, draws]`.

    Workspaces: `live_groups` `[B, GROUPS_PADDED + LISTED]` and `block_ids` `[B, PER_READ · GROUP]`, int32; `left`: see
    the package.

    Flags: ONE: `draws` is 1. RAW, MOMENTS, KL, LIVE: as in `steer_tiles`. ARGMAX, CONFIDENCE: the output is wanted.
    SAMPLE: draw. FORK: the temperature depends on the entropy. TRUNCATED: some row has top-k, top-p or min-p. Rows
    with too many candidates are left to `wide.resolve_wide`.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = (members, strides, widths, weights, offsets, floors)
    BLOCK: tl.constexpr = PER_READ * GROUP
    work = (live_groups + row * (GROUPS_PADDED + LISTED), block_ids + row * BLOCK)
    groups += row * n_groups
    t = tl.arange(0, TILES_PADDED)
    there = t < tiles
    part += row * FIELDS * tiles
    tile_top = tl.load(part + t, mask=there, other=FINITE)
    # All loads that depend on nothing come first, so that they are waited for together.
    if RAW:
        s = tl.load(part + 1 * tiles + t, mask=there, other=0.0)
    if MOMENTS:
        t1 = tl.load(part + 2 * tiles + t, mask=there, other=0.0)
        t2 = tl.load(part + 3 * tiles + t, mask=there, other=0.0)
    if SAMPLE:
        chosen = tl.load(temperature + row)
        noise = (
            tl.load(seed + row), tl.load(position + row).to(tl.uint32),
            tl.load(stream + row).to(tl.uint32), tl.load(branch + row).to(tl.uint32),
        )  # fmt: skip
    if TRUNCATED:
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        m = tl.load(log_min_p + row)
        at = tl.arange(0, GROUPS_PADDED)
        g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
        leave(left, row, 0.0, 0.0, 0.0, 0.0)
        bound, top = unit_bound(g, wanted_at_first(k), GROUPS_PADDED)
        top = tl.maximum(top, FINITE)
    else:
        top = tl.max(tile_top, axis=0)
    bad = top == float("inf")
    if bad | (top == FINITE):
        tl.store(statistics + 0 * rows + row, tl.where(bad, float("nan"), float("-inf")))
        for i in tl.static_range(1, 6):
            tl.store(statistics + i * rows + row, float("nan"))
        tl.store(argmax + row, tl.full((), -1, tl.int64))
        tl.store(kept + row, tl.full((), 0, tl.int64))
        tl.store(fork + row, top != top)  # False, as a tensor
        for draw in range(draws):
            tl.store(tokens + row * draws + draw, tl.full((), -1, tl.int64))
            tl.store(logprobs + row * draws + draw, float("nan"))
            tl.store(draw_logprobs + row * draws + draw, float("nan"))
            tl.store(keys + row * draws + draw, float("nan"))
    else:
        relative = tile_top - top
        log_total_raw = tl.full((), 0.0, tl.float32)
        entropy = tl.full((), 0.0, tl.float32)
        if RAW:
            clamped = tl.maximum(relative, CLAMP)
            if MOMENTS:
                total, mean, square = moments(s, t1, t2, clamped)
            else:
                total = tl.sum(s * tl.exp(clamped), axis=0)
            log_total_raw = tl.log(total)
            tl.store(statistics + 0 * rows + row, top + log_total_raw)
            if MOMENTS:
                entropy = tl.maximum(log_total_raw - mean, 0.0)
                tl.store(statistics + 1 * rows + row, entropy)
                tl.store(statistics + 2 * rows + row, tl.maximum(square - mean * mean, 0.0))
            if KL:
                base_tops = tl.load(part + 6 * tiles + t, mask=there, other=FINITE)
                base_s = tl.load(part + 7 * tiles + t, mask=there, other=0.0)
                shifted = tl.load(part + 8 * tiles + t, mask=there, other=0.0)
                base_top = tl.max(base_tops, axis=0)
                base_relative = base_tops - base_top
                base_total = tl.sum(base_s * tl.exp(tl.maximum(base_relative, CLAMP)), axis=0)
                shifted += (clamped - base_relative) * s
                mean_shift = tl.div_rn(tl.sum(shifted * tl.exp(clamped), axis=0), total)
                kl = mean_shift - (log_total_raw - tl.log(base_total))
                tl.store(statistics + 3 * rows + row, tl.maximum(kl, 0.0))
        if ARGMAX:
            # The first tile that holds the maximum, and the first column in it.
            tile = tl.min(tl.where(there & (tile_top == top), t, 2147483647), axis=0)
            cols = tile * TILE + tl.arange(0, TILE)
            z, base = combined(logits, row, cols, M, PER_ROW, False)
            best = tl.min(tl.where(z == top, cols, 2147483647), axis=0).to(tl.int64)
            tl.store(argmax + row, best)
            if not SAMPLE:
                tl.store(tokens + row, best)
                tl.store(logprobs + row, -log_total_raw)
        if SAMPLE:
            is_fork = top != top  # False, as a tensor
            if FORK:
                is_fork = entropy > tl.load(fork_threshold + row)
                chosen = tl.where(is_fork, tl.load(fork_temperature + row), chosen)
            tl.store(fork + row, is_fork)
            tl.store(statistics + 5 * rows + row, chosen)
            mass, relative, inverse = tempered(part, t, there, tiles, relative, chosen, is_fork, FORK)
            out = (tokens, logprobs, draw_logprobs, keys)
            plain = True
            if TRUNCATED:
                plain = (k == 0) & (p == 1.0) & (m == float("-inf"))
            if plain:
                draw_plain(
                    logits, noise, out, row, t, mass, relative, top, log_total_raw, inverse,
                    tl.log(total_of(mass, relative)), draws, M, PER_ROW, TILE, ONE,
                )  # fmt: skip
                if LIVE:
                    n_live = tl.sum(tl.load(part + 9 * tiles + t, mask=there, other=0.0), axis=0)
                    tl.store(kept + row, n_live.to(tl.int64))
            elif TRUNCATED:
                total_at_t = tl.full((), 0.0, tl.float32)
                if (k == 0) & (p < 1.0):
                    total_at_t = total_of(mass, relative)
                draw_truncated(
                    logits, work, groups, g, bound, noise, out, kept, left,
                    row, top, chosen, total_at_t, log_total_raw, k, p, m,
                    n_groups, draws, M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED, AT_ONCE,
                )  # fmt: skip
        # Last, when few registers are still in use.
        if CONFIDENCE:
            c = confidence(
                logits, work, groups, row, top, log_total_raw, n_groups,
                M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED, 20,
            )  # fmt: skip
            tl.store(statistics + 4 * rows + row, c)
