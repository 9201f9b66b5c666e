"""Padding masks: what left padding looks like without a mask, and when it cannot be told from text.

Where the padding token is also an EOS token, a row that starts with it may be padded, or may really start so (models
whose BOS is their EOS): only a mask tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.errors import InputError

__all__ = ["leading_run", "mask_of_padding", "refuse_ambiguous_padding"]


def leading_run(input_ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """How many ids at the start of each row of `[B, T]` are among `tokens`: `[B]`, int64."""
    among = torch.isin(input_ids, torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device))
    return among.long().cumprod(-1).sum(-1)


def mask_of_padding(input_ids: torch.Tensor, pad: int) -> torch.Tensor:
    """The mask of a left-padded batch: 0 on each row's leading run of `pad`, 1 from the first other token on."""
    return (input_ids != pad).long().cummax(-1).values


def refuse_ambiguous_padding(input_ids: torch.Tensor, ends: Sequence[int], *, remedy: str) -> None:
    """Raise InputError for prompts `[B, T]` without a mask that may be padded with an EOS token.

    One EOS token at the start of every row is how models start whose BOS is their EOS. A longer run, or one in some
    rows only, looks like padding.
    """
    runs = leading_run(input_ids, ends)
    if runs.numel() and (int(runs.max()) > 1 or int(runs.max()) != int(runs.min())):
        row = int(runs.argmax())
        raise InputError.of(
            "attention_mask",
            expected="a mask, since some prompts start like padding",
            got=f"None; row {row} starts with {int(runs[row])} × token {int(input_ids[row, 0])}, an EOS token, which "
            "may be padding or text",
            remedy=remedy,
        )
