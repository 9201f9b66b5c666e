"""Tiny looped models, and their recursion written out: noise at the end of each pass, counted call by call."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from support.recursion import SIZE, VOCAB, How, Recurring
from support.tiny import BOS, EOS, PAD

PASSES, FIRST, END = 3, 1, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    "unpadded_vocab_size": VOCAB,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "log_scaling_n_floor": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": FIRST,
    "loop_layer_index_end": END,
    "loop_num_passes": PASSES,
    "loop_gate_rank": 4,
}
DORY = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": 64,
    "sliding_window": 8,
    "n_input_layers": FIRST,
    "n_recurrent_layers": END - FIRST,
    "n_output_layers": 4 - END,
    "n_recurrent_loops": PASSES,
}


def looped(kind: str, seed: int = 3, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A random model; skips the test where transformers has none of its kind."""
    names, sizes = {
        "inkling": (("Inkling2LoopTextConfig", "Inkling2LoopForCausalLM"), INKLING),
        "dory": (("DoryConfig", "DoryForCausalLM"), DORY),
    }[kind]
    if not hasattr(transformers, names[1]):
        pytest.skip(f"transformers {transformers.__version__} has no {names[1]}")
    torch.manual_seed(seed)
    model = getattr(transformers, names[1])(getattr(transformers, names[0])(**SIZES | sizes | more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" not in name and not bool(p.any()):  # what begins as zero would hide a fault
                p.normal_(std=0.3)
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


class _Noisy(torch.nn.Module):
    """A layer whose output is moved, once in each pass."""

    def __init__(self, layer: Any, recurring: Any) -> None:
        super().__init__()
        self.layer, self.recurring, self.calls = layer, recurring, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("layer"), name) if name != "layer" else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        u: torch.Tensor = self.layer(*args, **kwargs)
        self.calls += 1
        return self.recurring(u[0], self.calls - 1)[None].to(u.dtype)


@torch.no_grad()
def thought(model: Any, text: list[int], how: How) -> torch.Tensor:
    """Logits `[V]` after a text, without cache and padding."""
    noisy = copy.copy(model)
    noisy._modules = dict(model._modules)
    inner = copy.copy(model.model)
    inner._modules = dict(model.model._modules)
    layer = model.model.layers[END - 1]
    inner._modules["layers"] = torch.nn.ModuleList(model.model.layers)
    inner._modules["layers"][END - 1] = _Noisy(layer, Recurring(how, len(text)))
    noisy._modules["model"] = inner
    logits: torch.Tensor = noisy(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
    assert inner._modules["layers"][END - 1].calls == PASSES
    return logits


shared = functools.cache(looped)
