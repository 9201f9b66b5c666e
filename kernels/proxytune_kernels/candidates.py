"""Candidates for a truncated draw: a bound that leaves few tokens, from the groups' maxima, checked afterwards.

Tokens above the j-th largest group maximum lie in the groups whose maximum is above it. They are gathered, and only
then it is checked whether they suffice for the k largest, the mass p, or the top 20; if not, j grows. Thresholds are
found by bisection on the ordered bits of float32, so they are exact. Where more candidates than are stored can be in
question, the row is sorted instead, see `runs`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP, combined, key_of, value_of

__all__ = ["count_from", "gather", "group_bound", "read_block", "threshold_by_count", "threshold_by_sum"]


@triton.jit
def group_bound(g, present, wanted, n_groups):
    """A number that at least `wanted` group maxima reach, and not many more; −inf if that is all of them.

    `g`: block of group maxima; `present`: which are above −inf.
    """
    key = key_of(g)
    count = tl.sum(present.to(tl.int32), axis=0)
    lo = tl.min(tl.where(present, key, 2147483647), axis=0).to(tl.int64)
    hi = tl.max(tl.where(present, key, -2147483648), axis=0).to(tl.int64) + 1
    everything = (wanted >= n_groups) | (count <= wanted)
    # A few more than wanted do no harm, so the search stops early.
    while (hi - lo > 1) & (count > wanted + (wanted >> 2)):
        mid = lo + (hi - lo) // 2
        reached = tl.sum((present & (key >= mid.to(tl.int32))).to(tl.int32), axis=0)
        if reached >= wanted:
            lo = mid
            count = reached
        else:
            hi = mid
    return tl.where(everything, float("-inf"), value_of(lo.to(tl.int32)))


@triton.jit
def read_block(
    logits, work, row, number, live, floor_s, temperature,
    in_block, count, M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """One part of the candidates: the stored ones, or those of PER_READ live groups, read again.

    Args:
        logits: See the package.
        work: See the package.
        row: The row.
        number: Which part; 0 if the candidates are stored.
        live: Number of live groups.
        floor_s: The candidates' bound, over the temperature.
        temperature: Scalar.
        in_block: Whether the candidates are stored.
        count: Number of stored candidates.
        M: Number of members.
        PER_ROW: See the package.
        GROUP: See the package.
        PER_READ: See the package.

    Returns:
        Blocks of `PER_READ · GROUP`: combined logits, these over the temperature, columns, and which are candidates.
    """
    BLOCK: tl.constexpr = PER_READ * GROUP
    at = tl.arange(0, BLOCK)
    if in_block:
        there = at < count
        z = tl.load(work[1] + at, mask=there, other=float("-inf"))
        ids = tl.load(work[2] + at, mask=there, other=2147483647)
    else:
        slot = number * PER_READ + at // GROUP
        group = tl.load(work[0] + slot, mask=slot < live, other=0)
        ids = group * GROUP + at % GROUP
        z, base = combined(logits, row, ids, M, PER_ROW, False)
        z = tl.where(slot < live, z, float("-inf"))
    # As in transformers, tokens tie if their logits are equal after the (rounded) division by T.
    s = tl.div_rn(z, temperature)
    return z, s, ids, (z > float("-inf")) & (s >= floor_s)


@triton.jit
def gather(
    logits, work, row, is_live, live, floor_s, temperature, top, most,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
):  # fmt: skip
    """List the live groups (those with candidates), count their candidates, and store the first `PER_READ · GROUP`.

    `is_live`: block of groups, `live` of them; `floor_s`: the candidates' bound over T. Stops once there
    are more than `most`.

    Returns:
        The number of candidates, and their mass Σ exp((z − top)/T).
    """
    inverse = tl.div_rn(1.0, temperature)
    place = tl.cumsum(is_live.to(tl.int32), axis=0) - 1
    # Other threads read what is written here, and may still be reading the previous content.
    tl.debug_barrier()
    tl.store(work[0] + place, tl.arange(0, GROUPS_PADDED), mask=is_live)
    tl.debug_barrier()
    BLOCK: tl.constexpr = PER_READ * GROUP
    count = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    number = tl.full((), 0, tl.int32)
    while (number * PER_READ < live) & (count <= most):
        z, s, ids, ok = read_block(
            logits, work, row, number, live, floor_s, temperature,
            False, 0, M, PER_ROW, GROUP, PER_READ,
        )  # fmt: skip
        to = tl.cumsum(ok.to(tl.int32), axis=0) - 1 + count
        tl.store(work[1] + to, z, mask=ok & (to < BLOCK))
        tl.store(work[2] + to, ids, mask=ok & (to < BLOCK))
        count += tl.sum(ok.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(ok, tl.exp(tl.maximum((z - top) * inverse, CLAMP)), 0.0), axis=0)
        number += 1
    tl.debug_barrier()
    return count, mass


@triton.jit
def count_from(key, ok, least):
    """How many keys of a block are ≥ `least`, of those that are `ok`."""
    return tl.sum((ok & (key >= least)).to(tl.int32), axis=0)


@triton.jit
def threshold_by_count(
    logits, work, row, live, floor_s, temperature, in_block, count,
    lo, hi, wanted, M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """The largest key (int64) that `wanted` candidates reach, by bisection; `lo` if there are fewer candidates.

    All candidates reach the key `lo` and none reaches `hi`; the other arguments are as in `read_block`.
    """
    parts = tl.where(in_block, 1, tl.cdiv(live, PER_READ))
    z, s, ids, ok = read_block(
        logits, work, row, 0, live, floor_s, temperature,
        in_block, count, M, PER_ROW, GROUP, PER_READ,
    )  # fmt: skip
    key = key_of(s)
    while hi - lo > 1:
        mid = lo + (hi - lo) // 2
        reached = count_from(key, ok, mid.to(tl.int32))
        for number in range(1, parts):
            z, s, ids, more = read_block(
                logits, work, row, number, live, floor_s,
                temperature, in_block, count, M, PER_ROW, GROUP, PER_READ,
            )  # fmt: skip
            reached += count_from(key_of(s), more, mid.to(tl.int32))
        if reached >= wanted:
            lo = mid
        else:
            hi = mid
    return lo


@triton.jit
def threshold_by_sum(key, e, lo, hi, wanted):
    """The largest key (int64) at and above which the weights `e` sum to `wanted`, by bisection; `lo` if none does.

    All that counts has a key of at least `lo`, and none reaches `hi`.
    """
    while hi - lo > 1:
        mid = lo + (hi - lo) // 2
        if tl.sum(tl.where(key >= mid.to(tl.int32), e, 0.0), axis=0) >= wanted:
            lo = mid
        else:
            hi = mid
    return lo
