"""Stateless noise: the same (seed, row, position, branch, index) always gives the same number.

`generate()` repeats steps, undoes positions and reorders rows, and a request must not depend on its batch, so no
generator keeps state. Variates are functions of their key by Philox-4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"). The Triton kernels compute the same words bit for bit; the Gumbel variates agree to
rounding.

Counter of a word: `(index, position, row, branch · 4 + stream)`; key: the seed's 64 bits. `index` is a token id in
`TOKENS`, a tile number in `TILES`, and a (slot, index) pair in `LATENT`, see `slotted`. Draws use word 0; the draw
after a rejected draft uses word 1, since it must be independent of the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from proxytune.errors import InputError
from proxytune.ops.philox import _MASK, gumbel, normal, philox, philox_in_numpy, unit
from proxytune.validation import as_int

__all__ = ["COORDINATES", "DECISIONS", "LATENT", "SLOTS", "TILES", "TOKENS", "Noise", "slotted"]

TOKENS, TILES, DECISIONS, LATENT = 0, 1, 2, 3
"""Streams of words: per token, per tile of the vocabulary, per accept/reject decision, and for latent steps."""
SLOTS = 32
"""Independent variates that `LATENT` has per token id or per coordinate of a state."""
COORDINATES = SLOTS - 1
"""Slot of the noise on a mixture's coordinates; the other slots are for its weights."""


_Index = TypeVar("_Index", torch.Tensor, np.ndarray[Any, Any])

_BRANCHES = 1 << 30
_SLOT_BITS = 27


def slotted(slot: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The counter's first word in `LATENT`, `slot · 2²⁷ + index`, int64 in [0, 2³²).

    Args:
        slot: 0 … `SLOTS` − 1: which of several variates of the same index.
        index: int64 in [0, 2²⁷): a token id, or a coordinate of a state.
    """
    return index + (slot << _SLOT_BITS)


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise keys of one step, one per row. Tensors, so that a captured graph can be replayed with other keys.

    Attributes:
        seed: `[B]`, int64; all 64 bits count.
        row: `[B]`, int64 in [0, 2³²): the stream of that seed.
        position: `[B]`, int64 in [0, 2³²): position of the token to be drawn, padding not counted.
        branch: `[B]`, int64 in [0, 2³⁰): which of several continuations of that row.
    """

    seed: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    branch: torch.Tensor

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a copy has arrays of its own

    @cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """Seed, row, position and branch as NumPy arrays `[B, 1]` on the tensors' memory, for keys on the CPU."""
        return tuple(x.numpy()[:, None] for x in (self.seed, self.row, self.position, self.branch))

    @classmethod
    def of(
        cls,
        rows: int,
        *,
        seed: int | torch.Tensor = 0,
        row: torch.Tensor | None = None,
        position: int | torch.Tensor = 0,
        branch: int | torch.Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Noise:
        """Keys for a batch. Values are checked, which waits for the device; `at` does not check again.

        Args:
            rows: B.
            seed: −2⁶³ … 2⁶³ − 1; one for all rows, or `[B]`.
            row: `[B]`; None for 0, 1, 2, …
            position: One for all rows, or `[B]`.
            branch: One for all rows, or `[B]`.
            device: Where the logits are.

        Raises:
            InputError: If a tensor is not `[B]` of integers, or a value is out of range.
        """
        row = torch.arange(rows) if row is None else row
        return cls(
            _keys("seed", seed, rows, device, -(1 << 63), (1 << 63) - 1),
            _keys("row", row, rows, device, 0, _MASK),
            _keys("position", position, rows, device, 0, _MASK),
            _keys("branch", branch, rows, device, 0, _BRANCHES - 1),
        )

    def at(self, position: int | torch.Tensor) -> Noise:
        """The same streams at other positions: `[B]`, int64, or one int for all rows.

        A tensor is looked at where the keys are used, and its values nowhere: this does not wait for the device.

        Raises:
            InputError: If it is no tensor, and no int from 0 to 2³² − 1.
        """
        if not isinstance(position, torch.Tensor):
            position = _keys("position", position, len(self.row), self.row.device, 0, _MASK)
        return Noise(self.seed, self.row, position, self.branch)

    def pick(self, index: torch.Tensor) -> Noise:
        """The keys of the rows `index`, `[N]`, int64, repeats allowed; does not wait for the device."""
        keys = (self.seed, self.row, self.position, self.branch)
        return Noise(*(x.index_select(0, index) for x in keys))

    def uniform(self, stream: int) -> torch.Tensor:
        """One uniform variate per row, `[B]`, float32, in (0, 1]; `stream` is `DECISIONS`."""
        return unit(self.words(torch.zeros_like(self.row)[:, None], stream)[0][:, 0])

    def gumbel(self, index: _Index, stream: int, word: int = 0) -> _Index:
        """Gumbel variates `[B, N]`, float32, for token ids or tile numbers `[B, N]` or `[1, N]`, int64.

        Word 0 is for draws; word 1 is independent of it. A NumPy array gives one; then the keys are on the CPU.
        """
        if isinstance(index, np.ndarray):
            seed, row, position, branch = self.arrays
            return gumbel(philox_in_numpy(seed, index, position, row, branch * 4 + stream)[word])
        return gumbel(self.words(index, stream)[word])

    def normal(self, index: torch.Tensor, stream: int) -> torch.Tensor:
        """Standard normal variates `[B, N]`, float32, for indices `[B, N]` or `[1, N]`, int64 (`slotted`)."""
        first, second, _, _ = self.words(index, stream)
        return normal(first, second)

    def words(self, index: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
        """Four words per index `[B, N]` or `[1, N]`, int64 in [0, 2³²): four tensors `[B, N]` of the same range."""
        last = self.branch * 4 + stream
        # `at` does not check positions, so the counter takes their lower 32 bits, as the kernels do.
        position, row = self.position[:, None] & _MASK, self.row[:, None] & _MASK
        return philox(self.seed[:, None], index, position, row, last[:, None] & _MASK)


def _keys(
    name: str, value: int | torch.Tensor, rows: int, device: torch.device | str | None, low: int, high: int
) -> torch.Tensor:
    given = value if isinstance(value, torch.Tensor) else None
    number = as_int(value) if given is None else None
    if given is not None and (given.shape != (rows,) or given.is_floating_point() or given.dtype == torch.bool):
        got = f"shape {list(given.shape)}, {given.dtype}"
    elif given is not None:
        outside = [v for v in given.tolist() if not low <= v <= high]
        if not outside:
            return given.to(device=device, dtype=torch.int64)
        got = str(outside[0])
    else:
        if number is not None and low <= number <= high:
            return torch.full((rows,), number, dtype=torch.int64, device=device)
        got = repr(value)
    raise InputError.of(
        f"noise: {name}",
        expected=f"a whole number from {low} to {high}, or a tensor of them for each of {rows} rows",
        got=got,
        remedy="Pass e.g. Noise.of(rows, seed=0, position=7).",
    )
