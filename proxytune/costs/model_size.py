"""The bytes and operations of a model's forward pass, from its parameters and config."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from proxytune.costs.devices import Work
from proxytune.costs.roofline import PassBytes

__all__ = ["cached_values", "pass_bytes", "pass_work", "weight_bytes"]

_KEEP_NO_TOKENS = frozenset({"linear_attention", "conv", "moe", "mlp", "dummy"})
"""Kinds of layers whose cache does not grow with the text."""


def pass_bytes(*models: PreTrainedModel) -> PassBytes:
    """The bytes one forward pass of a causal LM reads: all weights once; of several in one step, their sum.

    What is one model in several roles, with other adapters or another prompt, goes through it as one pass: its weights
    count once, and the cache for each role.

    An embedding table that is not also the head does not count, since a pass reads few of its rows. All weights of a
    mixture of experts count, more than a pass of few tokens reads. The cache counts per token of a row, 0 if the config
    does not tell its shape.
    """
    parts: dict[int, int] = {}  # by id, so that tied tensors count once
    cached = 0
    for model in models:
        # Quantisers may keep either in buffers.
        table = getattr(model.get_input_embeddings(), "weight", None)
        head = model.get_output_embeddings()
        looked_up = head is not None and getattr(head, "weight", None) is not table
        parts |= {id(p): p.numel() * p.element_size() for p in model.parameters() if not (looked_up and p is table)}
        cached += cached_values(model.config.get_text_config(decoder=True)) * model.dtype.itemsize
    return PassBytes(float(sum(parts.values())), float(cached))


def weight_bytes(model: PreTrainedModel, bits: float) -> float:
    """Bytes of a model's weights at so many bits each; tied ones count once.

    Below 16 bits, embeddings, head and what is no matrix keep 16, as quantisers leave them.
    """
    kept = {id(getattr(part, "weight", None)) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    sizes = {id(p): (p.numel(), p.ndim > 1 and id(p) not in kept) for p in model.parameters()}
    return sum(count * (bits if matrix else max(bits, 16.0)) / 8 for count, matrix in sizes.values())


def cached_values(config: Any) -> int:
    """Keys and values that a token adds to the cache, over all layers of a text config; 0 if it does not tell."""
    # Gemma 4's config raises for sizes that differ between layers, and each layer's own tells them.
    layers = list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)
    modes = getattr(config, "kv_sharing_modes", None)
    own = len(layers) - (getattr(config, "num_kv_shared_layers", None) or 0)
    kinds = getattr(config, "layer_types", None)
    total = 0
    for number, layer in enumerate(layers):
        if modes[number] == "reuse" if modes else number >= own:
            continue  # it attends to another layer's
        if kinds and kinds[number] in _KEEP_NO_TOKENS:
            continue
        queries = getattr(layer, "num_attention_heads", None)
        heads = getattr(layer, "num_key_value_heads", None) or queries
        width = getattr(layer, "head_dim", None) or (layer.hidden_size // queries if queries else None)
        total += 2 * heads * width if heads and width else 0
    return total


def pass_work(*models: PreTrainedModel) -> Work:
    """The bytes, parameters and layers of one forward pass of a causal LM, which may have several roles in it."""
    model = models[0]
    read = pass_bytes(*models)
    parameters = sum(pass_bytes(one).weights for one in models) / model.dtype.itemsize
    return Work(read, parameters, int(model.config.get_text_config(decoder=True).num_hidden_layers))
