"""Maps what belongs to prompts (masks, budgets) to the rows that continue them.

Usually each prompt has the same number of consecutive rows (beams, several sequences). In a tree the numbers differ and
rows are in order of creation. Logits processors only see ids, so the loop sets the mapping here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from proxytune.errors import InputError

__all__ = ["expand_mask", "expand_to_rows", "owner_of", "rows_of_prompts"]

_owners: ContextVar[tuple[tuple[int, ...], int] | None] = ContextVar("rows_of_prompts", default=None)


@contextmanager
def rows_of_prompts(numbers: Sequence[int], prompts: int) -> Iterator[None]:
    """Set each row's prompt, `[rows]`, in this context and thread; `prompts` counts those without rows too."""
    before = _owners.set((tuple(numbers), prompts))
    try:
        yield
    finally:
        _owners.reset(before)


def owner_of(row: int) -> int:
    """The number of a row's prompt; the row's own number where no loop has set a mapping."""
    owners = _owners.get()
    return row if owners is None else owners[0][row]


def expand_to_rows(values: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Expand values `[B, …]`, one per prompt or per group of prompts, to `[rows, …]`; None if they do not fit."""
    owners = _owners.get()
    if owners is None:
        return None if rows % len(values) else values.repeat_interleave(rows // len(values), 0)
    numbers, prompts = owners
    if len(numbers) != rows or prompts % len(values):
        return None
    return values.index_select(0, torch.tensor(numbers, device=values.device) // (prompts // len(values)))


def expand_mask(mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Expand the prompts' mask `[B, T]` to the rows of `input_ids` `[rows, ≥ T]`; InputError if they do not fit."""
    rows = input_ids.shape[0]
    out = expand_to_rows(mask, rows) if mask.ndim == 2 and mask.shape[1] <= input_ids.shape[1] else None
    if out is None:
        raise InputError.of(
            "attention_mask",
            expected=f"[B, T] for {rows} rows (beams included) of {input_ids.shape[1]} ids",
            got=f"shape {list(mask.shape)}",
            remedy="Pass the mask of this very batch of prompts; for other prompts, make another processor.",
        )
    return out
