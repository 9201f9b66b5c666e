"""Padding masks: what padding looks like without one, when it cannot be told from text, and masks for beams.

Padding stands at the left. Where the padding token is also an end-of-text token, a row that starts with it may be
padded, or may simply start so (models whose BOS is their EOS): only a mask tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.errors import InputError

__all__ = ["leading_run", "mask_of_padding", "refuse_ambiguous_padding"]


def leading_run(input_ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """How many ids at the start of each row are among some tokens.

    Args:
        input_ids: `[B, T]`, int64.
        tokens: The tokens.

    Returns:
        `[B]`, int64.
    """
    among = torch.isin(input_ids, torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device))
    return among.long().cumprod(-1).sum(-1)


def mask_of_padding(input_ids: torch.Tensor, pad: int) -> torch.Tensor:
    """The mask of a left-padded batch: 0 on each row's run of padding, 1 from its first other token on.

    Args:
        input_ids: `[B, T]`, int64.
        pad: The padding token; inside the text it is text.

    Returns:
        `[B, T]`, int64.
    """
    return (input_ids != pad).long().cummax(-1).values


def refuse_ambiguous_padding(input_ids: torch.Tensor, ends: Sequence[int], *, remedy: str) -> None:
    """Refuse prompts without a mask that may be padded with an end-of-text token.

    One such token at the start of every row is how models start whose BOS is their EOS. A longer run, or one in some
    rows only, is what padding looks like.

    Args:
        input_ids: `[B, T]`, int64, given without a mask.
        ends: The end-of-text tokens.
        remedy: What the reader can do.

    Raises:
        InputError: If the prompts may be padded.
    """
    runs = leading_run(input_ids, ends)
    if runs.numel() and (int(runs.max()) > 1 or int(runs.max()) != int(runs.min())):
        row = int(runs.argmax())
        raise InputError.of(
            "attention_mask",
            expected="a mask, since some prompts start like padding",
            got=f"none; row {row} starts with {int(runs[row])} × token {int(input_ids[row, 0])}, an EOS token, which "
            "may be padding or text",
            remedy=remedy,
        )
