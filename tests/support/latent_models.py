"""Models that are special to latent steps: one with a second embedding, and two that cannot take part."""

from __future__ import annotations

from typing import Any

import torch
from support.tiny import BOS, EOS, PAD, build
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


def gemma3n() -> Gemma3nForCausalLM:
    """A tiny Gemma 3n, which looks its ids up once more for every layer."""
    torch.manual_seed(1)
    config = Gemma3nTextConfig(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    model = Gemma3nForCausalLM(config).eval()
    model.generation_config.pad_token_id = PAD
    return model


def _config() -> LlamaConfig:
    return build("llama", 1).config


class KeyedByIds(LlamaForCausalLM):
    """Adds a bias that is looked up by the ids themselves, where it is given ids."""

    def __init__(self) -> None:
        super().__init__(_config())
        self.bias = torch.nn.Embedding(256, 256)
        self.eval()

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        out = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + self.bias(input_ids)[:, -out.logits.shape[1] :]
        return out


class NoEmbeddings(LlamaForCausalLM):
    """Takes ids only."""

    def __init__(self) -> None:
        super().__init__(_config())
        self.eval()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
