"""What `forward` and `generate()` of a composed model refuse before any member runs: arguments, shapes, positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.errors import InputError
from proxytune.models.members.rewind import length_of
from proxytune.models.vision import refuse_images
from proxytune.validation import shown

__all__ = ["refuse_arguments", "refuse_mask_of_other_text", "refuse_positions", "refuse_shapes"]


def refuse_arguments(**given: Any) -> None:
    """Refuse unsupported `forward` arguments, unless they are None or False."""
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name == "inputs_embeds":
            raise InputError.of(
                "inputs_embeds",
                expected="input_ids: the members do not share an embedding space",
                got=f"a {type(value).__name__}",
                remedy="Pass the token ids.",
            )
        if name == "prompts":
            raise InputError.of(
                "prompts",
                expected="them in generate() alone",
                got="forward(prompts=…)",
                remedy="Call generate(…, prompts=…); for log-probabilities of a given text, models.scoring.score.",
            )
        refuse_images("forward()", {name: value})
        raise InputError.of(
            name,
            expected="no such argument: logits are combined, hidden states and attentions are not",
            got=f"{name}={value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}",
            remedy="Ask the member itself, e.g. model.base(...).",
        )


def refuse_positions(cache_position: Any, input_ids: Any, cache: Cache | None) -> None:
    """Refuse a `cache_position` other than the next columns of the cache, where the tokens go without it, too."""
    if cache_position is None:
        return
    past = 0 if cache is None else int(length_of(cache))
    given = torch.as_tensor(cache_position).flatten().tolist()
    if given != list(range(past, past + input_ids.shape[-1])):
        raise InputError.of(
            "cache_position",
            expected=f"none, or {past} to {past + input_ids.shape[-1] - 1}: the columns after those of the cache",
            got=shown(given, 80),
            remedy="Leave it out; positions in the text are position_ids.",
        )


def refuse_shapes(input_ids: Any, attention_mask: Any, labels: Any = None, name: str = "input_ids") -> None:
    """Refuse ids (called `name`), labels and masks other than `[B, T]`; a mask may cover cached tokens before them."""
    if isinstance(input_ids, Mapping):
        raise InputError.of(
            name,
            expected="a tensor of token ids, and the mask beside it",
            got=f"a {type(input_ids).__name__} with {', '.join(input_ids)}",
            remedy="Unpack it: generate(**inputs), or model(**inputs).",
        )
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else None
        raise InputError.of(
            name,
            expected="a tensor of token ids with two dimensions [B, T]",
            got=f"a {type(input_ids).__name__}" if shape is None else f"shape {shape}, {input_ids.dtype}",
            remedy='Pass what tokenizer(prompts, return_tensors="pt", padding=True) returns.',
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise InputError.of(
            "labels",
            expected=f"the shape of input_ids, {list(input_ids.shape)}",
            got=f"{list(labels.shape)}",
            remedy="Pass the input_ids; use -100 at positions without a target; labels are shifted internally.",
        )
    if attention_mask is None:
        return
    rows, length = input_ids.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise InputError.of(
            "attention_mask",
            expected=f"[B, T] for {rows} rows of {length} ids: the members build their own masks from it",
            got=f"shape {list(attention_mask.shape)}",
            remedy="Pass the tokenizer's mask.",
        )


def refuse_mask_of_other_text(ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache) -> None:
    """Refuse a mask that covers other columns than those of the cache and the new ids."""
    past = length_of(cache)
    if mask is not None and isinstance(past, int) and mask.shape[1] != past + ids.shape[1]:
        raise InputError.of(
            "attention_mask",
            expected=f"{past + ids.shape[1]} positions: {past} in the cache and {ids.shape[1]} new",
            got=f"{mask.shape[1]}",
            remedy="The mask covers the cached tokens too.",
        )
