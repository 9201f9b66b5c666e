"""What top-k, top-p and min-p keep of a row: the bounds, applied in transformers' order, ties kept."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import gather, group_bound, read_block, threshold_by_sum
from proxytune_kernels.rows import CLAMP, key_of

__all__ = ["candidates_of", "truncate"]

TRIED = tl.constexpr(256)
"""Groups that one program reads no slower than many programs sort the row."""


@triton.jit
def candidates_of(
    logits, work, groups, row, top, temperature, wanted_mass, top_k, log_min_p, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
):  # fmt: skip
    """Store a few tokens that are sure to contain all that is kept, if there is a bound that leaves so few.

    At most half of the groups are read, and no more than `TRIED` once a bound has proved too high; where that is not
    enough, or too many candidates lie in them, the row has to be sorted (`runs`). The answer depends on the row alone,
    not on its batch. `wanted_mass`: p · total; +inf without top-p.

    Returns:
        Whether they were found; the candidates' bound over T, and their number.
    """
    inverse = tl.div_rn(1.0, temperature)
    at = tl.arange(0, GROUPS_PADDED)
    wanted = tl.where(top_k > 0, top_k, 32)
    floor_s = tl.full((), 0.0, tl.float32)
    count = tl.full((), 0, tl.int32)
    enough = tl.full((), 0, tl.int32)
    more = tl.full((), 1, tl.int32)
    most = tl.maximum(PER_READ, n_groups >> 1)
    while more == 1:
        g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
        present = g > float("-inf")
        floor = group_bound(g, present, wanted, n_groups)
        floor_s = tl.div_rn(floor, temperature)
        is_live = present & (tl.div_rn(g, temperature) >= floor_s)
        live = tl.sum(is_live.to(tl.int32), axis=0)
        more = tl.full((), 0, tl.int32)
        if live <= most:
            count, mass = gather(
                logits, work, row, is_live, live, floor_s, temperature, top, PER_READ * GROUP,
                M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED,
            )  # fmt: skip
            nothing_below = (floor - top) * inverse < log_min_p
            by_k = (count >= top_k) | (nothing_below & (wanted_mass == float("inf")))
            by_p = nothing_below | (mass >= wanted_mass)
            certain = ((top_k > 0) & by_k) | ((top_k == 0) & by_p) | (floor == float("-inf"))
            fits = count <= PER_READ * GROUP
            enough = (certain & fits).to(tl.int32)
            more = (fits & (enough == 0)).to(tl.int32)
        wanted = tl.minimum(tl.maximum(wanted, live), 536870911) * 4
        most = tl.minimum(most, TRIED)
    return enough == 1, floor_s, count


@triton.jit
def truncate(
    logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, floor_s, count,
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
    least = key_of(tl.maximum(floor_s, -3.4028234663852886e38)).to(tl.int64)
    z, s, ids, ok = read_block(
        logits, work, row, 0, 0, floor_s, temperature, True, count, M, PER_ROW, GROUP, PER_READ,
    )  # fmt: skip
    key = key_of(s)
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
