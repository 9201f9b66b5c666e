"""What is refused of a text, whichever members read it: ids that cannot be embedded, logits that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from proxytune.errors import InputError, NumericalError
from proxytune.models.members.member import Member

__all__ = ["check_ids", "refuse_no_numbers"]


def check_ids(
    input_ids: torch.Tensor, members: Sequence[Member], rows: Sequence[int] | None = None, name: str = "input_ids"
) -> None:
    """Raise InputError if a prompt `[B, T]` is empty or has ids that some member cannot embed.

    `rows` is how many ids each can embed [its `rows`], `name` what the ids are called. Waits for the device: call it
    for prompts, not in every step.
    """
    if input_ids.numel() == 0:
        raise InputError.of(
            name,
            expected="a prompt of at least one token",
            got=f"shape {list(input_ids.shape)}",
            remedy="Start from the BOS token, or any text.",
        )
    most, least = min(zip(rows or [m.rows for m in members], members, strict=True), key=lambda pair: pair[0])
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= most:
        bad = low if low < 0 else high
        raise InputError.of(
            name,
            expected=f"ids from 0 to {most - 1}, which every member can embed",
            got=f"id {bad}, which the {least.role} ({most} embedding rows) has no embedding for",
            remedy="Use the tokenizer that all members share, without tokens added for one of them.",
        )


def refuse_no_numbers(logits: torch.Tensor, whose: str) -> None:
    """Raise NumericalError if a row of logits `[B, V]` holds NaN or +inf, or −inf only. Waits for the device."""
    wrong = [not math.isfinite(top) for top in logits.amax(-1).tolist()]  # NaN if any is
    if any(wrong):
        row = wrong.index(True)
        raise NumericalError.of(
            f"row {row} of {len(logits)}",
            expected="logits of which a token can be drawn",
            got=f"NaN or +inf among {whose}, or −inf for every token",
            remedy="Run the members in bfloat16 or float32 rather than float16, and look at each one's own logits for "
            "this text (model.member_logits). remove_invalid_values=True goes on with finite values, unless a "
            "processor was handed over.",
        )
