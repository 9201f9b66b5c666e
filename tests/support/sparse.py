"""Tiny models whose attention is indexed or compressed: an index chooses among more tokens than it may keep."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from support.tiny import BOS, EOS, PAD

VOCAB, WINDOW, RATE, CHOSEN = 64, 8, 4, 6

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    **_IDS,
}
# An index's scores are sums of ReLUs over heads: with few heads many are exactly 0, and which of them are chosen then
# depends on the length of the text, also without a cache.
_INDEX = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": CHOSEN}
_LATENT = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepseekV32": {**_LATENT, **_INDEX},
    "GlmMoeDsa": {**_LATENT, **_INDEX, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    "DeepseekV4": {
        **_INDEX,
        "num_hidden_layers": 3,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"],
        "compress_rates": {"compressed_sparse_attention": RATE, "heavily_compressed_attention": RATE + 1},
        "index_topk": 2,
        "sliding_window": WINDOW,
        "mlp_layer_types": ["moe"] * 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 5,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "MiniMaxM3VL": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": RATE,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "dense_intermediate_size": 32,
        "shared_intermediate_size": 16,
    },
    "Qwen4Exp": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 2 * RATE,
        "indexer_compress_ratio": RATE,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    },
}


@functools.cache
def made(name: str, seed: int = 0) -> Any:
    """A random float32 model; tests must not change it. Skips the test where transformers has none of its kind."""
    kind = getattr(transformers, f"{name}ForCausalLM", None)
    if kind is None and name == "MiniMaxM3VL":
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM as kind
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}ForCausalLM")
    config = kind.config_class(**_SIZES | CONFIGS[name])
    if "qwen_sparse_attention" in config.layer_types:
        pytest.skip("its positions stood on the cache itself, not in a layer")
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2 or not bool(p.any()):  # what begins as zero or one would hide a fault
                p.add_(torch.randn_like(p) * 0.3)
        model.get_input_embeddings().weight[PAD].normal_(std=0.3)  # of zeros, all scores are 0
    model.generation_config.pad_token_id = PAD
    return model.eval()
