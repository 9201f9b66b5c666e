"""The distribution of a row ("law"): the few numbers from which the probability of any of its logits follows."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import FEW, LISTED, unit_bound
from proxytune_kernels.merge import moments, tempered, total_of
from proxytune_kernels.rows import CLAMP, FINITE, key_of
from proxytune_kernels.runs import leave
from proxytune_kernels.truncate import candidates_of, truncate, truncate_few, wanted_at_first

__all__ = ["LAW", "law_at", "laws_of", "logprobs"]

LAW = ("top", "temperature", "log total", "fork")
"""Fields of a row in float32 `[rows, LAW]`. "log total" is NaN without a distribution; "fork" is 1 or 0."""
SIZE = tl.constexpr(len(LAW))
LOWEST = tl.constexpr(-2147483648)


@triton.jit
def law_at(laws, bounds, log_min_p, row):
    """The distribution of a row, as `logprobs` reads it; for a block of rows (int64), blocks.

    `bounds`: int32 `[rows]`, the key of the least z/T that is kept.
    """
    at = laws + row * SIZE
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(bounds + row), log_min_p


@triton.jit
def logprobs(law, z):
    """Log-probabilities, nats, of combined logits under a distribution of `law_at`; −inf for what cannot be drawn."""
    top, temperature, log_total, least, log_min_p = law
    relative = (z - top) * tl.div_rn(1.0, temperature)
    kept = (z > float("-inf")) & (key_of(tl.div_rn(z, temperature)) >= least) & (relative >= log_min_p)
    return tl.where(kept, relative - log_total, float("-inf"))


@triton.jit
def _law_of_few(
    logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, count,
    M: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    s, inside, kept, total, z, ids, ok = truncate_few(
        logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, count, M, PER_ROW
    )  # fmt: skip
    return tl.min(tl.where(inside, key_of(s), 2147483647), axis=0), total


@triton.jit
def laws_of(
    members, strides, widths, weights, offsets, floors,
    temperature, fork_temperature, fork_threshold, top_k, top_p, log_min_p,
    part, groups, live_groups, block_ids, left, laws, bounds,
    each, tiles, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr,
    GROUP: tl.constexpr, PER_READ: tl.constexpr, AT_ONCE: tl.constexpr, FIELDS: tl.constexpr,
    TILES_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr, FORK: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """Find the distribution of each row. Grid (rows); `each` neighbouring rows have the settings of one text.

    `laws`, float32 `[rows, LAW]`, and `bounds`, int32 `[rows]`, are outputs; the workspaces and FORK, TRUNCATED are as
    in `resolve`. `wide.resolve_wide` completes what is `left` to it.
    """
    row = tl.program_id(0).to(tl.int64)
    text = row // each
    t = tl.arange(0, TILES_PADDED)
    there = t < tiles
    part += row * FIELDS * tiles
    tile_top = tl.load(part + t, mask=there, other=FINITE)
    top = tl.max(tile_top, axis=0)
    if TRUNCATED:
        leave(left, row, 0.0, 0.0, 0.0, 0.0)
    if (top == float("inf")) | (top == FINITE):
        tl.store(laws + row * SIZE, 0.0)
        tl.store(laws + row * SIZE + 1, 1.0)
        tl.store(laws + row * SIZE + 2, float("nan"))
        tl.store(laws + row * SIZE + 3, 0.0)
        tl.store(bounds + row, tl.full((), LOWEST, tl.int32))
    else:
        relative = tile_top - top
        chosen = tl.load(temperature + text)
        is_fork = top != top  # False, as a tensor
        if FORK:
            s = tl.load(part + 1 * tiles + t, mask=there, other=0.0)
            t1 = tl.load(part + 2 * tiles + t, mask=there, other=0.0)
            t2 = tl.load(part + 3 * tiles + t, mask=there, other=0.0)
            total, mean, square = moments(s, t1, t2, tl.maximum(relative, CLAMP))
            is_fork = tl.maximum(tl.log(total) - mean, 0.0) > tl.load(fork_threshold + text)
            chosen = tl.where(is_fork, tl.load(fork_temperature + text), chosen)
        mass, relative, inverse = tempered(part, t, there, tiles, relative, chosen, is_fork, FORK)
        total = total_of(mass, relative)
        tl.store(laws + row * SIZE, top)
        tl.store(laws + row * SIZE + 1, chosen)
        tl.store(laws + row * SIZE + 3, is_fork.to(tl.float32))
        least = tl.full((), LOWEST, tl.int32)
        if TRUNCATED:
            k = tl.load(top_k + text)
            p = tl.load(top_p + text)
            m = tl.load(log_min_p + text)
            if (k > 0) | (p < 1.0) | (m > float("-inf")):
                BLOCK: tl.constexpr = PER_READ * GROUP
                logits = (members, strides, widths, weights, offsets, floors)
                work = (live_groups + row * (GROUPS_PADDED + LISTED), block_ids + row * BLOCK)
                wanted_mass = tl.where(p < 1.0, p * total, float("inf"))
                groups += row * n_groups
                at = tl.arange(0, GROUPS_PADDED)
                g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
                bound, unused = unit_bound(g, wanted_at_first(k), GROUPS_PADDED)
                found, limit, count = candidates_of(
                    logits, work, groups, g, bound, row, top, chosen, wanted_mass, k, m,
                    n_groups, M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED, AT_ONCE,
                )  # fmt: skip
                if not found:
                    leave(left, row, chosen, top, wanted_mass, 0.0)
                elif count <= FEW:
                    least, total = _law_of_few(
                        logits, work, row, top, chosen, wanted_mass, k, p, m, count, M, PER_ROW
                    )  # fmt: skip
                else:
                    least, kept, total, z, ids, ok = truncate(
                        logits, work, row, top, chosen, wanted_mass, k, p, m,
                        limit, count, M, PER_ROW, GROUP, PER_READ,
                    )  # fmt: skip
        tl.store(laws + row * SIZE + 2, tl.log(total))
        tl.store(bounds + row, least)
