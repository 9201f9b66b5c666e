"""What belongs to the prompts of a batch (masks, budgets), for the rows that go on from them.

Usually the rows are the prompts' in their order, as many of each: beams, several sequences. A tree has more rows of one
prompt than of another, in the order in which they came. A logits processor is told nothing but ids, so the loop says
here which row is whose.
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
    """Say which prompt each row goes on from, for as long as the context lasts, in this thread.

    Args:
        numbers: `[rows]`, the prompt's number in the batch.
        prompts: How many prompts the batch has, those without a row included.
    """
    before = _owners.set((tuple(numbers), prompts))
    try:
        yield
    finally:
        _owners.reset(before)


def owner_of(row: int) -> int:
    """The prompt that a row goes on from.

    Args:
        row: Its number in the batch.

    Returns:
        The prompt's number; the row's own where no loop has said otherwise.
    """
    said = _owners.get()
    return row if said is None else said[0][row]


def expand_to_rows(values: torch.Tensor, rows: int) -> torch.Tensor | None:
    """What each row has of what belongs to its prompt.

    Args:
        values: `[B, …]`: one for each prompt, or for each group of as many (several sequences of a prompt).
        rows: How many rows there are.

    Returns:
        `[rows, …]`; None if the numbers do not fit each other.
    """
    said = _owners.get()
    if said is None:
        return None if rows % len(values) else values.repeat_interleave(rows // len(values), 0)
    numbers, prompts = said
    if len(numbers) != rows or prompts % len(values):
        return None
    return values.index_select(0, torch.tensor(numbers, device=values.device) // (prompts // len(values)))


def expand_mask(mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Give each row what belongs to its prompt: for beams, several sequences of a prompt, and branches of a tree.

    Args:
        mask: `[B, T]`.
        input_ids: `[rows, ≥ T]`.

    Returns:
        `[rows, T]`.

    Raises:
        InputError: If the shapes do not fit.
    """
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
