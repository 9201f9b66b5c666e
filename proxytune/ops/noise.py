"""Noise that is keyed, never drawn: the same (seed, row, position, branch, index) always gives the same number.

`generate()` asks again, undoes positions and reorders rows, and a request must not depend on the batch around it, so no
generator keeps a state here. Every draw is a function of its key, by Philox-4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). The Triton kernels compute the same words, bit for bit; the Gumbel variates made
of them agree to rounding.

Counter of a word: `(index, position, row, branch · 4 + stream)`, key: the 64 bits of the seed. `index` is a token id in
the stream `TOKENS`, and the number of a tile of the vocabulary in the stream `TILES`: there word 0 is a draw's, and
word 1 that of the draw after a rejected draft, which has to be independent of the draft's. In the stream `LATENT` the
index holds two numbers, see `slotted`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.errors import InputError
from proxytune.ops.philox import _MASK, gumbel, normal, philox, unit
from proxytune.validation import as_int

__all__ = ["COORDINATES", "DECISIONS", "LATENT", "SLOTS", "TILES", "TOKENS", "Noise", "slotted"]

TOKENS, TILES, DECISIONS, LATENT = 0, 1, 2, 3
"""Streams of words: per token, per tile of the vocabulary, for what is decided about a position, for latent steps."""
SLOTS = 32
"""How many independent variates the stream `LATENT` has for each token id, or each coordinate of a state."""
COORDINATES = SLOTS - 1
"""The slot of the noise on a mixture's coordinates; the others are for the mixture's weights."""


_BRANCHES = 1 << 30
_SLOT_BITS = 27


def slotted(slot: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The counter's first word in the stream `LATENT`, which holds which variate is meant and of what.

    Args:
        slot: From 0 to `SLOTS` − 1: which of several variates of the same thing.
        index: int64 in [0, 2²⁷): a token id, or the coordinate of a state.

    Returns:
        int64 in [0, 2³²), of the shape of both broadcast.
    """
    return index + (slot << _SLOT_BITS)


@dataclass(frozen=True, eq=False)
class Noise:
    """The keys of one step's noise, one per row. Tensors, so that a captured graph can be replayed with others.

    Attributes:
        seed: `[B]`, int64: all 64 bits count.
        row: `[B]`, int64 in [0, 2³²): which stream of that seed.
        position: `[B]`, int64 in [0, 2³²): the position of the token to be drawn, not counting padding.
        branch: `[B]`, int64 in [0, 2³⁰): which of several continuations of that row.
    """

    seed: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    branch: torch.Tensor

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
        """Keys for a batch. Values are checked here, which waits for the device; `at` does not check again.

        Args:
            rows: The number of rows B.
            seed: One for all rows, or `[B]`; from −2⁶³ to 2⁶³ − 1.
            row: `[B]`; None for 0, 1, 2, …
            position: One for all rows, or `[B]`.
            branch: One for all rows, or `[B]`.
            device: Where the logits are.

        Returns:
            The keys.

        Raises:
            InputError: If a tensor is not `[B]` of whole numbers, or a value is out of its range.
        """
        row = torch.arange(rows) if row is None else row
        return cls(
            _keys("seed", seed, rows, device, -(1 << 63), (1 << 63) - 1),
            _keys("row", row, rows, device, 0, _MASK),
            _keys("position", position, rows, device, 0, _MASK),
            _keys("branch", branch, rows, device, 0, _BRANCHES - 1),
        )

    def at(self, position: torch.Tensor) -> Noise:
        """The same streams at other positions; does not wait for the device.

        Args:
            position: `[B]`, int64.

        Returns:
            New keys that share the other tensors.
        """
        return Noise(self.seed, self.row, position, self.branch)

    def pick(self, index: torch.Tensor) -> Noise:
        """The keys of some of the rows; does not wait for the device.

        Args:
            index: `[N]`, int64: which rows; one may be there more than once.

        Returns:
            Keys for N rows.
        """
        keys = (self.seed, self.row, self.position, self.branch)
        return Noise(*(x.index_select(0, index) for x in keys))

    def uniform(self, stream: int) -> torch.Tensor:
        """One uniform variate for each row.

        Args:
            stream: `DECISIONS`.

        Returns:
            `[B]`, float32, in (0, 1].
        """
        return unit(self.words(torch.zeros_like(self.row)[:, None], stream)[0][:, 0])

    def gumbel(self, index: torch.Tensor, stream: int, word: int = 0) -> torch.Tensor:
        """A Gumbel variate for each index.

        Args:
            index: `[B, N]` or `[1, N]`, int64: token ids or tile numbers.
            stream: `TOKENS` or `TILES`.
            word: 0 for a draw; 1 for one that is independent of it.

        Returns:
            `[B, N]`, float32.
        """
        return gumbel(self.words(index, stream)[word])

    def normal(self, index: torch.Tensor, stream: int) -> torch.Tensor:
        """A standard normal variate for each index.

        Args:
            index: `[B, N]` or `[1, N]`, int64; with `LATENT` as `slotted` makes it.
            stream: The stream.

        Returns:
            `[B, N]`, float32.
        """
        first, second, _, _ = self.words(index, stream)
        return normal(first, second)

    def words(self, index: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
        """Four words for each index, for variates that take more than one.

        Args:
            index: `[B, N]` or `[1, N]`, int64 in [0, 2³²).
            stream: The stream.

        Returns:
            Four tensors `[B, N]`, int64 in [0, 2³²).
        """
        last = self.branch * 4 + stream
        # Positions are not checked when they are counted up: the counter takes their lower 32 bits, as in the kernels.
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
