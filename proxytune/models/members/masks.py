"""What a mask of a text says: padding before tokens, and each token's position."""

from __future__ import annotations

import torch

__all__ = ["is_left_padded", "positions_of"]


def is_left_padded(attention_mask: torch.Tensor) -> bool:
    """Whether some row of a mask `[B, T]` has padding before a token. Waits for the device."""
    there = attention_mask != 0
    return bool((there[:, 1:] > there[:, :-1]).any())


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's position in its row, padding not counted: `[B, T]`, int64, from a mask `[B, T]`; 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
