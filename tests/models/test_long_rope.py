"""Members whose frequencies depend on the length of the text, and packed texts: whole, or refused."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny import build
from transformers import Phi3Config, Phi3ForCausalLM

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import UnsupportedModeError
from proxytune.models import chunked_forward

SWITCH = 12


def phi3(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=SWITCH,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0, 8.0, 16.0, 32.0],
            "original_max_position_embeddings": SWITCH,
        },
        initializer_range=0.3,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> proxytune.ProxyTunedModel:
    return proxytune.wrap(phi3(0), expert=phi3(1), antiexpert=phi3(2), check_vocabulary=False)


IDS = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def slow(model: Any, row: torch.Tensor) -> torch.Tensor:
    for _ in range(9):
        z = [m.model(row[None]).logits[:, -1] for m in model.members]
        row = torch.cat([row, (z[0] + model.alpha * (z[1] - z[2])).argmax(-1)])
    return row


def test_texts_that_cross_the_switch_are_read_again(model: proxytune.ProxyTunedModel) -> None:
    want = slow(model, IDS[1])
    for keys in ({}, {"custom_generate": FusedDecoding(seed=0)}, {"num_beams": 1, "cache_implementation": "static"}):
        assert torch.equal(model.generate(IDS[1:], **GREEDY, **keys)[0], want), keys
    # In a padded batch the longest row decides, as in the plain model; it is the second.
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **GREEDY)[1], want)
    if Version(transformers.__version__) < Version("5.23"):
        return  # there, a plain phi3 goes on from the last token alone
    shift = ProxyTuningLogitsProcessor(model.expert, model.antiexpert, check_vocabulary=False)
    with shift.attach(model.base):
        assert torch.equal(model.base.generate(IDS[1:], **GREEDY)[0], want)
        assert torch.equal(model.base.generate(IDS[1:], **GREEDY, prefill_chunk_size=3)[0], want)


def test_what_would_cross_the_switch_over_a_cache_is_refused(model: proxytune.ProxyTunedModel) -> None:
    with pytest.raises(UnsupportedModeError, match=rf"length for the base: expected a text within {SWITCH} tokens"):
        model.generate(IDS[1:], **GREEDY, custom_generate=SpeculativeDecoding(seed=0))
    out = model(IDS)
    with pytest.raises(UnsupportedModeError, match="8 cached tokens, continued to 16"):
        model(IDS, past_key_values=out.past_key_values)


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_of_a_text_beyond_the_switch(
    model: proxytune.ProxyTunedModel, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = torch.cat([IDS, IDS, IDS], 1)
    with torch.no_grad():
        want = model(text, labels=text)
        monkeypatch.setattr(chunked_forward, "PART", 8)
        got = model(text, labels=text, use_cache=use_cache)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


def test_packed_texts_stay_apart_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = proxytune.wrap(
        build("llama", 0), expert=build("llama", 1), antiexpert=build("llama", 2), check_vocabulary=False
    )
    text, positions = IDS[:1].repeat(1, 2), torch.arange(8).repeat(2)[None]
    monkeypatch.setattr(chunked_forward, "PART", 6)
    with torch.no_grad():
        packed = model(text, position_ids=positions, use_cache=False).logits
        alone = model(IDS[:1], use_cache=False).logits
    torch.testing.assert_close(packed, alone.repeat(1, 2, 1))
