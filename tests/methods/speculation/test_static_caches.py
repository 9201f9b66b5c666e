"""Speculation over static caches: the tokens of dynamic ones, with nothing copied or moved, and one graph per draft."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.graphs import Graphs
from support.speculation import composed, draft, prompts
from support.tiny import PAD, build, shared
from transformers import StaticCache, StoppingCriteria

import proxytune
from proxytune import SpeculativeDecoding
from proxytune.errors import CacheError
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.ragged_static import RaggedLayer

NEW = 14
STATIC = {"cache_implementation": "static"}


def run(model: Any, ids: torch.Tensor, mask: Any, loop: Any, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": NEW, "pad_token_id": PAD, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(ids, attention_mask=mask, custom_generate=loop, **settings)


# gemma3 has windows shorter than the texts, gpt2 a table of positions.
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "expert"), ("llama", "lookup"), ("gemma3", "expert"), ("gemma3", "good"), ("gpt2", "expert")],
)
def test_the_tokens_are_those_over_dynamic_caches(family: str, name: str) -> None:
    model, (ids, mask) = composed(family), prompts()
    for how in ({}, {"do_sample": True}):
        loop = SpeculativeDecoding(draft=draft(name, family), draft_tokens=3, seed=5)
        want = run(model, ids, mask, loop, **how)
        assert torch.equal(run(model, ids, mask, loop, **how, **STATIC), want)
        # Rows that end early, beside rows that go on.
        more = how | {"eos_token_id": want[0, -NEW + 3 : -NEW + 5].tolist()}
        assert torch.equal(run(model, ids, mask, loop, **more, **STATIC), run(model, ids, mask, loop, **more))
    assert torch.equal(run(model, ids[:1], None, loop, **STATIC), run(model, ids[:1], None, loop))


def test_a_plain_model_and_prompts_in_chunks() -> None:
    model, (ids, mask) = composed("gemma3").base, prompts()
    loop = SpeculativeDecoding(draft=PromptLookupDraft(2, 1))
    want = run(model, ids, mask, loop)
    assert torch.equal(run(model, ids, mask, loop, **STATIC), want)
    assert torch.equal(run(model, ids, mask, loop, prefill_chunk_size=5, **STATIC), want)


def test_nothing_is_copied_and_the_cache_of_one_text_goes_on() -> None:
    model, (ids, mask) = composed("llama"), prompts(1)
    cache = StaticCache(config=model.config, max_cache_len=60)
    loop = SpeculativeDecoding(draft_tokens=3)
    first = run(model, ids, mask, loop, **{CACHE: cache}, return_dict_in_generate=True)
    assert first.past_key_values is cache
    assert int(cache.get_seq_length()) == first.sequences.shape[1] - 1
    places = [layer.keys.data_ptr() for layer in cache.layers]
    longer = torch.cat([first.sequences, ids[:, -4:]], 1)
    mask = torch.ones_like(longer)
    mask[:, : ids.shape[1]] = prompts(1)[1]
    want = run(model, longer, mask, None)
    assert torch.equal(run(model, longer, mask, None, **{CACHE: copy.deepcopy(cache)}), want)
    assert torch.equal(run(model, longer, mask, loop, **{CACHE: cache}), want)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert not any(isinstance(layer, RaggedLayer) for layer in cache.layers)


def test_an_interrupted_call_empties_the_cache() -> None:
    class Interrupts(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] > 18:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model, (ids, mask) = composed("llama"), prompts()
    loop, cache = SpeculativeDecoding(draft_tokens=3), StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, mask, loop, **{CACHE: cache}, stopping_criteria=[Interrupts()])
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {0}
    assert torch.equal(run(model, ids, mask, loop, **{CACHE: cache}), run(model, ids, mask, loop))


def test_what_cannot_hold_rows_of_different_lengths_is_refused() -> None:
    loop, (ids, mask) = SpeculativeDecoding(draft=PromptLookupDraft()), prompts()
    model = composed("mistral").base
    cache = StaticCache(config=model.config, max_cache_len=60)
    out = run(model, ids[:1], mask[:1], None, **{CACHE: cache}, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, ids[:1, -4:]], 1)
    with pytest.raises(
        CacheError, match="got a StaticCache, and .* as the base: layers of StaticSlidingWindowLayer. L"
    ):
        run(model, longer, torch.ones_like(longer), loop, **{CACHE: cache})
    model = build("llama", 1)
    with pytest.raises(CacheError, match="expected a StaticCache for at least 25 tokens; got a StaticCache for 20"):
        run(model, ids, mask, loop, **{CACHE: StaticCache(config=model.config, max_cache_len=20)})
    model.set_attn_implementation("flex_attention")
    with pytest.raises(CacheError, match="as the base: attn_implementation='flex_attention'"):
        run(model, ids, mask, loop, **STATIC)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_drafts_and_their_verification_are_graphs(graphs: Graphs) -> None:
    model = proxytune.wrap(
        **{role: shared("llama", seed, layers=1) for seed, role in enumerate(("base", "expert", "antiexpert"))},
        check_vocabulary=False,
    )
    ids, mask = prompts(2)
    loop = SpeculativeDecoding(draft_tokens=2, seed=5)
    want = run(model, ids, mask, loop, do_sample=True)
    model.compile_members(graphs.config)
    out = run(model, ids, mask, loop, do_sample=True, return_dict_in_generate=True, **STATIC)
    assert torch.equal(out.sequences, want)
    assert model._joint.hindrance is None
    # The expert's draft of one token; the others over three tokens, then over any number, and over one where no draft
    # fits any more.
    assert graphs.compiled <= 4
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model, ids, mask, loop, do_sample=True, **STATIC), want)
