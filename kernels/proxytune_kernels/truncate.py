"""What top-k, top-p and min-p keep of a row: the bounds, applied in transformers' order, ties kept."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import (
    EIGHT,
    FEW,
    UNITS,
    at_once,
    gather,
    group_bound,
    list_live,
    lowered,
    read_block,
    threshold_by_sum,
)
from proxytune_kernels.rows import CLAMP, combined, key_of

__all__ = ["LEAST", "candidates_of", "truncate", "truncate_few", "wanted_at_first"]

TRIED = tl.constexpr(256)
"""Groups that one program reads no slower than many programs sort the row."""
PAIRED = tl.constexpr(32)
"""Candidates that all others are compared with at a time."""
LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def wanted_at_first(top_k):
    """How many tokens the first bound lets through, at least."""
    return tl.where(top_k > 0, top_k, 32)


@triton.jit
def candidates_of(
    logits, work, groups, g, bound, row, top, temperature, wanted_mass, top_k, log_min_p, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store a few tokens that are sure to contain all that is kept, if there is a bound that leaves so few.

    At most half of the groups are read, and no more than `TRIED` once a bound has proved too high; where that is not
    enough, or too many candidates lie in them, the row has to be sorted (`runs`). The answer depends on the row alone,
    not on its batch. `g`: block of group maxima; `bound`: `unit_bound` of them for `wanted_at_first`. `wanted_mass`:
    p · total; +inf without top-p.

    Returns:
        Whether they were found; the candidates' bound, and their number.
    """
    inverse = tl.div_rn(1.0, temperature)
    at = tl.arange(0, GROUPS_PADDED)
    BLOCK: tl.constexpr = PER_READ * GROUP
    members, strides, widths, weights, offsets, floors = logits
    inside = widths[0]
    for i in tl.static_range(1, M):
        inside = tl.minimum(inside, widths[i])
    wanted = wanted_at_first(top_k)
    floor = bound
    if GROUPS_PADDED > UNITS:  # noqa: SIM102, one is known to the compiler
        if wanted > 2 * UNITS:  # then that of units is too low
            floor = group_bound(g, g > float("-inf"), wanted, n_groups)
    limit = floor
    count = tl.full((), 0, tl.int32)
    enough = tl.full((), 0, tl.int32)
    more = tl.full((), 1, tl.int32)
    most = tl.maximum(PER_READ, n_groups >> 1)
    while more == 1:
        limit = lowered(floor, temperature)
        is_live = (g > float("-inf")) & (g >= limit)
        live, group, of_part = list_live(work, is_live, AT_ONCE, AT_ONCE * GROUP // EIGHT, GROUPS_PADDED)
        more = tl.full((), 0, tl.int32)
        if live <= most:
            count = tl.full((), -1, tl.int32)
            if floors is None:  # noqa: SIM102, the same
                if (live <= AT_ONCE) & (inside >= GROUP):
                    count = at_once(
                        logits, work, row, live, group, of_part, limit, inside, M, PER_ROW, GROUP, BLOCK, AT_ONCE
                    )  # fmt: skip
            if count < 0:
                count = gather(logits, work, row, live, limit, BLOCK, M, PER_ROW, GROUP, PER_READ)
            nothing_below = (floor - top) * inverse < log_min_p
            fits = count <= BLOCK
            certain = nothing_below | (floor == float("-inf"))
            if top_k > 0:
                certain = certain & (wanted_mass == float("inf")) | (count >= top_k) | (floor == float("-inf"))
            elif fits & (wanted_mass < float("inf")):
                z, ids, ok = read_block(logits, work, row, 0, 0, limit, True, count, M, PER_ROW, GROUP, PER_READ)
                # Without those that a tie below the bound may have cut off.
                ok = ok & (tl.div_rn(z, temperature) >= tl.div_rn(floor, temperature))
                mass = tl.sum(tl.where(ok, tl.exp(tl.maximum((z - top) * inverse, CLAMP)), 0.0), axis=0)
                certain = certain | (mass >= wanted_mass)
            enough = (certain & fits).to(tl.int32)
            more = (fits & (enough == 0)).to(tl.int32)
        if more == 1:
            wanted = tl.minimum(tl.maximum(wanted, live), 536870911) * 4
            g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
            floor = group_bound(g, g > float("-inf"), wanted, n_groups)
            tl.debug_barrier()
        most = tl.minimum(most, TRIED)
    return enough == 1, limit, count


@triton.jit
def truncate_few(
    logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, count,
    M: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """`truncate` for up to FEW candidates: each counts those above it, and sums their mass.

    Returns:
        As `truncate`, but instead of `least` the block of z/T, and which of them top-k and top-p keep.
    """
    at = tl.arange(0, FEW)
    ok = at < count
    ids = tl.load(work[1] + at, mask=ok, other=2147483647)
    z, base = combined(logits, row, ids, M, PER_ROW, False)
    s = tl.div_rn(z, temperature)
    rel = (z - top) * tl.div_rn(1.0, temperature)
    e = tl.where(ok, tl.exp(tl.maximum(rel, CLAMP)), 0.0)
    # A thread compares its own with a few of the others, for the sake of its registers.
    both = (s.to(tl.int32, bitcast=True).to(tl.int64) << 32) | e.to(tl.int32, bitcast=True).to(tl.int64)
    higher = tl.zeros((PAIRED, FEW), tl.float32)
    mass = tl.zeros((PAIRED, FEW), tl.float32)
    for number in range(tl.cdiv(count, PAIRED)):
        other = tl.gather(both, number * PAIRED + tl.arange(0, PAIRED), 0)[:, None]
        above = (other >> 32).to(tl.int32).to(tl.float32, bitcast=True) > s[None, :]
        higher += above.to(tl.float32)
        mass += tl.where(above, other.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    higher, mass = tl.split(tl.sum(tl.join(higher, mass), axis=0))
    ok = ok & (tl.where(top_k > 0, higher, -1.0) < top_k)
    wanted_mass = tl.where(top_k > 0, top_p * tl.sum(tl.where(ok, e, 0.0), axis=0), wanted_mass)
    ok = ok & (tl.where(top_p < 1.0, mass, -1.0) < wanted_mass)
    kept = ok & (rel >= log_min_p)
    n, mass_kept = tl.split(tl.sum(tl.join(kept.to(tl.float32), tl.where(kept, e, 0.0)), axis=0))
    return s, ok, n.to(tl.int32), mass_kept, z, ids, kept


@triton.jit
def truncate(
    logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, limit, count,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """Find the bounds among the candidates of `candidates_of`, which stay in registers.

    Returns:
        `least`, int32: the key (see `key_of`) of the least z/T that top-k and top-p keep; the number of tokens kept,
        min-p included, and their mass Σ exp((z − top)/T); blocks of the candidates' logits, columns, and which are
        kept.
    """
    inverse = tl.div_rn(1.0, temperature)
    hi = key_of(tl.div_rn(top, temperature)).to(tl.int64) + 1
    least = key_of(tl.maximum(tl.div_rn(limit, temperature), LEAST)).to(tl.int64)
    z, ids, ok = read_block(logits, work, row, 0, 0, limit, True, count, M, PER_ROW, GROUP, PER_READ)
    key = key_of(tl.div_rn(z, temperature))
    if top_k > 0:
        least = threshold_by_sum(key, ok.to(tl.float32), least, hi, top_k)
    rel = (z - top) * inverse
    e = tl.exp(tl.maximum(rel, CLAMP))
    if top_p < 1.0:
        inside = tl.where(ok & (key >= least.to(tl.int32)), e, 0.0)
        if top_k > 0:
            wanted_mass = top_p * tl.sum(inside, axis=0)
        least = threshold_by_sum(key, inside, least, hi, wanted_mass)
    ok = ok & (key >= least.to(tl.int32)) & (rel >= log_min_p)
    kept = tl.sum(ok.to(tl.int32), axis=0)
    return least.to(tl.int32), kept, tl.sum(tl.where(ok, e, 0.0), axis=0), z, ids, ok
