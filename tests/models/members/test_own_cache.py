"""MiniMax takes a cache of its own class only, which forgets its states when rows are reordered."""

import functools
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import build
from transformers import MiniMaxConfig, MiniMaxForCausalLM

import proxytune
from proxytune import ForkDecoding, LatentDecoding, ProxyTuningLogitsProcessor
from proxytune.errors import UnsupportedModeError
from proxytune.methods.latent import LatentMixture

IDS = torch.tensor([[7, 30, 8, 91, 7, 30, 8, 12, 7], [0, 0, 0, 9, 40, 41, 7, 30, 8]])
MASK = (IDS != 0).long()


@functools.cache
def minimax(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    layers = ["linear_attention", "full_attention"]
    config = MiniMaxConfig(**sizes, **ids, layer_types=layers, block_size=4, initializer_range=0.3)
    return MiniMaxForCausalLM(config).eval()


def run(model: Any, **settings: Any) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(IDS, attention_mask=MASK, **given | settings)[:, IDS.shape[1] :]


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_composed(settings: dict[str, Any]) -> None:
    members = minimax(1), build("llama", 2, 96), minimax(3)
    model = proxytune.wrap(
        members[0], expert=members[1], antiexpert=members[2], alpha=0.7, check_vocabulary=False, end_tokens="union"
    )
    want = run(model, use_cache=False, **{k: v for k, v in settings.items() if k == "num_beams"})
    assert torch.equal(run(model, **settings), want)
    if not settings:
        text = IDS[0]
        for token in want[0]:
            assert int(next_logits(list(members), 0.7, text).argmax()) == int(token)
            text = torch.cat([text, token[None]])


def test_alone_its_rows_are_not_moved() -> None:
    model = minimax(1)
    processor = ProxyTuningLogitsProcessor(build("llama", 2, 96), build("llama", 3, 96), 0.7, check_vocabulary=False)
    match = (
        r"for the base: expected a cache whose rows .*; got a MiniMaxForCausalLM, whose MiniMaxCache .*use_cache=False"
    )
    with processor.attach(model):
        assert run(model).shape == (2, 6)
        with pytest.raises(UnsupportedModeError, match=f"beams {match}"):
            run(model, num_beams=2)
        assert run(model, num_beams=2, use_cache=False).shape == (2, 6)
    with pytest.raises(UnsupportedModeError, match="a cache made by generate.., for ForkDecoding"):
        run(model, custom_generate=ForkDecoding(threshold=0.5))
    with pytest.raises(UnsupportedModeError, match=f"beams {match}"):
        run(model, num_beams=2, custom_generate=LatentDecoding(LatentMixture()))
