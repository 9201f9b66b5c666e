"""What top-k, top-p and min-p keep of a row: the bounds, applied in transformers' order, ties kept."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import gather, group_bound, read_block, threshold_by_count, threshold_by_mass
from proxytune_kernels.rows import CLAMP, key_of

__all__ = ["truncate"]


@triton.jit
def truncate(
    logits, work, groups, row, top, temperature, total, top_k, top_p, log_min_p, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
):  # fmt: skip
    """Gather candidates and find the bounds.

    Returns:
        `least`, int64: the key (see `key_of`) of the least z/T that top-k and top-p keep; for `read_block` the
        candidates' bound over T, the numbers of live groups and of candidates, whether they are stored, and the number
        of parts; then the number of tokens kept, min-p included, and their mass Σ exp((z − top)/T).
    """
    inverse = tl.div_rn(1.0, temperature)
    at = tl.arange(0, GROUPS_PADDED)
    g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
    present = g > float("-inf")
    wanted = tl.where(top_k > 0, top_k, 32)
    floor = tl.full((), 0.0, tl.float32)
    live = tl.full((), 0, tl.int32)
    count = tl.full((), 0, tl.int32)
    enough = tl.full((), 0, tl.int32)
    while enough == 0:
        floor = group_bound(g, present, wanted, n_groups)
        live, count, mass = gather(
            logits, work, row, g, present, floor, temperature, top,
            M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED,
        )  # fmt: skip
        nothing_below = (floor - top) * inverse < log_min_p
        by_k = (count >= top_k) | (nothing_below & (top_p == 1.0))
        by_p = nothing_below | ((mass >= top_p * total) & (top_p < 1.0))
        certain = ((top_k > 0) & by_k) | ((top_k == 0) & by_p) | (floor == float("-inf"))
        enough = certain.to(tl.int32)
        wanted = tl.minimum(wanted, 536870911) * 4

    floor_s = tl.div_rn(floor, temperature)
    in_block = count <= PER_READ * GROUP
    hi = key_of(tl.div_rn(top, temperature)).to(tl.int64) + 1
    least = key_of(tl.maximum(floor_s, -3.4028234663852886e38)).to(tl.int64)
    total_inside = total
    if top_k > 0:
        least = threshold_by_count(
            logits, work, row, live, floor_s, temperature,
            in_block, count, least, hi, top_k, M, PER_ROW, GROUP, PER_READ,
        )  # fmt: skip
    parts = tl.where(in_block, 1, tl.cdiv(live, PER_READ))
    if top_p < 1.0:
        if top_k > 0:
            total_inside = 0.0
            for number in range(parts):
                z, s, ids, ok = read_block(
                    logits, work, row, number, live, floor_s,
                    temperature, in_block, count, M, PER_ROW, GROUP, PER_READ,
                )  # fmt: skip
                ok = ok & (key_of(s) >= least.to(tl.int32))
                total_inside += tl.sum(tl.where(ok, tl.exp(tl.maximum((z - top) * inverse, CLAMP)), 0.0), axis=0)
        least = threshold_by_mass(
            logits, work, row, live, floor_s, temperature,
            in_block, count, least, hi, top_p * total_inside, top, M, PER_ROW, GROUP, PER_READ,
        )  # fmt: skip
    kept = tl.full((), 0, tl.int32)
    mass_kept = tl.full((), 0.0, tl.float32)
    for number in range(parts):
        z, s, ids, ok = read_block(
            logits, work, row, number, live, floor_s,
            temperature, in_block, count, M, PER_ROW, GROUP, PER_READ,
        )  # fmt: skip
        rel = (z - top) * inverse
        ok = ok & (key_of(s) >= least.to(tl.int32)) & (rel >= log_min_p)
        kept += tl.sum(ok.to(tl.int32), axis=0)
        mass_kept += tl.sum(tl.where(ok, tl.exp(tl.maximum(rel, CLAMP)), 0.0), axis=0)
    return least, floor_s, live, count, in_block, parts, kept, mass_kept
