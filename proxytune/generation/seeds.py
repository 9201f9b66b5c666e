"""The seed of a call's draws, and which stream of it each row draws from; shared by all loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.errors import InputError
from proxytune.ops.noise import Noise

__all__ = ["StreamIds", "keys_of", "seed_of", "streams_of"]

StreamIds = Sequence[int] | torch.Tensor | None
"""`[B]` whole numbers: the stream of each row; None for 0, 1, 2, …"""


def seed_of(seed: int | None) -> int:
    """The given seed; None takes one from torch's default generator."""
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64)) if seed is None else int(seed)


def streams_of(stream_ids: StreamIds, batch: int) -> torch.Tensor:
    """The stream of each row, `[B]`, int64; InputError unless there is one whole number of 32 bits per row."""
    if stream_ids is None:
        return torch.arange(batch)
    streams = torch.as_tensor(stream_ids)
    whole = not streams.is_floating_point() and streams.dtype != torch.bool
    if streams.shape != (batch,) or not whole or int(streams.min()) < 0 or int(streams.max()) >= 1 << 32:
        raise InputError.of(
            "stream_ids",
            expected=f"whole numbers from 0 to {(1 << 32) - 1}, one for each of {batch} rows",
            got=f"shape {list(streams.shape)}, {streams.dtype}: {streams.flatten()[:8].tolist()}",
            remedy="Give one per row of the batch, num_return_sequences counted in, or leave it out.",
        )
    return streams.to(torch.int64)


def keys_of(stream_ids: StreamIds, branch_ids: StreamIds, batch: int) -> Noise:
    """The noise keys with seed 0, so that nothing is taken from torch's generator where nothing is drawn.

    Raises:
        InputError: If stream or branch ids do not fit the batch.
    """
    branch = 0 if branch_ids is None else torch.as_tensor(branch_ids)
    return Noise.of(batch, row=streams_of(stream_ids, batch), branch=branch)
