"""Members that no cache of transformers serves: the cache holds their text, and every pass reads it from the start.

RWKV takes a `state`, xLSTM a cache class of its own, RecurrentGemma keeps its state in its modules, GPT-1 takes none.
Such states cannot be reordered, cut or moved from outside. So the ids of what was read stand in one attention layer, in
place of keys and values, and whatever a cache can do is right for them. Rows are read without their padding, which most
of these models do not know. The price is a pass over the whole text for each token.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from proxytune.errors import SteeringWarning
from proxytune.models.members.cache_name import argument_of
from proxytune.models.members.innermost import innermost

__all__ = ["config_of_text", "logits_of_text", "reads_whole_text", "warn_of_cost"]

_OTHERS = ("state", "cache_params", "mems", "past_buckets_states", "cache")
_CACHES = ("past_key_values", "cache", "cache_params")


def reads_whole_text(model: Any) -> str | None:
    """Why no cache of transformers serves a causal LM, in words; None if one does. Nothing is run."""
    inner = innermost(model)
    parameters = inspect.signature(inner.forward).parameters
    for name in _CACHES:
        annotation = parameters[name].annotation if name in parameters else None
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and kind.__name__.endswith("Cache") and not issubclass(kind, Cache):
                return f"takes its cache as {kind.__name__}, which is no cache of transformers"
    if argument_of(model) is None:
        taken = [name for name in _OTHERS if name in parameters]
        return f"takes `{taken[0]}`, which is no cache of transformers" if taken else "takes no cache"
    if not getattr(inner, "_is_stateful", False):
        return None
    for module in inner.modules():
        for name, value in vars(module).items():
            if name.endswith(("_state", "_states")) and (value is None or isinstance(value, torch.Tensor)):
                return f"keeps its state in its own modules ({type(module).__name__}.{name})"
    return None


def warn_of_cost(model: Any, role: str, why: str) -> None:
    """Say that a member reads the whole text for each token. Warns: SteeringWarning."""
    warnings.warn(
        f"the {role}: {type(innermost(model)).__name__} {why}, so it reads the whole text anew for every token: slow "
        "for long texts, and without static caches and latent steps. Use a member with a cache if that is too slow.",
        SteeringWarning,
        stacklevel=4,
    )


def config_of_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config for caches of one attention layer, with what else is read from a member's text config."""
    names = ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    kept = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return PreTrainedConfig(**kept, num_hidden_layers=1, layer_types=["full_attention"])


def logits_of_text(
    model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None
) -> tuple[torch.Tensor, int]:
    """Run over what the cache holds and the new ids, which it is given; waits for the device.

    Args:
        model: The causal LM.
        input_ids: `[B, N]`, int64, the new ids.
        mask: `[B, past + N]`, 1 for tokens and 0 for padding; None if there is no padding.
        cache: A cache (or view) of one attention layer, extended in place; None if nothing came before.

    Returns:
        Raw logits `[B, N, V]`, 0 on padding; and the number of tokens that were read.
    """
    new, text = input_ids.shape[1], input_ids
    if cache is not None:
        column = input_ids[:, None, :, None]  # [B, heads, N, D]
        text = cache.update(column, column, 0)[0][:, 0, :, 0]  # [B, past + N]
    if mask is None or bool((mask != 0).all()):
        return _last_logits(model, text, new), text.numel()
    kinds, kind_of_row = torch.unique(mask != 0, dim=0, return_inverse=True)
    logits, read = None, 0
    for i, kept in enumerate(kinds):  # [past + N]
        rows, fresh = (kind_of_row == i).nonzero()[:, 0], kept[-new:].nonzero()[:, 0]
        if not len(fresh):
            continue
        alone = text[rows][:, kept]  # [R, tokens]
        part = _last_logits(model, alone, len(fresh))
        read += alone.numel()
        if logits is None:
            logits = part.new_zeros(*input_ids.shape, part.shape[-1])
        logits[rows[:, None], fresh] = part
    if logits is None:  # nothing but padding: any finite numbers will do
        logits = torch.zeros_like(_last_logits(model, text[:, -new:], new))
    return logits, read


def _last_logits(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` logits of unpadded rows of one length."""
    parameters = inspect.signature(innermost(model).forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": count}
    out = model(input_ids=ids, **{k: v for k, v in options.items() if k in parameters}, return_dict=True)
    logits: torch.Tensor = out.logits
    return logits[:, -count:]
