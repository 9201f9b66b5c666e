"""Tiny random models of every supported family (and some unsupported ones), built from configs: no download."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, BOS, EOS = 0, 1, 2
CONTEXT = 512
# Shorter than every test's text, so that windows really slide.
WINDOW = 8


def build(
    kind: str, seed: int, vocab: int = 256, *, context: int = CONTEXT, hidden: int = 32, layers: int = 2
) -> PreTrainedModel:
    """A random float32 model; weights are drawn wide enough for rows to be far from uniform.

    `layers` counts for "llama", "qwen3", "mistral" and "gpt2"; the others have two.
    """
    torch.manual_seed(seed)
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    common = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        **ids,
    }
    windows = {"sliding_window": WINDOW}
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**common))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8))
        case "gpt2":
            config = GPT2Config(
                vocab_size=vocab,
                n_embd=hidden,
                n_layer=layers,
                n_head=4,
                n_positions=context,
                initializer_range=0.3,
                **ids,
            )
            model = GPT2LMHeadModel(config)
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**common, **windows))
        case "gemma3":
            types = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
            model = Gemma3ForCausalLM(Gemma3TextConfig(**common | types, **windows, head_dim=8))
        case "mamba":
            model = MambaForCausalLM(
                MambaConfig(vocab_size=vocab, hidden_size=hidden, state_size=8, num_hidden_layers=2, **ids)
            )
        case "qwen3_next":
            config = Qwen3NextConfig(
                **common,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                decoder_sparse_step=1,
            )
            model = Qwen3NextForCausalLM(config)
        case "mamba2":
            sizes = {
                "num_heads": 8,
                "head_dim": 8,
                "state_size": 8,
                "n_groups": 2,
                "chunk_size": 8,
                "num_hidden_layers": 2,
            }
            model = Mamba2ForCausalLM(Mamba2Config(vocab_size=vocab, hidden_size=hidden, expand=2, **sizes, **ids))
        case "qwen3_5":
            config = Qwen3_5TextConfig(
                **common,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
            model = Qwen3_5ForCausalLM(config)
        case "jamba":
            config = JambaConfig(
                **common,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                num_experts=2,
                num_experts_per_tok=1,
                mamba_d_state=8,
                mamba_d_conv=4,
                mamba_expand=2,
                mamba_dt_rank=4,
                use_mamba_kernels=False,
            )
            model = JambaForCausalLM(config)
        case "lfm2":
            model = Lfm2ForCausalLM(Lfm2Config(**common, layer_types=["conv", "full_attention"]))
        case "t5":
            config = T5Config(
                vocab_size=vocab, d_model=hidden, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD
            )
            model = T5ForConditionalGeneration(config)
        case _:
            raise ValueError(kind)
    model.generation_config.pad_token_id = PAD
    return model.eval()


@functools.cache
def shared(kind: str, seed: int, vocab: int = 256, *, layers: int = 2) -> PreTrainedModel:
    """A model that several tests share; they must not change it."""
    return build(kind, seed, vocab, layers=layers)


VOCABULARY = 3 + 256


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens, padded at the left, with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {letter: i for i, letter in enumerate(letters, 3)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast
