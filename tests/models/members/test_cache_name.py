"""The cache under both of its names, and the checks that would be skipped if it were looked for under the wrong one."""

import functools
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import PAD, shared
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache, XLMConfig, XLMWithLMHeadModel

import proxytune
from proxytune import ForkDecoding, FusedDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import CacheError, InputError, SteeringWarning, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.speculation import ModelDraft
from proxytune.models.members.cache_name import CACHE, argument_of, cache_of, renamed, tokens_in
from proxytune.models.members.member import Member

pytestmark = pytest.mark.smoke
NAMES = ("past_key_values", "cache")
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 200, (1, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def composed() -> Any:
    small = {"expert": shared("llama", 2), "antiexpert": shared("llama", 3)}
    return proxytune.wrap(shared("llama", 1), **small, alpha=0.7, check_vocabulary=False)


def processor() -> ProxyTuningLogitsProcessor:
    return ProxyTuningLogitsProcessor(shared("llama", 2), shared("llama", 3), alpha=0.7, check_vocabulary=False)


class OldForward(LlamaForCausalLM):
    """A forward as code outside transformers has it, which no release renames."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: past_key_values}, **kwargs)


class NewForward(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: cache}, **kwargs)


def test_the_installed_name_is_that_of_the_installed_models() -> None:
    assert [argument_of(shared(kind, 1)) for kind in ("llama", "gpt2", "gemma3")] == [CACHE] * 3
    assert CACHE in NAMES


@pytest.mark.parametrize(("kind", "name"), [(OldForward, "past_key_values"), (NewForward, "cache")])
def test_a_member_with_a_forward_of_its_own_is_asked_for_its_own_name(kind: Any, name: str) -> None:
    model = kind(shared("llama", 1).config).eval()
    model.load_state_dict(shared("llama", 1).state_dict())
    assert argument_of(model) == name
    others = {"base": shared("llama", 3), "expert": shared("llama", 2)}
    got, want = (
        proxytune.wrap(**others, antiexpert=one, alpha=0.7, check_vocabulary=False)
        for one in (model, shared("llama", 1))
    )
    assert torch.equal(got.generate(tokens(6), **GREEDY), want.generate(tokens(6), **GREEDY))
    assert got.token_forwards["antiexpert"] == 6 + 3  # no token twice: the cache was used


def test_the_cache_of_xlm_is_another_thing() -> None:
    model = XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=16, n_layers=1, n_heads=2)).eval()
    assert argument_of(model) is None
    with pytest.warns(SteeringWarning, match="the base: XLMWithLMHeadModel takes `cache`, which is no cache of transf"):
        member = Member(model, "base")
    with pytest.raises(UnsupportedModelError, match="the same four tokens before two endings"):
        member.examine()  # it was not made a causal one


# --- callers may use both names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_generate_take_the_cache_by_either_name(name: str) -> None:
    model, ids = composed(), tokens(6)
    want = model.generate(ids, **GREEDY)
    caches = DynamicCache(), DynamicCache()
    assert torch.equal(model.generate(ids, **{name: caches[0]}, **GREEDY), want)
    model(ids[:, :4], **{name: caches[1]})
    out = model(ids[:, 4:], **{name: caches[1]})
    assert torch.equal(out.logits[:, -1].argmax(-1), want[:, 6])
    assert [tokens_in(cache) for cache in caches] == [6 + 3, 6]
    # The output has it where the installed release has it.
    assert getattr(out, CACHE) is out[CACHE] is cache_of(out) is caches[1]


@pytest.mark.parametrize("loop", [FusedDecoding(seed=0), SpeculativeDecoding(seed=0)])
@pytest.mark.parametrize("name", NAMES)
def test_loops_return_it_by_the_installed_name(name: str, loop: Any) -> None:
    cache = DynamicCache()
    run = {"custom_generate": loop, "return_dict_in_generate": True, name: cache}
    out = composed().generate(tokens(6), **run, **GREEDY)
    assert out[CACHE] is cache
    assert tokens_in(cache) == 6 + 3


def test_two_caches_are_one_too_many() -> None:
    model, ids = composed(), tokens(6)
    both = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    message = "cache: expected one cache, as past_key_values or as cache; got two: a DynamicCache and a DynamicCache"
    for call in (lambda: model(ids, **both), lambda: model.generate(ids, **both, **GREEDY)):
        with pytest.raises(InputError, match=message):
            call()
    same = DynamicCache()
    assert renamed({"cache": same, "past_key_values": same, "x": 1}) == {CACHE: same, "x": 1}
    assert renamed({"x": 1}) == {"x": 1}


# --- what would stop checking, without failing, if the cache were looked for under the wrong name ---------------------


def test_the_cache_is_adopted_before_the_first_pass() -> None:
    model, ids = composed(), tokens(6)
    kwargs: dict[str, Any] = {"use_cache": True}
    config = GenerationConfig(max_length=10, use_cache=True)
    config.is_assistant = False
    model._prepare_cache_for_generation(config, kwargs, None, 1, 9)
    assert len(kwargs[CACHE].layers) == 3 * 2
    assert kwargs[CACHE]._proxytune_owner == model.cache_owner
    foreign = shared("llama", 1).generate(ids, return_dict_in_generate=True, **GREEDY)[CACHE]
    before = model.token_forwards
    for refused in (foreign, StaticCache(config=model.config, max_cache_len=4)):
        with pytest.raises(CacheError, match=f"{CACHE}: expected"):
            model.generate(ids, **{CACHE: refused}, **GREEDY)
    assert model.token_forwards == before


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_new_ids_beside_a_cache_are_refused_without_a_mask(kind: str) -> None:
    model = shared(kind, 1)
    name = "cache_params" if kind == "mamba" and CACHE == "past_key_values" else CACHE
    with processor().attach(model):
        first = model.generate(tokens(6), return_dict_in_generate=True, **GREEDY)
        # The mask could tell as well, so there is none.
        match = "input_ids: expected the whole prefix.*only the 3 new ids"
        if kind == "mamba":  # on whole texts generate() is wrong by itself
            match = "a filled cache for the base: .*whose cache has no length, so that the whole text is read again"
        with pytest.raises(UnsupportedModeError if kind == "mamba" else InputError, match=match):
            model.generate(tokens(3), **{name: cache_of(first)}, **GREEDY)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_trees_ask_whether_there_is_a_cache(kind: str) -> None:
    model, ids = shared(kind, 1), tokens(4).expand(2, -1)
    loop = ForkDecoding(threshold=0.5, branches=2, seed=0)
    run = GREEDY | {"max_new_tokens": 3, "do_sample": True, "top_k": 0}
    seen = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["input_ids"].shape[1], cache_of(kwargs)))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    model.generate(ids, custom_generate=loop, **run)
    handle.remove()
    assert [length for length, _ in seen] == [4, 1, 1]
    assert len({id(cache) for _, cache in seen}) == 1
    assert seen[0][1] is not None
    if kind == "llama":
        with pytest.raises(UnsupportedModeError, match="a static cache: expected none with ForkDecoding"):
            model.generate(ids, custom_generate=loop, cache_implementation="static", **run)


# --- recurrent bases ------------------------------------------------------------------------------------------------


def test_a_recurrent_base_under_a_processor() -> None:
    base = shared("mamba", 1)
    with processor().attach(base):
        got = base.generate(tokens(6), **GREEDY)
    ids = tokens(6)[0]
    for _ in range(4):
        row = next_logits([base, shared("llama", 2), shared("llama", 3)], 0.7, ids)
        ids = torch.cat([ids, row.argmax()[None]])
    assert torch.equal(got[0], ids)


def test_the_length_of_a_recurrent_cache_is_unknown_once_it_is_filled() -> None:
    base = shared("mamba", 1)
    cache = DynamicCache(config=base.config)
    assert tokens_in(cache) == 0
    filled = base.generate(tokens(6), return_dict_in_generate=True, **GREEDY)
    assert tokens_in(cache_of(filled)) is None
    assert tokens_in(DynamicCache()) == 0


def test_a_draft_with_a_forward_of_its_own() -> None:
    draft = OldForward(shared("llama", 2).config).eval()
    loop = SpeculativeDecoding(draft=ModelDraft(draft), draft_tokens=2)
    want = shared("llama", 1).generate(tokens(6), **GREEDY)
    assert torch.equal(shared("llama", 1).generate(tokens(6), custom_generate=loop, **GREEDY), want)
