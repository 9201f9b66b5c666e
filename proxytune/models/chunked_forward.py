"""The logits of a whole text, in parts: the members' own logits of all its positions never exist at once.

The combined ones `[B, N, V]` are what was asked for, in float32; those of three members beside them, and what their
combination takes, would be as much again and more. So a long text goes through the members part by part, each part
after the ones that the cache holds: lossless, as a prompt in chunks is, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["PART", "forward_in_parts", "part_length"]

PART = 1024
"""Rows × positions of a part: enough for a GPU to be busy with, few beside the logits of the whole."""

Forward = Callable[..., CausalLMOutputWithPast]


def part_length(input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor, cache: Cache | None) -> int | None:
    """How many positions of each row make a part.

    Args:
        input_ids: `[B, N]`.
        logits_to_keep: The last that many positions, 0 for all; or a tensor of positions.
        cache: The cache; None if there is none.

    Returns:
        Less than N; None where the text goes through at once: because it is short enough, not all logits are asked for,
        a gradient may be, or the length of the cache is known to the device only.
    """
    rows, length = input_ids.shape
    if rows * length <= PART or isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if cache is not None and not isinstance(cache.get_seq_length(), int):
        return None
    part = max(1, PART // rows)
    return part if part < length else None


def forward_in_parts(
    forward: Forward,
    input_ids: torch.Tensor,
    *,
    length: int,
    cache: Cache,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> CausalLMOutputWithPast:
    """Run a model over a text part by part.

    Args:
        forward: The composed model's `forward`.
        input_ids: `[B, N]`, int64.
        length: How many positions make a part.
        cache: What the model has seen, extended in place.
        attention_mask: `[B, past + N]`; None if nothing is padded.
        position_ids: `[B, N]` or `[1, N]`; None to count.
        labels: `[B, N]`, −100 where there is none; None for no loss.

    Returns:
        Logits `[B, N, V]`, float32; the mean next-token loss in nats; the cache.
    """
    past, end = int(cache.get_seq_length()), input_ids.shape[1]
    whole: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    counted: torch.Tensor | int = 0
    for start in range(0, end, length):
        there = slice(start, min(start + length, end))
        out = forward(
            input_ids[:, there],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + there.stop],
            position_ids=None if position_ids is None else position_ids[:, there],
            past_key_values=cache,
            return_dict=True,
        )
        logits = out.logits  # [B, part, V]
        assert logits is not None
        if whole is None:
            whole = logits.new_empty(logits.shape[0], end, logits.shape[2])
        whole[:, there] = logits
        if labels is not None:
            targets = labels[:, start + 1 : there.stop + 1].to(logits.device)  # one fewer at the end
            foretold = logits[:, : targets.shape[1]].flatten(0, 1)
            lost = nn.functional.cross_entropy(foretold, targets.flatten(), ignore_index=-100, reduction="sum")
            loss = lost if loss is None else loss + lost
            counted = counted + (targets != -100).sum()
            del foretold
        del out, logits  # before the next part is there
    return CausalLMOutputWithPast(loss=None if loss is None else loss / counted, logits=whole, past_key_values=cache)
