"""Exact top-k, top-p and min-p from few tokens.

All three keep the likeliest tokens, so together they are one bound: the least logit that is kept. On the CPU it is
found among candidates, those of the groups with the largest maxima; rows are taken some at a time, so that flat rows
need no memory for all of them at once. Elsewhere sizes must be known without waiting for the device, so all tokens are
sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import Array, as_float, at_least, columns_of_largest, filled, largest
from proxytune.ops.torch_impl.measure import settings_of
from proxytune.ops.torch_impl.rows import CLAMP, FINITE, GROUP, MASKED, MemberRows

__all__ = ["Truncation", "mean_of_largest", "truncated"]

_GROUPS = 32
"""Groups that candidates are first taken from for top-p and min-p."""

_MORE = 8
"""By how much these are multiplied if they do not suffice."""

_AT_ONCE = 1024
"""Groups of candidates that are looked at together, unless one row has more: half a megabyte of float32."""


@dataclass(frozen=True, eq=False)
class Truncation:
    """What truncation leaves of rows; undefined in rows without truncation or without a distribution.

    Attributes:
        index: Which rows these are: `[b]`, int64, or all of them as a slice.
        least: `[b, 1]`: the least logit that is kept.
        log_kept: `[b, 1]`: log Σ e^((z − top) / T) over those that are kept.
        kept: `[b]`, int64: how many.
        tokens: Gives the ids `[b, n]`, integers by rising id, and the logits `[b, n]` of the kept tokens; among them
            are others at −inf.
    """

    index: Array | slice
    least: Array
    log_kept: Array
    kept: Array
    tokens: Callable[[], tuple[Array, Array]]


def truncated(
    rows: MemberRows,
    groups: Array,
    top: Array,
    temperature: Array,
    total: Array,
    sampling: SamplingParams,
    use: Callable[[Truncation], dict[str, Array]],
) -> dict[str, Array]:
    """Find what is kept, and make of it what `use` makes of some rows at a time: by name, arrays `[b, …]`.

    `groups` `[B, groups]` are the groups' maxima; `total` `[B]`, Σ e^((z − top) / T) over all columns, matters for
    top-p without top-k. Returns arrays `[B, …]`.
    """
    settings = settings_of(rows, sampling)
    if not rows.on_host:
        return use(_of_all(rows, top, temperature, total, settings))
    out: dict[str, Array] = {}
    left = np.arange(rows.count)
    take = settings.truncated * np.where(settings.top_k > 0, settings.top_k, _GROUPS).astype(np.int64)  # groups
    while len(left):
        failed = []
        for index in _parts(left, np.minimum(take[left], groups.shape[1])):
            every = len(index) == rows.count
            found, enough = _of_candidates(
                rows, slice(None) if every else index, index, groups, take, top, temperature, total, settings
            )
            if not enough.all():
                failed.append(index[~enough])
                if not enough.any():
                    continue
                found = _only(found, index, enough)
            part = use(found)
            if every and enough.all():
                return part
            for name, x in part.items():
                if name not in out:
                    out[name] = np.zeros((rows.count, *x.shape[1:]), x.dtype)
                out[name][found.index] = x
        left = np.concatenate(failed) if failed else left[:0]
        take[left] *= _MORE
    return out


def _parts(rows: Array, groups: Array) -> list[Array]:
    """Rows `[b]` in parts of about `_AT_ONCE` groups, `[b]` of which are taken in each."""
    most = int(groups.max())
    if most * len(rows) <= _AT_ONCE:
        return [rows]
    number = np.arange(len(rows)) // max(1, _AT_ONCE // most)
    return np.split(rows, np.flatnonzero(number[1:] != number[:-1]) + 1)


def _only(found: Truncation, index: Array, which: Array) -> Truncation:
    def tokens() -> tuple[Array, Array]:
        ids, z = found.tokens()
        return ids[which], z[which]

    return Truncation(index[which], found.least[which], found.log_kept[which], found.kept[which], tokens)


def _of_candidates(
    rows: MemberRows, index: Array | slice, numbers: Array, groups: Array, take: Array,
    top: Array, temperature: Array, total: Array, settings: Any,
) -> tuple[Truncation, Array]:  # fmt: skip
    """What is kept of the rows `index`, from `take` groups of each, and whether that many suffice, `[b]`."""
    count, width = len(numbers), groups.shape[1]
    groups, take, top, total = groups[index], take[index], top[index], total[index]
    t = temperature[index][:, None]
    inverse = 1.0 / t
    k, p, log_min_p = settings.top_k[index], settings.top_p[index], settings.log_min_p[index]
    # Every logit that reaches the floor, or ties with it after the division by T, is in one of these groups.
    reached_by = np.minimum(np.maximum(take, 1), width)
    if (reached_by == reached_by[0]).all():
        first = width - int(reached_by[0])
        floor = np.sort(groups, 1)[:, first]  # not np.partition, see `columns_of_largest`
    else:
        floor = np.sort(groups, 1)[np.arange(count), -reached_by]
    floor = np.where(take >= width, np.float32(-np.inf), floor)
    # As in transformers, tokens tie if their logits are equal after the (rounded) division by T.
    bound = floor[:, None] / t
    live = (groups / t >= bound) & (groups > -np.inf)
    if not settings.all_truncated:
        live &= settings.truncated[index][:, None]
    row, group = live.nonzero()
    z = rows.groups_at(row if isinstance(index, slice) else numbers[row], group)  # [N, GROUP]
    above = z / t[row] >= bound[row]
    above &= z > -np.inf
    candidates = z[above]
    found = _counts(row, above, len(candidates), count)  # [b]
    falling = _packed(candidates, found)
    falling.sort(1)
    falling = falling[:, ::-1]  # [b, n]
    relative = (falling - top[:, None]) * inverse
    by_min_p = (relative >= log_min_p[:, None]).sum(1)
    # Sequential sums in float64, rounded, so that a row's do not depend on the width of the batch. e^x and ln as on
    # other devices, to the bit. All on the same memory.
    reached = np.maximum(relative, CLAMP, out=relative)
    in_torch = torch.from_numpy(reached).exp_()
    reached *= falling > -np.inf
    in_torch.cumsum_(1)
    whole = np.arange(count)

    def at(x: Array, place: Array) -> Array:
        return x[whole, np.minimum(place, x.shape[1] - 1)]

    tied = falling / t
    by_k = np.where(k > 0, (tied >= at(tied, k - 1)[:, None]).sum(1), found)
    by_k = np.minimum(by_k, found)
    whole_mass = np.where(k > 0, at(reached, by_k - 1), total)
    short = (reached < (p * whole_mass)[:, None]).sum(1)  # the first that reaches p has that many before it
    by_p = np.where((p < 1) & (short < by_k), (tied >= at(tied, short)[:, None]).sum(1), found)
    kept = np.minimum(np.minimum(by_k, by_p), by_min_p)
    del tied
    nothing_below = (floor - top) * inverse[:, 0] < log_min_p
    by_count = (found >= k) | (nothing_below & (p == 1))
    if not (by_count & (k > 0)).all():
        by_mass = nothing_below | ((at(reached, found - 1) >= p * total) & (p < 1))
        enough = np.where(k > 0, by_count, by_mass)
        enough |= ~settings.truncated[index] | (floor == -np.inf) | ~(top < np.inf)
    else:
        enough = by_count
    least = at(falling, kept - 1)[:, None]

    def tokens() -> tuple[Array, Array]:
        inside = z >= at_least(least, FINITE)[row]  # never −inf
        flat = np.flatnonzero(inside)
        counts = _counts(row, inside, len(flat), count)
        logits = z.reshape(-1)[flat]
        ids = group.astype(np.int32)[flat // GROUP]
        ids *= GROUP
        ids += (flat % GROUP).astype(np.int32)
        return _packed(ids, counts), _packed(logits, counts)

    log_kept = at(reached, kept - 1)[:, None]
    torch.from_numpy(log_kept).log_()
    return Truncation(index, least, log_kept, kept, tokens), enough


def _counts(row: Array, which: Array, total: int, rows: int) -> Array:
    """How many of each of `rows` rows are True in `which` `[N, GROUP]`, parts of the rows `row` `[N]`."""
    return np.array([total]) if rows == 1 else np.bincount(row, which.sum(1), rows).astype(np.int64)


def _packed(x: Array, counts: Array) -> Array:
    """Numbers of rows, `counts` `[b]` of each, as `[b, n]`, filled up with −inf, integers with 0."""
    width = max(1, int(counts.max()))
    if len(counts) == 1 and width == len(x):
        return x[None]
    out = (
        np.full((len(counts), width), -np.inf, x.dtype)
        if x.dtype == np.float32
        else np.zeros((len(counts), width), x.dtype)
    )
    out[np.arange(width) < counts[:, None]] = x
    return out


def _of_all(rows: MemberRows, top: Array, temperature: Array, total: Array, settings: SamplingParams) -> Truncation:
    """What is kept of all rows, without looking at a value."""
    k, p = settings.top_k[:, None], settings.top_p[:, None]  # [B, 1]
    ids = torch.arange(rows.width, device=top.device).expand(rows.count, -1)
    z = rows.at(ids)
    falling = z.sort(dim=1, descending=True).values
    s = falling / temperature[:, None]
    relative = (falling - top[:, None]) * temperature.reciprocal()[:, None]
    real = falling > -torch.inf
    e = relative.clamp(min=CLAMP).exp() * real
    reached = e.cumsum(1)
    lowest = s.gather(1, (k.long() - 1).clamp(min=0))
    inside = real & ((s >= lowest) | (k == 0))
    whole_mass = torch.where(k > 0, (e * inside).cumsum(1)[:, -1:], total[:, None])
    reaching = (reached >= p * whole_mass) & inside & (p < 1)
    first = reaching.int().argmax(1, keepdim=True)
    nucleus = torch.where(reaching.gather(1, first), s.gather(1, first), -torch.inf)
    kept = inside & (s >= nucleus) & (relative >= settings.log_min_p[:, None])
    least = falling.masked_fill(~kept, torch.inf).amin(1, keepdim=True)

    def tokens() -> tuple[Array, Array]:
        return ids, z.masked_fill(~(z >= least), -torch.inf)

    return Truncation(slice(None), least, (e * kept).cumsum(1)[:, -1:].log(), kept.sum(1), tokens)


def mean_of_largest(rows: MemberRows, groups: Array, top: Array, count: int) -> Array:
    """The mean of each row's `count` largest logits (or all unmasked, if fewer), relative to the largest, `[B]`."""
    # The n largest tokens lie in the n groups with the largest maxima.
    most = min(count, groups.shape[1])
    if rows.on_host:
        best = columns_of_largest(groups, most)
        z = rows.groups_at(np.arange(rows.count).repeat(most), best.reshape(-1)).reshape(rows.count, -1)
        z = np.sort(z, 1)[:, -count:]
    else:
        best = groups.topk(most, dim=1).indices
        columns = torch.arange(GROUP, device=groups.device)
        z, _ = largest(rows.at((best[..., None] * GROUP + columns).flatten(1)), count)
    relative = z - top[:, None]
    real = relative > MASKED
    return filled(relative, ~real, 0.0).sum(1) / as_float(real.sum(1))
