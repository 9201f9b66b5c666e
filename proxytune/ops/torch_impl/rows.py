"""The members' logits of a step, read in blocks and combined."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from proxytune.formulas.shift import shift
from proxytune.ops.combination import Combination, Weights

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
        device: The base's device. On the CPU values may be inspected; elsewhere that would wait for the device.
    """

    def __init__(self, members: Sequence[torch.Tensor], weights: Weights) -> None:
        self._members = members
        self._combination = weights if isinstance(weights, Combination) else Combination(weights)
        self._index: torch.Tensor | None = None
        self.count, self.width = members[0].shape
        self.device = members[0].device

    def pick(self, index: torch.Tensor) -> MemberRows:
        """The rows `index`, `[N]`, int64; no logits are copied before they are read."""
        picked = copy(self)
        picked._index = index if self._index is None else self._index.index_select(0, index)
        picked.count = len(index)
        picked._combination = self._combination.pick(index)
        return picked

    def empty(self, count: int) -> torch.Tensor:
        """Uninitialised float32 memory `[count]` on the rows' device."""
        return torch.empty(count, dtype=torch.float32, device=self._members[0].device)

    def read(self, rows: slice, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """Write the combined logits of a block to `out`, float32, and return the base's own there, in its dtype."""
        if self._index is None:
            base, *companions = (x[rows, columns] for x in self._members)
        else:
            base, *companions = (x[:, columns].index_select(0, self._index[rows]) for x in self._members)
        shift_by(base, companions, self._combination.pick(rows), out)
        return base

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """The combined logits at columns `ids` `[B, n]`, float32, bit for bit as `read` gives; −inf past the end."""
        # On the CPU the largest id tells which members are wide enough to need no mask.
        end = int(ids.max()) + 1 if self.device.type == "cpu" else None

        def taken(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return x.gather(1, ids) if self._index is None else x[self._index[:, None], ids]

        def picked(x: torch.Tensor) -> torch.Tensor:
            if end is not None and end <= x.shape[1]:
                return taken(x, ids)
            # −inf past a companion's width means "no shift", past the base's "no such token".
            return taken(x, ids.clamp(max=x.shape[1] - 1)).masked_fill_(ids >= x.shape[1], -torch.inf)

        base, *companions = (picked(x) for x in self._members)
        base = base.float()
        return shift_by(base, companions, self._combination, base)


def shift_by(
    base: torch.Tensor, companions: Sequence[torch.Tensor], c: Combination, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`proxytune.formulas.shift.shift` of rows `[B, V_i]`, as a Combination says."""
    w = c.weights
    own, theirs = (w[:, 0], w[:, 1:]) if isinstance(w, torch.Tensor) else (w[0], w[1:])
    return shift(base, companions, theirs, own, out, offsets=c.offsets, floors=c.floors, floored_by=c.floored_by)


def combined(rows: MemberRows) -> torch.Tensor:
    """The combined logits `[B, V]`, float32, computed in parts: no other tensor of that size is made."""
    out = rows.empty(rows.count * rows.width).view(rows.count, rows.width)
    high, wide = block_of(rows)
    if rows.device.type != "cpu":
        wide = -(-wide // _PARTS)
    for row in range(0, rows.count, high):
        for column in range(0, rows.width, wide * TILE):
            there, columns = slice(row, row + high), slice(column, column + wide * TILE)
            rows.read(there, columns, out[there, columns])
    return out


def first_largest(rows: MemberRows) -> tuple[torch.Tensor, torch.Tensor]:
    """The first column with the maximum, or the first NaN, `[B, 1]` int64, and its value `[B, 1]`; CPU only."""
    high = min(rows.count, max(1, _BLOCK * torch.get_num_threads() * TILE // rows.width))
    scratch = rows.empty(high * rows.width)
    found = []
    for row in range(0, rows.count, high):
        there = slice(row, min(row + high, rows.count))
        z = scratch[: (there.stop - row) * rows.width].view(-1, rows.width)
        rows.read(there, slice(0, rows.width), z)
        # NumPy's argmax is vectorised, unlike torch's on the CPU; both return the first of equal values.
        column = torch.from_numpy(z.numpy().argmax(1, keepdims=True))
        found.append((column, z.gather(1, column)))
    if len(found) == 1:
        return found[0]
    columns, values = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(values)


def block_of(rows: MemberRows) -> tuple[int, int]:
    """How many rows and tiles a block has: on the CPU as many as fit the cache, elsewhere all."""
    tiles = -(-rows.width // TILE)
    if rows.device.type != "cpu":
        return rows.count, tiles
    most = _BLOCK * torch.get_num_threads()
    if tiles <= most:
        return min(rows.count, most // tiles), tiles
    return 1, -(-tiles // -(-tiles // most))  # parts of a row, of about equal width
