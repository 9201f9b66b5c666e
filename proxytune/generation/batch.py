"""Helpers for the loops of `custom_generate`: padding, lengths, rows, the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from proxytune.errors import InputError
from proxytune.models.members.cache_name import cache_of

__all__ = ["is_synced", "lengths_of", "padding_of", "selected_rows"]


def padding_of(criteria: StoppingCriteriaList, generation_config: Any, device: torch.device) -> torch.Tensor | None:
    """The padding token for finished rows, int64 without dimensions; as in transformers, None without an EOS criterion.

    Raises:
        InputError: If there is an EOS but no padding token.
    """
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        return None
    pad: torch.Tensor | None = generation_config._pad_token_tensor
    if pad is None:
        raise InputError.of(
            "pad_token_id",
            expected="a padding token for rows that have finished",
            got="None, beside a stopping criterion with an EOS token",
            remedy="Pass pad_token_id= to generate().",
        )
    return pad.to(device)


def is_synced(model: Any) -> bool:
    """Whether this process has to go on until all processes have finished (ZeRO-3, FSDP)."""
    # transformers finds this out too, but does not pass it to a callable.
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def selected_rows(model_kwargs: dict[str, Any], select: list[int], rows: int) -> dict[str, Any]:
    """Reselect the rows of a batch: the cache in place, every other tensor of the batch as a new one.

    `select` names the old row of each new one: any number of them, in any order; `rows` is the old number of rows.
    """
    out = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
            out[name] = value.index_select(0, torch.tensor(select, device=value.device))
    cache = cache_of(model_kwargs)
    if cache is not None:
        cache.reorder_cache(torch.tensor(select))  # each layer takes it to its own device
    return out


def lengths_of(
    rows: int, width: int, device: torch.device, generation_config: Any, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Tokens per row, `[B]`, int64: without padding, but with those that only a cache or embeddings hold."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.to(device).long().sum(-1)
    # transformers ≥ 5.20 drops a mask without padding, but keeps its length.
    length = getattr(generation_config, "_mask_length", None) or width
    return torch.full((rows,), length, dtype=torch.int64, device=device)
