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
import time
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
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
    **dict.fromkeys(("hidden_size_global", "encoder_cross_output_size"), HIDDEN),
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
    "index_n_heads": 16,  # an indexer's scores are sums of relu over heads: of few heads many are 0, and tie
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
    **dict.fromkeys(("depth", "num_blocks"), 1),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    "patch_size": 16,
    "max_source_positions": 32,
    "num_mel_bins": 8,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers")  # a config counts these as num_hidden_layers

# What the sizes leave wrong, by the name of the family: more of a config, also of one inside (`text_config.…`).
_GEMMA4 = {"global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA4 = {
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "moe_layers": [1],
}
_QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "hc_count": 2,
}
_SWA = {
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
}
_DOTS = {**_SWA, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS}
_INKLING = {"unpadded_vocab_size": VOCABULARY, "d_rel": 4, "rel_extent": 8}
_ASSISTANT = {
    "model_type": "gemma4_text",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "vocab_size": VOCABULARY,
    "sliding_window": WINDOW,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 100,
        "cross_attn_k": 2,
        "local_attention_window_len": WINDOW,
        "patching_threshold": 4.0,
        **{f"{part}_config.cross_attn_k": 2 for part in ("encoder", "decoder")},
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "head_dim": 16,
        "o_groups": 2,
        "hc_mult": 2,
    },
    # A pass over the whole text has no window, and the default one, 3,000, is as long as its context.
    "moshi": {"sliding_window": CONTEXT},
    "dory": {
        "ngpt_alpha_init": 0.5,  # at its default .05 attention says next to nothing
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in _DOTS.items()},
        "audio_config.adapter_input_size": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
        "vision_config.adapter_in_dim": HIDDEN,
        "vision_config.adapter_out_dim": HIDDEN,
    },
    "dots3_note_text": _DOTS,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 64,
    },
    "gemma4": {f"text_config.{name}": value for name, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {f"text_config.{name}": value for name, value in _GEMMA4.items()},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": HIDDEN},
    "gemma4_unified_assistant": {
        "text_config": _ASSISTANT | {"model_type": "gemma4_unified_text"},
        "backbone_hidden_size": HIDDEN,
    },
    "got_ocr2": {"vision_config.output_channels": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_intermediate_size": 16,
    },
    "inkling_text": {**_INKLING, "logits_mup_width_multiplier": 1.0},
    "inkling2_text": _INKLING,
    "inkling2_loop_text": {
        **_INKLING,
        "n_layers_per_attn_res_block": 1,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "llama4": {f"text_config.{name}": value for name, value in _LLAMA4.items()},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "text_config.num_hidden_layers": 3,
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.num_global_layers": 1,
    },
    "minicpm3": {"dim_model_base": HIDDEN, "scale_emb": 1},
    "minimax_m3_vl_text": {"index_topk_blocks": 2, "shared_intermediate_size": 16},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config.image_size": 32,
        "audio_config.nemo_conv_channels": 8,
        "audio_config.ext_pw_out_channel": HIDDEN,
        "audio_config.depthwise_separable_out_channel": HIDDEN,
    },
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3, "w_init_variance_scale": 1.0},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": HIDDEN,
        "shape_embed_dim": HIDDEN,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xlm": {"causal": True},
    # Some of its sizes are rounded up to multiples of 64, and those of its cache are not.
    "xlstm": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_heads": 2,
        "qk_dim_factor": 0.5,
        "ffn_round_up_to_multiple_of": 8,
        "chunk_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "time_step_min": 1e-30,  # only a pass over several tokens keeps to it, one over a single token does not
    },
    "nemotron_h": {"time_step_min": 1e-30},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": WINDOW,
    },
}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
_LONG = {**_ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL]}
# What a family can be besides its default, by "name/setting".
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba/recurrent": {"attn_layer_indices": []},
    "bart/unequal": {"encoder_layers": 1},
    "bert/encoder": {"is_decoder": False},
    "deepseek_v32/all": {"index_topk": 512},
    "doge/window": {"keep_window_size": 6},
    "dory/last_loop": {"recurrent_kv_cache_mode": "last_loop"},
    "falcon/alibi": {"alibi": True},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text/unshared": {"num_kv_shared_layers": 0},
    "gemma4_text/moe": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "gemma4_text/one_for_both": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text/shared": {"layer_types": [_SLIDING, _FULL] * 2, "num_kv_shared_layers": 2},
    "gpt_bigcode/many": {"multi_query": False},
    "granitemoehybrid/attention": {"layer_types": [_FULL] * 2},
    "hrm_text/causal": {"prefix_lm": False},
    "jamba/attention": {"attn_layer_period": 1, "attn_layer_offset": 0, "num_hidden_layers": 2},
    "lfm2/conv": {"layer_types": ["conv"] * 2},
    "llama/dynamic": {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}},
    "llama/llama3": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "llama/yarn": {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}},
    "inkling2_text/scaled": {"log_scaling_n_floor": 4},
    "llama4_text/scaled": {"floor_scale": 4},
    "llama4_text/full": {"layer_types": [_FULL] * 2},
    "minimax/attention": {"layer_types": [_FULL] * 2},
    "minimax/linear": {"layer_types": [_LINEAR] * 2},
    "mistral/full": {"sliding_window": None},
    "mpt/learned": {"attn_config": {"alibi": False}},
    "nemotron_h/mlp": {"layers_block_type": [_LINEAR, "mlp", _FULL, "moe"]},
    "opt/post": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "phi3/longrope": {"rope_parameters": _LONG, "original_max_position_embeddings": 64, "sliding_window": None},
    "phi3/partial": {"rope_parameters": {**_ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "phi3/window": {"sliding_window": WINDOW},
    "qwen2/window": _WINDOW,
    "qwen3/window": _WINDOW,
    "qwen3_next/linear": {"layer_types": [_LINEAR] * 2},
    "qwen4_exp_text/ngrams": {
        "ple_layer_ids": [1],
        "ple_embed_dim": HIDDEN,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
        "eos_token_id": EOS,
    },
    "starcoder2/window": {"sliding_window": WINDOW},
    "xlm/encoder": {"causal": False},
    "zamba2/clamped": {"time_step_min": 0.001},
    "zaya/hybrid": {"layer_types": ["hybrid"] * 2, "sliding_window": None},
}
# Names whose whole model is no causal LM of text: the part that is.
PARTS = {"musicgen": "MusicgenDecoderConfig", "musicgen_melody": "MusicgenMelodyDecoderConfig"}


def names() -> list[str]:
    """Every name in the installed transformers' causal mapping, and every setting of one of them."""
    mapped = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return mapped + [name for name in SETTINGS if name.split("/")[0] in mapped]


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of a name, with tiny sizes."""
    family = name.split("/")[0]
    kind = getattr(transformers, PARTS[family]) if family in PARTS else CONFIG_MAPPING[family]
    return _shrunk(kind, FAMILIES.get(family, {}) | SETTINGS.get(name, {}))


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    own = {k: v for k, v in changes.items() if "." not in k}
    inner = {k.split(".", 1)[0] for k in changes if "." in k} | set(kind.sub_configs)
    default = kind(**{k: v for k, v in own.items() if isinstance(v, dict) and k in kind.sub_configs})
    given: dict[str, Any] = {}
    names = {k for k in {*vars(default), *kind.__dataclass_fields__} if not k.startswith("_")}
    for name in names & SIZES.keys() - kind.attribute_map.keys():
        value = _value(default, name)
        if (value is None and name not in _ALWAYS) or isinstance(value, list | tuple | dict):
            continue
        given[name] = SIZES[name]
    if "is_decoder" in names:
        given["is_decoder"] = True
    heads = next((h for n in ("num_attention_heads", "n_head") if isinstance(h := _value(default, n), int)), 0)
    for name in names & {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}:
        value = _value(default, name)
        if isinstance(value, int):
            given[name] = 1 if value == 1 else HEADS if value == heads else 2
    given |= _layers(default, names)
    for kinds in own.keys() & {"layer_types", "layers_block_type"}:
        given["num_hidden_layers"] = len(own[kinds])
    for name in inner - own.keys():
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            deeper = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(f"{name}.")}
            given[name] = _shrunk(type(part), deeper)
    return kind(**given | own)


# Sizes that some classes work out from others that are None, and some do not.
_ALWAYS = ("head_dim", "num_experts_per_tok")


def _value(config: PreTrainedConfig, name: str) -> Any:
    """An attribute; of one that differs from layer to layer, the default of its class."""
    try:
        return getattr(config, name, None)
    except Exception:
        return config.__dataclass_fields__[name].default


def _layers(config: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Fewer layers: one of each kind, at least two, in the order of the config."""
    sizes = {name: _value(config, name) for name in LAYERS if name in names and name not in type(config).attribute_map}
    sizes = {k: v for k, v in sizes.items() if isinstance(v, int)}
    if not sizes:
        return {}
    count = max(sizes.values())
    lists = {
        name: list(value)
        for name in names
        if isinstance(value := _value(config, name), list | tuple) and len(value) == count
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
    sizes |= {name: 0 for name in ENCODER_LAYERS if name in names}
    return dict.fromkeys(sizes, len(kept)) | {name: [value[i] for i in kept] for name, value in lists.items()}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation, whose logits differ clearly from token to token and from text to text."""
    config = tiny_config(name)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in PARTS:
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        # A padding row of zeros would tie whatever looks at it, and any token may be generated here.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.normal_(module.weight.data[module.padding_idx], std=0.3)
    return model.float().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names())
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
                moved = []
                for i in range(2, 9):
                    other = ids.clone()
                    other[0, -i] = 101
                    moved.append(float((model(other, use_cache=False).logits[0, -1] - z[-1]).abs().max()))
            print(
                f"{name}: {size / 1e3:.0f}k std {z.std(-1).mean():.3f} reach {sorted(moved)[3]:.3g} {max(moved):.3g}",
                flush=True,
            )
        except Exception as error:
            bad += 1
            print(f"{name}: FORWARD {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"{len(wanted.names) - bad} of {len(wanted.names)} built in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
