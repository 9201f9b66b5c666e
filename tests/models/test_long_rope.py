"""Members whose frequencies depend on the length of the text, and packed texts: whole, or refused."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.companion import PrefixCachedMember
from support.tiny import build
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import FusedDecoding, LatentDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import CacheError, UnsupportedModeError
from proxytune.methods.latent import LatentLogitsProcessor, LatentMixture
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.methods.trees import ForkDecoding, SiblingDecoding
from proxytune.models import chunked_forward
from proxytune.models.members.cache_name import cache_of

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
        eos_token_id=None,  # the default has no embedding here
    )
    return Phi3ForCausalLM(config).eval()


def attached(model: Any) -> Any:
    shift = ProxyTuningLogitsProcessor(model.expert, model.antiexpert, check_vocabulary=False)
    return shift.attach(model.base)


@pytest.fixture(scope="module")
def model() -> proxytune.ProxyTunedModel:
    return proxytune.wrap(phi3(0), expert=phi3(1), antiexpert=phi3(2), check_vocabulary=False)


IDS = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def slow(model: Any, row: torch.Tensor, new: int = 9) -> torch.Tensor:
    for _ in range(new):
        z = [m.model(row[None]).logits[:, -1] for m in model.members]
        row = torch.cat([row, (z[0] + model.alpha * (z[1] - z[2])).argmax(-1)])
    return row


def test_texts_that_cross_the_switch_are_read_again(model: proxytune.ProxyTunedModel) -> None:
    want = slow(model, IDS[1])
    for keys in ({}, {"custom_generate": FusedDecoding(seed=0)}, {"num_beams": 1, "cache_implementation": "static"}):
        assert torch.equal(model.generate(IDS[1:], **GREEDY, **keys)[0], want), keys
    # In a padded batch the longest row decides, as in the plain model; it is the second.
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **GREEDY)[1], want)
    with attached(model):
        if Version(transformers.__version__) < Version("5.23"):
            # There, a plain phi3 goes on from the last token alone.
            with pytest.raises(UnsupportedModeError, match="with an attached processor"):
                model.base.generate(IDS[1:], **GREEDY)
            return
        assert torch.equal(model.base.generate(IDS[1:], **GREEDY)[0], want)
        assert torch.equal(model.base.generate(IDS[1:], **GREEDY, prefill_chunk_size=3)[0], want)


def test_what_would_cross_the_switch_over_a_cache_is_refused(model: proxytune.ProxyTunedModel) -> None:
    with pytest.raises(UnsupportedModeError, match=rf"length for the base: expected a text within {SWITCH} tokens"):
        model.generate(IDS[1:], **GREEDY, custom_generate=SpeculativeDecoding(seed=0))
    # Rows of a batch advance by themselves, and the longest may leave first.
    mixed = torch.cat([IDS[:, :6], IDS], 1)
    mask = torch.tensor([[1] * 14, [0] * 6 + [1] * 8])
    with pytest.raises(UnsupportedModeError, match="prompts of 8 to 14 tokens"):
        model.generate(mixed, attention_mask=mask, **GREEDY, custom_generate=SpeculativeDecoding(seed=0))
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


LOOKUP = SpeculativeDecoding(seed=0, draft=PromptLookupDraft())
REWINDING: dict[str, tuple[str, dict[str, Any]]] = {
    "expert drafts": ("composed", {"custom_generate": SpeculativeDecoding(seed=0)}),
    "prompt lookup": ("composed", {"prompt_lookup_num_tokens": 4}),
    "assistant": ("composed", {"assistant_model": phi3(0)}),
    "attached, lookup drafts": ("attached", {"custom_generate": LOOKUP}),
    "attached, prompt lookup": ("attached", {"prompt_lookup_num_tokens": 4}),
    "attached, assistant": ("attached", {"assistant_model": phi3(0)}),
    "plain, lookup drafts": ("plain", {"custom_generate": LOOKUP}),
}


@pytest.mark.parametrize("mode", REWINDING)
def test_a_mode_that_rewinds_does_not_cross_the_switch(model: proxytune.ProxyTunedModel, mode: str) -> None:
    kind, keys = REWINDING[mode]
    near = torch.cat([IDS[1:, :4], IDS[1:, :4]], 1)  # what prompt lookup finds drafts in
    far = torch.cat([near, near[:, :6]], 1)
    plain = SimpleNamespace(members=[SimpleNamespace(model=model.base)] * 3, alpha=0.0)
    reference = plain if kind == "plain" else model
    calls = [(prompt, new, slow(reference, prompt[0], new)) for prompt, new in ((near, 4), (far, 6))]
    with attached(model) if kind == "attached" else nullcontext():
        target = model if kind == "composed" else model.base
        with pytest.raises(UnsupportedModeError, match=r"for the base: .* Lower max_new_tokens to 4, so that the text"):
            target.generate(near, **GREEDY, **keys)
        for prompt, new, want in calls:
            got = target.generate(prompt, **GREEDY | {"max_new_tokens": new}, **keys)
            assert torch.equal(got[0], want), (mode, new)


def test_the_refusal_comes_before_the_first_token(model: proxytune.ProxyTunedModel) -> None:
    streamer = RecordingStreamer()
    with pytest.raises(UnsupportedModeError, match="switch"):
        model.generate(IDS[1:], **GREEDY, custom_generate=SpeculativeDecoding(seed=0), streamer=streamer)
    assert streamer.count == 1  # the prompt


class RecordingStreamer(BaseStreamer):
    count = 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1

    def end(self) -> None:
        pass


@pytest.mark.parametrize("composed", [True, False])
def test_latent_steps_do_not_cross_the_switch_over_a_cache(model: proxytune.ProxyTunedModel, composed: bool) -> None:
    target: Any = model if composed else model.base
    loop = LatentDecoding(LatentMixture(kind="mean"), seed=0)
    with pytest.raises(UnsupportedModeError, match="length for the base: .*use_cache=False"):
        target.generate(IDS[1:], **GREEDY, custom_generate=loop)
    with LatentLogitsProcessor("mean", seed=0).attach(target), pytest.raises(UnsupportedModeError, match="latent"):
        target.generate(IDS[1:], **GREEDY)
    long = torch.cat([IDS[1:], IDS[:1]], 1)
    for prompt, new in ((IDS[1:], 4), (long, 4)):
        asked = GREEDY | {"max_new_tokens": new, "custom_generate": loop}
        assert torch.equal(target.generate(prompt, **asked), target.generate(prompt, **asked, use_cache=False))
    target.generate(IDS[1:], **GREEDY, custom_generate=loop, use_cache=False)


def test_a_prompt_beyond_the_switch_is_read_in_one_chunk(model: proxytune.ProxyTunedModel) -> None:
    long = torch.cat([IDS[1:], IDS[:1]], 1)
    asked = GREEDY | {"max_new_tokens": 3, "prefill_chunk_size": 5}
    want = slow(model, long[0], 3)
    for target in (model, model.base):
        with attached(model) if target is model.base else nullcontext():
            for loop in (None, FusedDecoding(seed=0)):
                assert torch.equal(target.generate(long, **asked, custom_generate=loop)[0], want), (target, loop)
    whole = model.base.generate(long, **GREEDY)
    chunked = model.base.generate(long, **GREEDY, prefill_chunk_size=5, custom_generate=FusedDecoding(seed=0))
    assert torch.equal(chunked, whole)


def test_a_cache_from_beyond_the_switch_is_not_continued_within_it(model: proxytune.ProxyTunedModel) -> None:
    out = model.generate(IDS[1:], **GREEDY, return_dict_in_generate=True)
    cache = cache_of(out)
    cache.crop(9 - cache.get_seq_length())
    text = out.sequences[:, :10]
    with pytest.raises(CacheError, match="of which 9 tokens"), torch.no_grad():
        model(text[:, 9:], past_key_values=copy.deepcopy(cache))
    got = model.generate(text, past_key_values=cache, **GREEDY | {"max_new_tokens": 2})
    # With the new ids alone, nothing could be read again.
    cache = cache_of(model(text[:, :9]))
    with pytest.raises(UnsupportedModeError, match="pass the ids of the whole text"):
        model.generate(text[:, 9:], attention_mask=torch.ones_like(text), past_key_values=cache, **GREEDY)
    assert torch.equal(got[0], slow(model, text[0], 2))


def test_rows_that_stay_when_the_longest_has_left(model: proxytune.ProxyTunedModel) -> None:
    long = torch.cat([IDS[:1], IDS[1:]], 1)
    short = torch.cat([torch.zeros_like(IDS[:1]), IDS[:1]], 1)
    rows, mask = torch.cat([long, short]), torch.tensor([[1] * 16, [0] * 8 + [1] * 8])
    companion = PrefixCachedMember(phi3(1), self_test=False)
    companion.logits_for(rows, mask)
    got = companion.logits_for(torch.cat([short, IDS[:1, :1]], 1), mask[1:])[0, -1]
    with torch.no_grad():
        want = companion.member.model(torch.cat([IDS[:1], IDS[:1, :1]], 1)).logits[0, -1]
    torch.testing.assert_close(got, want)
    for loop in (ForkDecoding(threshold=0.5, branches=2, seed=0), SiblingDecoding(threshold=0.5, siblings=2, seed=0)):
        asked: dict[str, Any] = GREEDY | {"do_sample": True, "custom_generate": loop, "attention_mask": MASK}
        for target in (model, model.base):
            with pytest.raises(UnsupportedModeError, match="prompts of 5 to 8 tokens"):
                target.generate(IDS, **asked)
        model.generate(IDS, **asked | {"max_new_tokens": 2})
        model.generate(IDS, **asked, use_cache=False)
        # Texts of one length cross together.
        out = model.generate(IDS, **asked | {"attention_mask": None}, return_dict_in_generate=True)
        branch = out.trees[1].branches[0]
        text = torch.cat([IDS[1:], torch.tensor([branch.tokens])], 1)
        with torch.no_grad():
            logits = model(text[:, :-1], use_cache=False).logits
        assert branch.logprobs[-1] == pytest.approx(logits[0, -1].log_softmax(-1)[text[0, -1]].item(), abs=1e-4)


def test_a_base_that_does_not_read_its_text_again_is_refused(model: proxytune.ProxyTunedModel) -> None:
    padded = torch.cat([torch.zeros_like(IDS[1:]), IDS[1:]], 1)
    with attached(model), pytest.raises(UnsupportedModeError, match="with an attached processor"):
        model.base.generate(padded, attention_mask=(padded != 0).long(), **GREEDY)
    other = phi3(0)
    rope = model.base.config.rope_parameters
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters=dict(rope),
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=model.base.config.eos_token_id,
        )
    ).eval()
    with pytest.raises(UnsupportedModeError, match="FusedDecoding"):
        llama.generate(IDS[1:], **GREEDY, custom_generate=FusedDecoding(seed=0))
    composed = proxytune.wrap(llama, expert=other, antiexpert=model.expert, check_vocabulary=False)
    assert torch.equal(composed.generate(IDS[1:], **GREEDY)[0], slow(composed, IDS[1]))
