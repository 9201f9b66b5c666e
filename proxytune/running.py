"""The members' forward passes of one step: who runs over which tokens, on which part of the composite cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.cache import view
from proxytune.member import Member

__all__ = ["run_members"]

Latent = Sequence[Mapping[str, torch.Tensor] | None]
"""What each member takes in place of the ids; None for the ids."""


def run_members(
    members: Sequence[Member],
    spans: Sequence[tuple[int, int]],
    input_ids: torch.Tensor,
    *,
    cache: Cache | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    latent: Latent,
    known: Mapping[str, torch.Tensor],
) -> list[torch.Tensor]:
    """Run every member over a span of tokens that follows what the composite cache holds.

    Args:
        members: The members, the base first.
        spans: First and last-plus-one layer of each in the composite cache.
        input_ids: `[B, N]`, int64.
        cache: The composite cache, extended in place; None to run without.
        attention_mask: `[B, past + N]`, 1 for tokens and 0 for padding; None if there is no padding.
        position_ids: `[B, N]` or `[1, N]`; None to count.
        logits_to_keep: The last that many positions (0: all), or a tensor of positions.
        latent: What each member takes in place of the ids.
        known: Role → `[B, J, V_i]`, logits of the first J ≤ N of these tokens, which that member has already run over,
            and holds in its layers of the cache; only with `logits_to_keep=0`. It runs over the others.

    Returns:
        Raw logits of each, `[B, K, V_i]`, in its dtype and on its device.
    """
    out = []
    for member, span, fed in zip(members, spans, latent, strict=True):
        ids, positions = input_ids, position_ids
        before = known.get(member.role)
        if before is not None:
            ids = ids[:, before.shape[1] :]
            positions = None if positions is None else positions[:, before.shape[1] :]
        given: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": positions,
            "cache": None if cache is None else view(cache, *span),
            "logits_to_keep": logits_to_keep,
            "latent": fed,
        }
        if before is None:
            out.append(member.forward(ids, **given))
        elif ids.shape[1]:
            out.append(torch.cat([before, member.forward(ids, **given)], 1))
        else:
            out.append(before)
    return out
