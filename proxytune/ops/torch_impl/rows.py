"""The members' logits of a step, read in blocks and combined."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch

from proxytune.formulas.shift import shift
from proxytune.ops.combination import Combination, Weights
from proxytune.ops.torch_impl.arrays import Array, filled, joined, largest

__all__ = [
    "CLAMP", "FINITE", "GROUP", "MASKED", "TILE", "MemberRows", "block_of", "combined", "first_largest", "shift_by",
]  # fmt: skip


TILE = 1024
"""Columns per tile. It keys the noise, so it is part of the contract."""

GROUP = 128
"""Columns per group maximum."""

FINITE = -3.0e38
"""Stands for the maximum of a row of −inf, since −inf − −inf is NaN."""

CLAMP = -200.0
"""Lower bound of exponents: exp() is 0 below about −104 in float32, and 0 · −inf would be NaN."""

MASKED = -5000.0
"""So far below the largest logit, nats, a token is masked by a finite number (finfo.min of float16 is −65504)."""

# Tiles per block and thread on the CPU: half a megabyte of float32. Smaller blocks spend their time in calls, larger
# ones only take more memory.
_BLOCK = 128

# Parts of the columns per pass on other devices, where calls cost more than memory.
_PARTS = 8


class MemberRows:
    """The members' rows with their weights; nothing is computed before `read` or `at`.

    Attributes:
        width: The base's number of columns V.
        on_host: Whether the device is the CPU. Then values may be inspected, and small arrays are NumPy's; elsewhere
            looking at one would wait for the device.
    """

    def __init__(self, members: Sequence[torch.Tensor], weights: Weights) -> None:
        self._members = members
        self._combination = weights if isinstance(weights, Combination) else Combination(weights)
        self._index: torch.Tensor | None = None
        self._held: Array = None
        self._places: Array = None  # where the rows are in it; None for all
        self.count, self.width = members[0].shape
        self.device = members[0].device

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return self._device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device, self.on_host = device, device.type == "cpu"

    @property
    def tracked(self) -> bool:
        """Whether gradients would be recorded."""
        c = self._combination
        given = (*self._members, c.weights, c.offsets, c.floors)
        return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)

    def pick(self, index: Array) -> MemberRows:
        """The rows `index`, `[N]`, int64; no logits are copied before they are read."""
        picked = copy(self)
        if self._held is not None:
            picked._places = index if self._places is None else self._places[index]
        index = torch.from_numpy(index) if isinstance(index, np.ndarray) else index
        picked._index = index if self._index is None else self._index.index_select(0, index)
        picked.count = len(index)
        picked._combination = self._combination.pick(index)
        return picked

    def small(self, x: torch.Tensor) -> Array:
        """A small tensor as calculations go on with it: on the CPU as a NumPy array on the same memory."""
        return x.numpy() if self.on_host else x

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised float32 memory on the rows' device."""
        return torch.empty(shape, dtype=torch.float32, device=self._members[0].device)

    def hold(self, z: Array) -> None:
        """Keep the combined logits, `[B, ≥ V]` with −inf past the end, for `at` and `groups_at`; CPU only."""
        self._held = z

    def read(
        self, rows: slice, columns: slice, out: torch.Tensor, place: Callable[[str], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, bool]:
        """Write the combined logits of a block to `out`, float32; `place` gives memory like `out` by a name.

        Returns:
            The base's own logits there, in its dtype; and whether all combined ones are known to be finite.
        """
        every = rows.start == 0 and rows.stop >= self.count
        members: Sequence[torch.Tensor] = self._members
        if self._index is not None:
            members = [x[:, columns].index_select(0, self._index[rows]) for x in members]
        elif not every or columns.start > 0 or columns.stop < max(x.shape[1] for x in members):
            members = [x[rows, columns] for x in members]
        c = self._combination if every else self._combination.pick(rows)
        base, companions = members[0], members[1:]
        if not self.on_host:
            shift_by(base, companions, c, out)
            return base, False
        z, finite = _if_finite(base, companions, c, out, place)
        if z is None:
            shift_by(base, companions, c, out)
        return base, finite

    def at(self, ids: Array) -> Array:
        """The combined logits at columns `ids` `[B, n]`, float32, bit for bit as `read` gives; −inf past the end."""
        if self._held is None:
            return self.small(self._gathered(None, torch.from_numpy(ids) if self.on_host else ids))
        row = (np.arange(self.count) if self._places is None else self._places)[:, None]
        outside = ids >= self.width
        if outside.any():
            return filled(self._held[row, np.minimum(ids, self.width - 1)], outside, -np.inf)
        return self._held[row, ids]

    def groups_at(self, row: Array, group: Array) -> Array:
        """The combined logits of groups of columns: `[N, GROUP]` for rows and groups `[N]`; CPU only."""
        whole = len(row) == -(-self.width // GROUP) and row[0] == row[-1]  # all of one row
        if self._held is not None:
            row = row if self._places is None else self._places[row]
            if whole:
                return self._held[row[0]].reshape(-1, GROUP)[: len(row)]
            return self._held.reshape(len(self._held), -1, GROUP)[row, group]
        if whole:
            z = self.empty(1, len(row) * GROUP)
            z[:, self.width :] = -torch.inf
            self.read(slice(row[0], row[0] + 1), slice(0, self.width), z[:, : self.width])
            return z.view(-1, GROUP).numpy()
        columns = torch.from_numpy(group[:, None] * GROUP + np.arange(GROUP))
        return self._gathered(torch.from_numpy(row), columns).numpy()

    def _gathered(self, row: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        """The combined logits at columns `ids` `[n, m]` of rows `row` `[n]`, None for all; −inf past the end."""
        # On the CPU the largest id tells which members are wide enough to need no mask.
        end = int(ids.numpy().max(initial=-1)) + 1 if self.on_host else None
        there = self._index if row is None or self._index is None else self._index.index_select(0, row)
        there = row if there is None else there

        def taken(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return x.gather(1, ids) if there is None else x[there[:, None], ids]

        def picked(x: torch.Tensor) -> torch.Tensor:
            if end is not None and end <= x.shape[1]:
                return taken(x, ids)
            # −inf past a companion's width means "no shift", past the base's "no such token".
            return taken(x, ids.clamp(max=x.shape[1] - 1)).masked_fill_(ids >= x.shape[1], -torch.inf)

        base, *companions = (picked(x) for x in self._members)
        c = self._combination if row is None else self._combination.pick(row)
        if self.on_host:
            z, _ = _if_finite(base, companions, c, None, None)
            if z is not None:
                return z
        return shift_by(base, companions, c)


def _if_finite(
    base: torch.Tensor, companions: Sequence[torch.Tensor], c: Combination, out: torch.Tensor | None,
    place: Callable[[str], torch.Tensor] | None,
) -> tuple[torch.Tensor | None, bool]:  # fmt: skip
    """`shift_by` to the bit, in few operations, where companions are finite and the base's weight is positive.

    Returns:
        The combined logits, None if it cannot be done so (then `out` is undefined); and whether all of them are known
        to be finite.
    """
    w, width = c.weights, base.shape[1]
    if c.offsets is not None or c.floors is not None:
        return None, False
    if isinstance(w, torch.Tensor):
        own = w.detach().numpy()[:, :1]
        if not (own > 0).all() or any(x.shape[1] < width for x in companions):
            return None, False
        scale: Any = None if (own == 1).all() else torch.from_numpy(own)
        heard: list[tuple[torch.Tensor, Any]] = [(x, w.detach()[:, i : i + 1]) for i, x in enumerate(companions, 1)]
    else:
        if not w[0] > 0:
            return None, False
        scale = None if w[0] == 1.0 else w[0]
        heard = [(x, weight) for x, weight in zip(companions, w[1:], strict=True) if weight != 0.0]
    shape = (base.shape[0], min([width, *(x.shape[1] for x, _ in heard)]))
    delta: torch.Tensor | None = None
    for x, weight in heard:
        x = x[:, : shape[1]] if x.shape[1] > shape[1] else x
        name = "delta" if delta is None else "term"
        term = torch.empty(shape, dtype=torch.float32, device=x.device) if place is None else place(name)
        term = term if term.shape[1] == shape[1] else term[:, : shape[1]]
        # One after the other, each step rounded, as in `shift`. x − y has the bits of x + (−1)y.
        each = isinstance(weight, torch.Tensor)
        minus = not each and weight == -1.0 and delta is not None
        scaled = not minus and (each or weight != 1.0)
        if scaled and x.dtype == torch.float32:
            torch.mul(x, weight, out=term)
        else:
            term.copy_(x)
            if scaled:
                term.mul_(weight)
        delta = term if delta is None else delta.sub_(term) if minus else delta.add_(term)
    if scale is None and delta is not None and shape[1] == width:
        if out is None or base.dtype == torch.float32:
            out = torch.add(base, delta, out=out) if out is not None else base + delta
        else:
            out.copy_(base).add_(delta)
        if math.isfinite(float(out.sum())):  # a finite sum has no infinite or NaN term
            return out, True
        return (out if math.isfinite(float(delta.sum())) else None), False
    if delta is not None and not math.isfinite(float(delta.sum())):
        return None, False
    out = base.to(torch.float32, copy=True) if out is None else out.copy_(base)
    if scale is not None:
        out.mul_(scale)
    if delta is not None:
        out[:, : shape[1]].add_(delta)
    return out, False


class Scratch:
    """Blocks of float32 on the CPU, made when they are first needed, and used again."""

    def __init__(self) -> None:
        self._made: dict[str, Array] = {}

    def get(self, name: str, high: int, wide: int) -> Array:
        """`[high, wide]`, undefined; what it gave under that name before is overwritten."""
        x = self._made.get(name)
        if x is None or x.size < high * wide:
            x = self._made[name] = np.empty((high, wide), np.float32)
        return x if x.shape == (high, wide) else x.reshape(-1)[: high * wide].reshape(high, wide)


_kept = threading.local()


def kept_scratch(rows: int, width: int) -> Scratch:
    """The thread's scratch memory for rows `[B, V]`: that of the last call, if it had as many.

    A decoding loop has the same shape in each step, and new memory costs as much as filling it: the system hands out
    pages of zeros. Only a step that returns no view of it may use it.
    """
    if getattr(_kept, "shape", None) != (rows, width):
        _kept.shape, _kept.scratch = (rows, width), Scratch()
    found: Scratch = _kept.scratch
    return found


def shift_by(
    base: torch.Tensor, companions: Sequence[torch.Tensor], c: Combination, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`proxytune.formulas.shift.shift` of rows `[B, V_i]`, as a Combination says."""
    w = c.weights
    own, theirs = (w[:, 0], w[:, 1:]) if isinstance(w, torch.Tensor) else (w[0], w[1:])
    return shift(base, companions, theirs, own, out, offsets=c.offsets, floors=c.floors, floored_by=c.floored_by)


def combined(rows: MemberRows) -> torch.Tensor:
    """The combined logits `[B, V]`, float32, computed in parts: no other tensor of that size is made."""
    out = rows.empty(rows.count, rows.width)
    high, wide = block_of(rows)
    if not rows.on_host:
        wide = -(-wide // _PARTS)
    if high >= rows.count and wide * TILE >= rows.width:
        rows.read(slice(0, rows.count), slice(0, rows.width), out)
        return out
    for row in range(0, rows.count, high):
        for column in range(0, rows.width, wide * TILE):
            there, columns = slice(row, row + high), slice(column, column + wide * TILE)
            rows.read(there, columns, out[there, columns])
    return out


def first_largest(rows: MemberRows) -> tuple[Array, Array]:
    """The first column with the maximum, or the first NaN, `[B, 1]` int64, and its value `[B, 1]`; CPU only."""
    high = min(rows.count, max(1, _BLOCK * torch.get_num_threads() * TILE // rows.width))
    scratch = kept_scratch(rows.count, rows.width)
    found = []
    for row in range(0, rows.count, high):
        there = slice(row, min(row + high, rows.count))
        count = there.stop - row
        z = scratch.get("z", count, rows.width)
        rows.read(
            there,
            slice(0, rows.width),
            torch.from_numpy(z),
            lambda name, count=count: torch.from_numpy(scratch.get(name, count, rows.width)),  # type: ignore[misc]
        )
        # NumPy's argmax is vectorised, unlike torch's on the CPU; both return the first of equal values.
        found.append(largest(z, 1))
    if len(found) == 1:
        return found[0][1], found[0][0]
    return joined([column for _, column in found], 0), joined([top for top, _ in found], 0)


def block_of(rows: MemberRows) -> tuple[int, int]:
    """How many rows and tiles a block has: on the CPU as many as fit the cache, elsewhere all."""
    tiles = -(-rows.width // TILE)
    if not rows.on_host:
        return rows.count, tiles
    most = _BLOCK * torch.get_num_threads()
    if tiles <= most:
        return min(rows.count, most // tiles), tiles
    return 1, -(-tiles // -(-tiles // most))  # parts of a row, of about equal width
