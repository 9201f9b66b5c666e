"""The bytes and operations of a model's forward pass, from its parameters and config."""

from __future__ import annotations

from transformers import PreTrainedModel

from proxytune.costs.devices import Work
from proxytune.costs.roofline import PassBytes

__all__ = ["pass_bytes", "pass_work"]


def pass_bytes(model: PreTrainedModel) -> PassBytes:
    """The bytes one forward pass of a causal LM reads: all weights once.

    An embedding table that is not also the head does not count, since a pass reads few of its rows. All weights of a
    mixture of experts count, more than a pass of few tokens reads. The cache counts per token of a row, 0 if the config
    does not tell its shape.
    """
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    looked_up = head is not None and head.weight is not table
    # By id, so that tied tensors count once.
    parts = {id(p): p.numel() * p.element_size() for p in model.parameters() if not (looked_up and p is table)}
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    if width is None and getattr(config, "num_attention_heads", None):
        width = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width * table.element_size() if heads and width else 0
    return PassBytes(float(sum(parts.values())), float(cached))


def pass_work(model: PreTrainedModel) -> Work:
    """The bytes, parameters and layers of one forward pass of a causal LM."""
    read = pass_bytes(model)
    size = model.get_input_embeddings().weight.element_size()
    return Work(read, read.weights / size, int(model.config.get_text_config(decoder=True).num_hidden_layers))
