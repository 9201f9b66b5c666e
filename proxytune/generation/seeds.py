"""The key of a call's draws, and which stream of it each row draws from: checks that all loops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.errors import InputError

__all__ = ["Rows", "refuse_seed", "seed_of", "streams_of"]

Rows = Sequence[int] | torch.Tensor | None
"""`[B]` whole numbers: the stream of each row; None for 0, 1, 2, …"""


def refuse_seed(seed: object, loop: str) -> None:
    """Refuse what is no key.

    Args:
        seed: What was given; None is for a new one in each call.
        loop: The name of what it was given to, for the message.

    Raises:
        InputError: If it is no whole number of 64 bits.
    """
    whole = isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 1 << 63
    if seed is not None and not whole:
        raise InputError.of(
            "seed",
            expected="a whole number of 64 bits, or None",
            got=repr(seed),
            remedy=f"Pass e.g. {loop}(seed=0).",
        )


def seed_of(seed: int | None) -> int:
    """The key of a call.

    Args:
        seed: The one that was given; None for one from torch's default generator.

    Returns:
        The key.
    """
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64)) if seed is None else seed


def streams_of(rows: Rows, batch: int) -> torch.Tensor:
    """The stream of each row.

    Args:
        rows: What was given.
        batch: The number of rows B.

    Returns:
        `[B]`, int64.

    Raises:
        InputError: If it is not one whole number of 32 bits for each row.
    """
    if rows is None:
        return torch.arange(batch)
    streams = torch.as_tensor(rows)
    whole = not streams.is_floating_point() and streams.dtype != torch.bool
    if streams.shape != (batch,) or not whole or int(streams.min()) < 0 or int(streams.max()) >= 1 << 32:
        raise InputError.of(
            "rows",
            expected=f"whole numbers from 0 to {(1 << 32) - 1}, one for each of {batch} rows",
            got=f"shape {list(streams.shape)}, {streams.dtype}: {streams.flatten()[:8].tolist()}",
            remedy="Give one per row of the batch, num_return_sequences counted in, or leave it out.",
        )
    return streams.to(torch.int64)
