"""Finds patterns of token ids in the rows of a batch; pure tensors, nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["continued", "count_of", "ends_of", "forced"]


def ends_of(ids: torch.Tensor, pattern: Sequence[int]) -> torch.Tensor:
    """Where a pattern's last token is in ids `[B, T]`: `[B, T]`, bool."""
    length, width = ids.shape[1], len(pattern)
    out = torch.zeros_like(ids, dtype=torch.bool)
    if width <= length:
        whole = torch.ones_like(ids[:, width - 1 :], dtype=torch.bool)
        for i, token in enumerate(pattern):
            whole &= ids[:, i : length - width + 1 + i] == token
        out[:, width - 1 :] = whole
    return out


def count_of(ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor) -> torch.Tensor:
    """How often a pattern occurs in each row, wholly at or after position `start` `[B]`: `[B]`, int64."""
    first = torch.arange(ids.shape[1], device=ids.device) - (len(pattern) - 1)  # [T]
    return (ends_of(ids, pattern) & (first >= start[:, None])).sum(1)


def continued(ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor, *, least: int) -> torch.Tensor:
    """The next token of a pattern whose beginning is at the end of a row, for the longest such beginning.

    Args:
        ids: `[B, T]`.
        pattern: The pattern.
        start: `[B]`: the beginning has to be at or after this position.
        least: The minimum length of the beginning; with 0 every row has one.

    Returns:
        `[B]`, int64; −1 where there is no such beginning.
    """
    out = torch.full_like(start, pattern[0] if least == 0 else -1)
    for n in range(1, min(len(pattern), ids.shape[1] + 1)):  # the longest last, so that it wins
        fits = ends_of(ids, pattern[:n])[:, -1] & (ids.shape[1] - n >= start)
        out = torch.where(fits, pattern[n], out)
    return out


def forced(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Scores `[B, V]` with 0 at `tokens` `[B]` and −inf elsewhere; rows with token −1 are unchanged.

    Beam search reads these as log-probabilities.
    """
    only = torch.full_like(scores, -torch.inf).scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
    return torch.where((tokens >= 0)[:, None], only, scores)
