"""Decode steps that were prepared once: who changes something behind their back is noticed, and nobody sees a trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny import build
from transformers import DynamicCache, StoppingCriteria

import proxytune
from proxytune.errors import CacheError
from proxytune.models.members.adapter_state import switches_of
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.members.traceless import is_traceless

PROMPT = torch.arange(3, 9)[None]
RUN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
SHOWN = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture
def model() -> Any:
    return proxytune.wrap(build("mistral", 1), build("llama", 2), build("llama", 3), check_vocabulary=False)


class At(StoppingCriteria):
    """Does something after so many tokens, and never stops."""

    def __init__(self, count: int, action: Any) -> None:
        self.left, self.action = count, action

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            self.action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture(params=["composite", "fused"])
def loop(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    return {} if request.param == "composite" else {"custom_generate": proxytune.FusedDecoding()}


def test_steps_give_the_tokens_of_passes_that_look_at_everything(model: Any, loop: dict[str, Any]) -> None:
    fast = model.generate(PROMPT, **RUN, **SHOWN, **loop)
    step = model._steps.on(fast[CACHE])
    assert step is not None
    assert step.length == PROMPT.shape[1] + 5
    ids, cache = PROMPT, DynamicCache(config=model.config)
    with torch.no_grad():
        for i in range(6):
            logits = model(ids[:, -1:] if i else ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
            assert torch.equal(logits, fast.logits[i])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, fast.sequences)
    assert model._steps.on(cache) is None
    assert model.token_forwards == dict.fromkeys(model.passes, 2 * (PROMPT.shape[1] + 5))


def test_what_comes_out_can_be_trained_on(model: Any, loop: dict[str, Any]) -> None:
    out = model.generate(PROMPT, **RUN, **SHOWN, **loop)
    for x in (out.sequences, *out.scores, *out.logits):
        assert not x.is_inference()
        x.add_(0)
    # The cache too: new keys are joined to it, so gradients reach the new tokens.
    for member in model.members:
        member.model.requires_grad_(True)
    loss = model(out.sequences[:, -1:], **{CACHE: out[CACHE]}).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None for p in model.expert.lm_head.parameters())


def test_a_hook_gets_tensors_that_it_can_keep(model: Any) -> None:
    seen = []
    assert all(is_traceless(member.model) for member in model.members)
    with torch.no_grad():
        want = model.generate(PROMPT, **RUN)
    handle = model.expert.model.layers[0].register_forward_hook(lambda *args: seen.append(args[-1]))
    try:
        assert not is_traceless(model.expert)
        assert torch.equal(model.generate(PROMPT, **RUN), want)
    finally:
        handle.remove()
    assert len(seen) == 6
    assert not any(x.is_inference() for x in seen)
    probe = torch.nn.Linear(seen[-1].shape[-1], 1)
    probe(seen[-1]).sum().backward()


def test_an_interrupted_step_is_seen_by_the_next_one(model: Any, loop: dict[str, Any]) -> None:
    cache, passes = DynamicCache(config=model.config), []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    handle = model.expert.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, **{CACHE: cache}, **RUN, **loop)
    handle.remove()
    with pytest.raises(CacheError, match="seen the same tokens"), torch.no_grad():
        model(PROMPT[:, :1], **{CACHE: cache}, is_first_iteration=False)


def test_a_weight_that_appears_on_the_way_is_refused(model: Any, loop: dict[str, Any]) -> None:
    model.alpha = 0.0
    with pytest.raises(CacheError, match="had the weight 0"):
        model.generate(PROMPT, stopping_criteria=[At(3, lambda: setattr(model, "alpha", 1.0))], **RUN, **loop)


def test_a_strength_that_changes_on_the_way_counts_from_there(model: Any, loop: dict[str, Any]) -> None:
    before = model.generate(PROMPT, **RUN, **SHOWN, **loop)
    after = model.generate(
        PROMPT, stopping_criteria=[At(3, lambda: setattr(model, "alpha", 5.0))], **RUN, **SHOWN, **loop
    )
    same = [torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True)]
    assert same[:4] == [True, True, True, False]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_cache_go_their_own_way(model: Any, copied: Any) -> None:
    out = model.generate(PROMPT, **RUN, **SHOWN)
    cache, last = out[CACHE], out.sequences[:, -1:]
    if copied is not copy.copy:
        twin = copied(cache)
        assert model._steps.on(twin) is None
        length = cache.get_seq_length()
        with torch.no_grad():
            if copied is copy.deepcopy:  # a pickled cache cannot tell by which models it was filled
                model(last, **{CACHE: twin}, is_first_iteration=False)
                assert twin.get_seq_length() == length + 1
        assert cache.get_seq_length() == length
    with torch.no_grad():
        a = model(last, **{CACHE: copied(cache) if copied is copy.copy else cache}, is_first_iteration=False).logits
    whole = model(out.sequences).logits[:, -1:]
    torch.testing.assert_close(a, whole)


def test_a_cache_that_was_cropped_between_steps_is_looked_at_again(model: Any) -> None:
    model = proxytune.wrap(build("llama", 1), build("llama", 2), build("llama", 3), check_vocabulary=False)
    out = model.generate(PROMPT, **RUN, **SHOWN)
    cache = cache_of(out)
    cache.crop(-2)
    with torch.no_grad():
        logits = model(out.sequences[:, -3:-2], **{CACHE: cache}, is_first_iteration=False).logits[:, -1]
    torch.testing.assert_close(logits, out.logits[-2])


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_members_with_states_are_looked_at_in_each_step(kind: str) -> None:
    model = proxytune.wrap(build("llama", 1), build(kind, 2), build("llama", 3), check_vocabulary=False)
    assert model._steps.on(model.generate(PROMPT, **RUN, **SHOWN)[CACHE]) is None


def test_a_cache_belongs_to_the_members_that_filled_it(model: Any) -> None:
    out = model.generate(PROMPT, **RUN, **SHOWN)
    given = {CACHE: out[CACHE], "position_ids": torch.tensor([[PROMPT.shape[1] + 5]])}
    inputs = model.prepare_inputs_for_generation(out.sequences, next_sequence_length=1, **given)
    other = proxytune.wrap(build("mistral", 4), build("llama", 5), build("llama", 6), check_vocabulary=False)
    with torch.no_grad(), pytest.raises(CacheError, match="another model"):
        other(**inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.expert.lm_head.weight.neg_()
        torch.testing.assert_close(twin(**inputs).logits, twin(out.sequences).logits[:, -1:])


def test_a_cache_keeps_no_model_alive(loop: dict[str, Any]) -> None:
    model = proxytune.wrap(build("llama", 1), build("llama", 2), build("llama", 3), check_vocabulary=False)
    out = model.generate(PROMPT, **RUN, **SHOWN, **loop)
    members = [weakref.ref(member.model) for member in model.members]
    del model
    gc.collect()
    assert len(out[CACHE].layers) == 6
    assert [member() for member in members] == [None] * 3


def test_a_hook_that_comes_on_the_way_gets_tensors_that_it_can_keep(model: Any, loop: dict[str, Any]) -> None:
    seen = []
    want = model.generate(PROMPT, **RUN, **loop)
    add = partial(model.expert.model.norm.register_forward_hook, lambda *args: seen.append(args[-1]))
    assert torch.equal(model.generate(PROMPT, **RUN, **loop, stopping_criteria=[At(3, add)]), want)
    assert len(seen) == 3
    assert not any(x.is_inference() for x in seen)


def test_who_switches_a_members_adapters_from_now_on_is_waited_for(model: Any) -> None:
    cache = model.generate(PROMPT, **RUN, **SHOWN)[CACHE]
    step, last = model._steps.on(cache), PROMPT[:, :1]
    assert step.follows(cache, last, None)
    switches_of(model.expert)
    assert not step.follows(cache, last, None)
