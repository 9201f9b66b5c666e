"""A tiny random model of every name in the installed transformers' causal mapping, made from its own config class.

::

    python tests/families/tiny_models.py                   build them all, and list those that cannot be built
    python tests/families/tiny_models.py jamba zamba2      some of them

A config is taken as its class makes it, every size in it is replaced by a tiny one of the same name (`SIZES`), and its
layers are cut to one of each kind. What that leaves wrong stands in `FAMILIES`; what a family can be besides its
default (a window, chunks, shared keys and values, long rope, …), in `SETTINGS`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
PAD, BOS, EOS = 0, 1, 2
WINDOW = 8  # shorter than every text, so that windows and chunks are really crossed
CONTEXT = 256
HIDDEN, HEADS = 32, 4

# What every size becomes, by its name in the config. A name that a config lacks is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "dff", "feed_forward_size", "d_inner", "d_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "mlp_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "dim_head", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(("swa_head_dim", "global_head_dim", "attention_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("index_n_heads",), 2),
    "qk_head_dim": 16,
    "index_topk": 6,  # fewer than the tokens of a text: what the indexer chooses matters
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("window_size", "local_attention", "block_size", "index_block_size"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), CONTEXT),
    **dict.fromkeys(("context_length", "max_target_positions", "model_max_length"), CONTEXT),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "adapter_rank", "rotary_dim"), 8),
    "router_hidden_size": 16,
    "original_max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    **dict.fromkeys(("initializer_range", "init_std", "embed_init_std"), 0.3),
    # Towers that no text passes through.
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth", "num_blocks"), 1),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    "patch_size": 16,
    "max_source_positions": 32,
    "num_mel_bins": 8,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")

# What the sizes leave wrong, by the name of the family: more of a config, also of one inside (`text_config.…`).
FAMILIES: dict[str, dict[str, Any]] = {
}


def tiny_config(name: str, settings: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a family, with tiny sizes, and `settings` in place of what that gives."""
    changes = FAMILIES.get(name, {}) | (settings or {})
    return _shrunk(CONFIG_MAPPING[name], changes)


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    own = {k: v for k, v in changes.items() if "." not in k}
    inner = {k.split(".", 1)[0] for k in changes if "." in k} | set(kind.sub_configs)
    default = kind(**{k: v for k, v in own.items() if k in _NEEDED})
    given: dict[str, Any] = {}
    names = {k for k in {*vars(default), *kind.__dataclass_fields__} if not k.startswith("_")}
    for name in names & SIZES.keys() - kind.attribute_map.keys():
        value = getattr(default, name, None)
        if value is None or isinstance(value, list | tuple | dict):
            continue
        given[name] = SIZES[name]
    heads = next((getattr(default, n) for n in ("num_attention_heads", "n_head") if isinstance(getattr(default, n, None), int)), 0)
    for name in names & {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}:
        value = getattr(default, name, None)
        if isinstance(value, int):
            given[name] = 1 if value == 1 else HEADS if value == heads else 2
    given |= _layers(default, names)
    for name in inner:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            deeper = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(f"{name}.")}
            given[name] = _shrunk(type(part), deeper)
    return kind(**given | own)


_NEEDED = frozenset({"hidden_size_per_layer_input"})


def _layers(config: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Fewer layers: one of each kind, at least two, in the order of the config."""
    sizes = {name: getattr(config, name) for name in LAYERS if name in names and name not in type(config).attribute_map}
    sizes = {k: v for k, v in sizes.items() if isinstance(v, int)}
    if not sizes:
        return {}
    count = max(sizes.values())
    lists = {
        name: list(value)
        for name in names
        if isinstance(value := getattr(config, name, None), list | tuple) and len(value) == count
    }
    kept: list[int] = []
    for kinds in lists.values():
        seen = {str(kinds[i]) for i in kept}
        for i, kind in enumerate(kinds):
            if str(kind) not in seen:
                seen.add(str(kind))
                kept.append(i)
    for i in range(count):
        if len(kept) >= 2:
            break
        if i not in kept:
            kept.append(i)
    kept.sort()
    return dict.fromkeys(sizes, len(kept)) | {name: [value[i] for i in kept] for name, value in lists.items()}


def build(name: str, seed: int = 0, settings: dict[str, Any] | None = None) -> PreTrainedModel:
    """A random float32 model in evaluation, whose logits differ clearly from token to token and from text to text."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name, settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    wanted = parser.parse_args()
    start, bad = time.time(), 0
    for name in wanted.names:
        try:
            model = build(name)
        except Exception as error:
            bad += 1
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        size = sum(p.numel() for p in model.parameters())
        ids = torch.randint(3, 100, (1, 20))
        try:
            with torch.no_grad():
                z = model(ids, use_cache=False).logits[0]
                other = ids.clone(); other[0, -2] = 101; 
                far = ids.clone(); far[0, -7] = 101
                a = (model(other, use_cache=False).logits[0, -1] - z[-1]).abs().max()
                b = (model(far, use_cache=False).logits[0, -1] - z[-1]).abs().max()
            print(f"{name}: {size/1e3:.0f}k std {z.std(-1).mean():.3f} near {a:.3g} far {b:.3g}", flush=True)
        except Exception as error:
            bad += 1
            print(f"{name}: FORWARD {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"{len(wanted.names) - bad} of {len(wanted.names)} built in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
