"""Attached bases whose state is in no cache of transformers: what `generate()` does wrongly by itself is refused."""

from typing import Any

import pytest
import torch
from support.tiny import PAD, build
from transformers import (
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import UnsupportedModeError
from proxytune.models.members.cache_name import CACHE

IDS = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def base(name: str) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32}
    gemma = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1}
    match name:
        case "rwkv":
            return RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=2, context_length=64)).eval()
        case "recurrent_gemma":
            config = RecurrentGemmaConfig(**sizes, **gemma, lru_width=32, attention_window_size=16)
            return RecurrentGemmaForCausalLM(config).eval()
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize(
    ("name", "settings", "refused"),
    [
        ("rwkv", {}, "a batch for the base: .*RwkvForCausalLM .*one prompt at a time"),
        ("rwkv", {"use_cache": False}, None),
        (
            "rwkv",
            {"attention_mask": PADDED, "use_cache": False},
            "left padding for the base: .*RwkvForCausalLM .*the same length",
        ),
        ("rwkv", {"num_beams": 2}, "beams for the base: .*takes `state`, which is no cache .*use_cache=False"),
        ("recurrent_gemma", {"num_beams": 2}, "beams for the base: .*state in its own modules .*use_cache=False"),
        ("recurrent_gemma", {"num_beams": 2, "use_cache": False}, None),
        ("recurrent_gemma", {"prefill_chunk_size": 3}, None),
        ("openai-gpt", {"num_beams": 2}, None),
        ("openai-gpt", {"attention_mask": PADDED}, None),
    ],
    ids=str,
)
def test_what_is_refused(name: str, settings: dict[str, Any], refused: str | None) -> None:
    model = base(name)
    companions = build("llama", 2, 96), build("llama", 3, 96)
    processor = ProxyTuningLogitsProcessor(*companions, alpha=0.7, check_vocabulary=False, end_tokens="base")
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with processor.attach(model):
        if refused is None:
            assert model.generate(IDS, **asked, **settings).shape == (2, 9)
            return
        with pytest.raises(UnsupportedModeError, match=refused):
            model.generate(IDS, **asked, **settings)


def test_drafts_after_a_filled_cache_are_refused() -> None:
    model = build("llama", 1, 96)
    processor = ProxyTuningLogitsProcessor(build("llama", 2, 96), build("llama", 3, 96), 0.7, check_vocabulary=False)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with processor.attach(model):
        out = model.generate(IDS[:1], **asked, return_dict_in_generate=True)
        model.generate(out.sequences, **asked, prompt_lookup_num_tokens=2)
        with pytest.raises(UnsupportedModeError, match="drafts after a filled cache: .*; got 8 cached tokens"):
            model.generate(out.sequences, **asked, prompt_lookup_num_tokens=2, **{CACHE: out[CACHE]})


def test_a_filled_cache_of_a_model_that_reads_one_token_at_a_time_is_refused() -> None:
    model = build("jamba", 1, 96)
    processor = ProxyTuningLogitsProcessor(build("llama", 2, 96), build("llama", 3, 96), 0.7, check_vocabulary=False)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with processor.attach(model):
        out = model.generate(IDS[:1], **asked, return_dict_in_generate=True)
        model.generate(out.sequences, **asked, **{CACHE: out[CACHE]})  # one new token
        out = model.generate(IDS[:1], **asked, return_dict_in_generate=True)
        more = torch.cat([out.sequences, IDS[1:, :2]], 1)
        with pytest.raises(UnsupportedModeError, match="a filled cache for the base: .*by single tokens only"):
            model.generate(more, **asked, **{CACHE: out[CACHE]})
