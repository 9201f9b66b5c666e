"""The last tokens of a text, for layers that have to read some of them again."""

from __future__ import annotations

import torch

__all__ = ["Tape"]


class Tape:
    """The last tokens of a text, for layers that have to read some of them again; it starts at a kept state."""

    def __init__(self) -> None:
        self.spent = 0.0  # seconds that passes took longer for tokens read again, since the last state kept
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []  # start, ids and positions [B, n]

    def append(self, start: int, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Note tokens `[B, n]` after `start` others, and their positions `[B, n]` or `[1, n]`."""
        self._parts.append((start, input_ids, position_ids))

    def last(self, count: int, before: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The `count` tokens `[B, count]` before a place, and their positions."""
        first = before - count
        parts = [part for part in self._parts if first < part[0] + part[1].shape[1] and part[0] < before]
        here = slice(first - parts[0][0], before - parts[0][0])
        ids = torch.cat([ids for _, ids, _ in parts], 1)
        told = [positions.expand(ids.shape[0], -1) for _, _, positions in parts if positions is not None]
        return ids[:, here], torch.cat(told, 1)[:, here] if len(told) == len(parts) else None

    def cut(self, start: int) -> None:
        """Forget the parts that end before `start`."""
        self._parts = [part for part in self._parts if part[0] + part[1].shape[1] > start]

    def crop(self, end: int) -> None:
        """Forget the tokens from `end` on."""
        kept = [(start, ids[:, : end - start], positions) for start, ids, positions in self._parts if start < end]
        self._parts = [(start, ids, None if p is None else p[:, : ids.shape[1]]) for start, ids, p in kept]

    def reorder(self, beam_idx: torch.Tensor) -> None:
        """Reselect the rows by `beam_idx` `[B']`."""
        rows = beam_idx.to(self._parts[0][1].device) if self._parts else beam_idx
        # Positions of one row are those of all.
        self._parts = [
            (start, ids[rows], p if p is None or len(p) != len(ids) else p[rows]) for start, ids, p in self._parts
        ]
