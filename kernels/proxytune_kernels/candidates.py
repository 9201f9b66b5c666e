"""Candidates for a truncated draw: a bound that leaves few tokens, from the groups' maxima, checked afterwards.

Tokens above the j-th largest group maximum lie in the groups whose maximum is above it. They are gathered, and only
then it is checked whether they suffice for the k largest, the mass p, or the top 20; if not, j grows. For a small j the
maxima of a few neighbouring groups do as well, and each counts how many are above it: one reduction. Else the bound is
found by bisection on the ordered bits of float32. Where more candidates than are stored can be in question, the row is
sorted instead, see `runs`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import combined, combined_unmasked, key_of, value_of

__all__ = [
    "EIGHT", "FEW", "LISTED", "UNITS", "at_once", "count_from", "gather", "group_bound", "list_live", "lowered",
    "read_block", "threshold_by_count", "threshold_by_sum", "unit_bound",
]  # fmt: skip

UNITS = tl.constexpr(64)
"""Into how many units of neighbouring groups a row is divided."""
FEW = tl.constexpr(128)
"""Candidates that are compared each with each."""
LISTED = tl.constexpr(3)
"""Where in its workspace the list of live groups begins: behind its length, and two numbers of `at_once`."""
EIGHT = tl.constexpr(8)
ODD = tl.constexpr(1 << 8)
MANY = tl.constexpr(1 << 14)
"""More than the candidates of `at_once`; added to their number for each place with more than two."""


@triton.jit
def unit_bound(g, wanted, GROUPS_PADDED: tl.constexpr):
    """A number that at least `wanted` group maxima reach, −inf if there are fewer; and the largest of all.

    Not many more reach it if `wanted` is up to twice UNITS: of each unit the three largest are counted, of equal ones
    one. `g`: block of group maxima.
    """
    PER_UNIT: tl.constexpr = (GROUPS_PADDED + UNITS - 1) // UNITS
    if PER_UNIT == 1:
        largest = g
        reached = (largest[:, None] >= largest[None, :]).to(tl.int32)
    else:
        unit = tl.reshape(g, (UNITS, PER_UNIT))
        largest = tl.max(unit, axis=1)
        second = tl.max(tl.where(unit < largest[:, None], unit, float("-inf")), axis=1)
        third = tl.max(tl.where(unit < second[:, None], unit, float("-inf")), axis=1)
        bound = largest[None, :]
        reached = tl.where(second[:, None] >= bound, 2, (largest[:, None] >= bound).to(tl.int32))
        reached = tl.where(third[:, None] >= bound, 3, reached)
    reached = tl.sum(reached, axis=0)
    return tl.split(tl.max(tl.join(tl.where(reached >= wanted, largest, float("-inf")), largest), axis=0))


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
def lowered(floor, temperature):
    """A bound so little lower that it lets through all logits which tie with `floor` after the division by T.

    As in transformers, tokens tie if their logits are equal after that, rounded. Where the quotient is normal, such
    logits differ by less than 2⁻²² of themselves, else by less than T · 2⁻¹⁴⁸.
    """
    return floor - (tl.abs(floor) * 9.5367431640625e-07 + temperature * 7.174648137343064e-43)


@triton.jit
def list_live(work, is_live, FIRST: tl.constexpr, PARTS: tl.constexpr, GROUPS_PADDED: tl.constexpr):
    """List the live groups (those with candidates). No thread may still be reading the previous list.

    Returns:
        Their number, and the first of them: a block of FIRST, and one of PARTS in which each is repeated.
    """
    at = tl.arange(0, GROUPS_PADDED)
    places = tl.cumsum(is_live.to(tl.int32), axis=0)
    tl.store((work[0] + LISTED - 1) + places, at, mask=is_live)
    last = at == GROUPS_PADDED - 1
    tl.store(work[0] + tl.zeros_like(at), places, mask=last)
    tl.store(work[0] + 1 + tl.zeros_like(at), tl.zeros_like(at), mask=last)
    tl.debug_barrier()
    group = tl.load(work[0] + LISTED + tl.arange(0, FIRST))
    return tl.load(work[0]), group, tl.load(work[0] + LISTED + tl.arange(0, PARTS) // (PARTS // FIRST))


@triton.jit
def at_once(
    logits, work, row, live, group, of_part, limit, inside,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """`gather` for up to AT_ONCE live groups, which are read at once, without masks.

    Each thread marks the candidates among EIGHT neighbours by bits, and lists two of them; more where there are more.
    `group`, `of_part`: blocks of `list_live`; `inside`: columns that every member has, at least GROUP.

    Returns:
        The number of candidates; −1 if they have to be gathered anew: a group is not inside every member, or a logit in
        it is not finite.
    """
    PARTS: tl.constexpr = GROUP // EIGHT
    slot = tl.arange(0, AT_ONCE)
    part = tl.arange(0, AT_ONCE * PARTS)
    columns = tl.arange(0, GROUP)
    full = inside // GROUP
    column = of_part * GROUP + part % PARTS * EIGHT
    there = (slot < live) & (group < full)
    ids = tl.where(there, group, 0)[:, None] * GROUP + columns[None, :]
    z, base = combined_unmasked(logits, row, ids, M, PER_ROW)
    ok = z >= tl.where(there, limit, float("inf"))[:, None]
    marks = tl.where(ok, (1 << (columns % EIGHT))[None, :], 0)
    marks = tl.where(tl.abs(z) < float("inf"), marks, ODD)  # that of NaN is not, either
    marks = tl.sum(tl.reshape(marks, (AT_ONCE * PARTS, EIGHT)), axis=1)
    odd = (part // PARTS < live) & ((marks >= ODD) | (column >= full * GROUP))
    tl.store(work[0] + 1 + tl.zeros_like(part), tl.full((AT_ONCE * PARTS,), 1, tl.int32), mask=odd)
    marks = marks % ODD
    number = marks - ((marks >> 1) & 0x55)
    number = (number & 0x33) + ((number >> 2) & 0x33)
    number = (number & 15) + (number >> 4)
    length = number + tl.where(number > 2, MANY, 0)
    places = tl.cumsum(length, axis=0)
    to = (places - length) % MANY
    tl.store(work[0] + 2 + tl.zeros_like(part), places, mask=part == AT_ONCE * PARTS - 1)
    for i in tl.static_range(2):
        marks = _list_one(work, marks, column, to + i, BLOCK)
    tl.debug_barrier()
    found = tl.load(work[0] + 2)
    if found >= MANY:
        for rank in range(2, EIGHT):
            marks = _list_one(work, marks, column, to + rank, BLOCK)
        tl.debug_barrier()
    return tl.where(tl.load(work[0] + 1) == 0, found % MANY, -1)


@triton.jit
def _list_one(work, marks, column, to, BLOCK: tl.constexpr):
    """Store the column of each lowest bit, and return the other bits."""
    place = (((marks & -marks).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
    # If there are more than BLOCK, the content counts no longer.
    tl.store(work[1] + tl.minimum(to, BLOCK - 1), column + place, mask=marks > 0)
    return marks & (marks - 1)


@triton.jit
def read_block(
    logits, work, row, number, live, limit,
    in_block, count, M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """One part of the candidates: the stored ones, or those of PER_READ live groups.

    Args:
        logits: See the package.
        work: See the package.
        row: The row.
        number: Which part; 0 if the candidates are stored.
        live: Number of live groups.
        limit: The candidates' bound.
        in_block: Whether the candidates are stored.
        count: Number of stored candidates.
        M: Number of members.
        PER_ROW: See the package.
        GROUP: See the package.
        PER_READ: See the package.

    Returns:
        Blocks of `PER_READ · GROUP`: combined logits, columns, and which are candidates.
    """
    BLOCK: tl.constexpr = PER_READ * GROUP
    at = tl.arange(0, BLOCK)
    if in_block:
        there = at < count
        ids = tl.load(work[1] + at, mask=there, other=2147483647)
    else:
        there = number * PER_READ + at // GROUP < live
        group = tl.load(work[0] + LISTED + number * PER_READ + at // GROUP, mask=there, other=0)
        ids = group * GROUP + at % GROUP
    z, base = combined(logits, row, tl.where(there, ids, 2147483647), M, PER_ROW, False)
    return z, ids, (z > float("-inf")) & (z >= limit)


@triton.jit
def gather(
    logits, work, row, live, limit, most,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """Count the candidates in the groups of `list_live`, and list the columns of the first `PER_READ · GROUP`.

    `live`: number of these groups. Stops once there are more candidates than `most`.
    """
    BLOCK: tl.constexpr = PER_READ * GROUP
    count = tl.full((), 0, tl.int32)
    number = tl.full((), 0, tl.int32)
    tl.debug_barrier()
    while (number * PER_READ < live) & (count <= most):
        z, ids, ok = read_block(logits, work, row, number, live, limit, False, 0, M, PER_ROW, GROUP, PER_READ)
        to = tl.cumsum(ok.to(tl.int32), axis=0) - 1 + count
        tl.store(work[1] + to, ids, mask=ok & (to < BLOCK))
        count += tl.sum(ok.to(tl.int32), axis=0)
        number += 1
    tl.debug_barrier()
    return count


@triton.jit
def count_from(key, ok, least):
    """How many keys of a block are ≥ `least`, of those that are `ok`."""
    return tl.sum((ok & (key >= least)).to(tl.int32), axis=0)


@triton.jit
def threshold_by_count(
    logits, work, row, live, limit, in_block, count,
    lo, hi, wanted, M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr,
):  # fmt: skip
    """The largest key (int64) of a logit that `wanted` candidates reach, by bisection; `lo` if there are fewer.

    All candidates reach the key `lo` and none reaches `hi`; the other arguments are as in `read_block`.
    """
    parts = tl.where(in_block, 1, tl.cdiv(live, PER_READ))
    z, ids, ok = read_block(logits, work, row, 0, live, limit, in_block, count, M, PER_ROW, GROUP, PER_READ)
    key = key_of(z)
    while hi - lo > 1:
        mid = lo + (hi - lo) // 2
        reached = count_from(key, ok, mid.to(tl.int32))
        for number in range(1, parts):
            z, ids, more = read_block(
                logits, work, row, number, live, limit, in_block, count, M, PER_ROW, GROUP, PER_READ
            )  # fmt: skip
            reached += count_from(key_of(z), more, mid.to(tl.int32))
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
