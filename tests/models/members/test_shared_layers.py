"""Gemma 3n and Gemma 4: layers that attend to another layer's keys, and sizes that differ between layers."""

from typing import Any

import pytest
import torch
from support.tiny import PAD, WINDOW, shared
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Gemma4ForCausalLM, Gemma4TextConfig

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor, SiblingDecoding, SpeculativeDecoding
from proxytune.costs.model_size import pass_bytes, pass_work

RUN: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 256,
}


def gemma(family: str, shares: int) -> Any:
    torch.manual_seed(1)
    if family == "gemma3n":
        sizes = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
        more = {"num_kv_shared_layers": shares, "activation_sparsity_pattern": [0.0] * 4}
        config = Gemma3nTextConfig(**COMMON, **sizes, **more)
        return Gemma3nForCausalLM(config).eval()
    sizes = {"global_head_dim": 16, "hidden_size_per_layer_input": 8 if shares else 0}
    return Gemma4ForCausalLM(Gemma4TextConfig(**COMMON, **sizes, num_kv_shared_layers=shares)).eval()


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:the antiexpert is another model:proxytune.errors.SteeringWarning")
@pytest.mark.parametrize(("family", "shares"), [("gemma3n", 2), ("gemma4", 0), ("gemma4", 2)])
def test_every_door_gives_the_text_that_no_cache_gives(family: str, shares: int) -> None:
    model, inputs = gemma(family, shares), padded()
    small = {"expert": shared("llama", 2), "antiexpert": shared("llama", 3)}
    composed = proxytune.wrap(model, **small, alpha=0.7, check_vocabulary=False, end_tokens="union")
    want = composed.generate(**inputs, use_cache=False, **RUN)
    for settings in (
        {},
        {"cache_implementation": "static"},
        {"custom_generate": FusedDecoding(seed=0)},
        {"custom_generate": SpeculativeDecoding(seed=0, draft_tokens=3)},
    ):
        assert torch.equal(composed.generate(**inputs, **settings, **RUN), want), settings
    with ProxyTuningLogitsProcessor(**small, alpha=0.7, check_vocabulary=False, end_tokens="union").attach(model):
        assert torch.equal(model.generate(**inputs, **RUN), want)
    # As the expert, it drafts on its own layers of the cache.
    base = proxytune.wrap(
        shared("llama", 1), **small | {"expert": model}, alpha=0.7, check_vocabulary=False, end_tokens="union"
    )
    want = base.generate(**inputs, use_cache=False, **RUN)
    assert torch.equal(
        base.generate(**inputs, custom_generate=SpeculativeDecoding(seed=0, draft_tokens=3), **RUN), want
    )
    processor = ProxyTuningLogitsProcessor(
        model, shared("llama", 3), alpha=0.7, check_vocabulary=False, end_tokens="union"
    )
    with processor.attach(shared("llama", 1)):
        assert torch.equal(shared("llama", 1).generate(**inputs, **RUN), want)


def test_siblings_copy_rows_of_such_a_cache() -> None:
    model = proxytune.wrap(
        gemma("gemma4", 2),
        expert=shared("llama", 2),
        antiexpert=shared("llama", 3),
        check_vocabulary=False,
        end_tokens="union",
    )
    run = {"max_new_tokens": 5, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": PAD}
    loop = SiblingDecoding(threshold=0.5, seed=1, siblings=3)
    with_cache, without = (
        model.generate(**padded(), custom_generate=loop, use_cache=cache, return_dict_in_generate=True, **run)
        for cache in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)


def test_the_cache_of_a_token_is_counted_layer_by_layer() -> None:
    # Two heads, keys and values, four bytes; sliding layers are 8 wide, full ones 16; shared layers hold nothing.
    assert pass_bytes(gemma("gemma4", 0)).cached == 2 * 2 * 4 * (8 + 16 + 8 + 16)
    assert pass_bytes(gemma("gemma4", 2)).cached == 2 * 2 * 4 * (8 + 16)
    assert pass_bytes(gemma("gemma3n", 2)).cached == 2 * 2 * 4 * (8 + 8)
    assert pass_bytes(shared("llama", 1)).cached == 2 * 2 * 4 * 2 * 8
    assert pass_work(gemma("gemma4", 2)).layers == 4
