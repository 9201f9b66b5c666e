"""The logits of a long text in parts, so that the members' own logits never exist for all positions at once.

The combined logits `[B, N, V]`, float32, are returned whole; those of three members and the temporaries of combining
them would need as much memory again and more. Each part continues the cache of the part before it. Results are the same
but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import length_of

__all__ = ["PART", "forward_in_parts", "needs_whole", "part_length"]

PART = 1024
"""Rows × positions of a part: enough to keep a GPU busy, and little memory beside the whole text's logits."""

Forward = Callable[..., CausalLMOutputWithPast]


def part_length(input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor, cache: Cache | None) -> int | None:
    """How many positions of each row make a part; None to run the text at once.

    None if the text is short, not all logits are kept, gradients may be needed, or only the device knows the cache's
    length.
    """
    rows, length = input_ids.shape
    if rows * length <= PART or isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if cache is not None and not isinstance(length_of(cache), int):
        return None
    part = max(1, PART // rows)
    return part if part < length else None


def needs_whole(
    members: Sequence[Member],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> bool:
    """Whether parts of a text would not be what the text is: a member looks at its length, or it is packed."""
    past, length = (0 if cache is None else int(length_of(cache))), input_ids.shape[1]
    before = None if attention_mask is None else attention_mask[:, :past]
    for member in members:
        if is_beyond(member.switch, past + length, attention_mask) and not is_beyond(member.switch, past, before):
            return True
    # Without mask and cache, members take positions that start again for the next of several texts.
    given = position_ids is not None and attention_mask is None and cache is None
    return given and bool((position_ids.diff(dim=-1) != 1).any())  # type: ignore[union-attr]


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
    """Run the composed model's `forward` over a text `[B, N]` in parts of `length` positions, extending `cache`.

    Returns:
        Logits `[B, N, V]`, float32; the mean next-token loss in nats over labels `[B, N]` other than −100; the cache.
    """
    past, end = int(length_of(cache)), input_ids.shape[1]
    whole: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    counted: torch.Tensor | int = 0
    for start in range(0, end, length):
        part = slice(start, min(start + length, end))
        out = forward(
            input_ids[:, part],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + part.stop],
            position_ids=None if position_ids is None else position_ids[:, part],
            **{CACHE: cache},
            return_dict=True,
        )
        logits = out.logits  # [B, part, V]
        assert logits is not None
        if whole is None:
            whole = logits.new_empty(logits.shape[0], end, logits.shape[2])
        whole[:, part] = logits
        if labels is not None:
            targets = labels[:, start + 1 : part.stop + 1].to(logits.device)  # one fewer at the end
            predicted = logits[:, : targets.shape[1]].flatten(0, 1)
            part_loss = nn.functional.cross_entropy(predicted, targets.flatten(), ignore_index=-100, reduction="sum")
            loss = part_loss if loss is None else loss + part_loss
            counted = counted + (targets != -100).sum()
            del predicted
        del out, logits  # free them before the next part
    return CausalLMOutputWithPast(loss=None if loss is None else loss / counted, logits=whole, **{CACHE: cache})
