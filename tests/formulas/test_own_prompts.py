"""Where a formula meets the rest of `generate()`: kept caches, masks and processors, schedules on static caches."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import PAD, shared
from transformers import DynamicCache

import proxytune
from proxytune import FusedDecoding, SpeculativeDecoding
from proxytune.errors import InputError, NumericalError, RecipeError, UnsupportedModeError
from proxytune.formulas import ContextAware, ContrastiveDecoding, Gate, ProxyTuning, Schedule, View
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.recipe import Recipe

IDS = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))
LONGER = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
RUN: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
FULL = RUN | {"return_dict_in_generate": True, "output_logits": True}


def composed(formula: Any, **members: Any) -> Any:
    usual = {role: members.pop(role) for role in ("expert", "antiexpert") if role in members}
    return proxytune.wrap(shared("llama", 1), **usual, formula=formula, members=members, check_vocabulary=False)


def scheduled() -> Any:
    formula = ProxyTuning(alpha=Schedule.linear(2.0, 0.0, 4))
    return composed(formula, expert=shared("llama", 2), antiexpert=shared("llama", 3))


@pytest.mark.parametrize("loop", [None, FusedDecoding()])
def test_a_schedule_on_a_static_cache(loop: Any) -> None:
    model = scheduled()
    wanted = model.generate(IDS, **FULL).logits
    got = model.generate(IDS, cache_implementation="static", custom_generate=loop, **FULL).logits
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_schedule_in_a_loop_of_ones_own_goes_on_with_the_cache() -> None:
    model = scheduled()
    wanted = model.generate(IDS, **FULL)
    out = model(IDS)
    for step in range(3):
        torch.testing.assert_close(out.logits[:, -1], wanted.logits[step], atol=1e-4, rtol=1e-4)
        out = model(wanted.sequences[:, 8 + step : 9 + step], past_key_values=out.past_key_values)


def test_a_prompt_goes_on_from_a_cache_whose_base_was_padded() -> None:
    model = composed(ContextAware(alpha=0.7))
    longer = {"no_context": LONGER}
    whole = model.generate(IDS, prompts=longer, **RUN)
    cache = DynamicCache(config=model.config)
    part = model.generate(IDS, prompts=longer, past_key_values=cache, **RUN | {"max_new_tokens": 3})
    assert model.generate(part, past_key_values=cache, **RUN | {"max_new_tokens": 2}).equal(whole)


def test_positional_arguments_of_generate_are_kept() -> None:
    model = composed(ContextAware(alpha=0.7))
    out = model.generate(IDS, None, None, None, lambda row, ids: [5, 6], prompts={"no_context": LONGER}, **RUN)
    assert set(out[:, 8:].flatten().tolist()) <= {5, 6}


def test_a_mask_beside_processors_that_leave_no_token() -> None:
    model = composed(ContrastiveDecoding(share=1.0), amateur=shared("llama", 2))
    first = int(model.generate(IDS[:1], **RUN)[0, 8])
    with pytest.raises(NumericalError, match="row 0 of 1: expected a token that the formula's plausibility mask and"):
        model.generate(IDS[:1], **RUN | {"eos_token_id": first, "min_new_tokens": 2})
    for settings in ({"do_sample": True}, {"num_return_sequences": 2}):
        with pytest.raises(UnsupportedModeError, match="beams under a plausibility mask: expected beam search that"):
            model.generate(IDS[:1], num_beams=3, **RUN | settings)


def test_an_expert_that_is_the_base_does_not_draft() -> None:
    model = composed(ProxyTuning(), expert=shared("llama", 1), antiexpert=shared("llama", 2))
    with pytest.raises(InputError, match="draft: expected a draft of another kind.*members base, anti"):
        model.generate(IDS, custom_generate=SpeculativeDecoding(), **RUN)


def test_the_prompt_is_asked_for_by_the_role_that_says_so() -> None:
    views = {"x": View(prompt=True), "y": View("x")}
    model = composed("base + 0.5*(y - x) + 0.1*e", e=shared("llama", 2), **views)
    assert [member.role for member in model.members] == ["base", "x", "e"]
    assert model.generate(IDS, prompts={"x": LONGER}, **RUN).shape == (2, 13)


def test_prompts_whose_masks_or_names_are_wrong_are_refused() -> None:
    model = composed(ContextAware())
    with pytest.raises(InputError, match="attention_mask of prompts.'no_context'.: expected 1 for tokens and 0 .* 2"):
        model.generate(IDS, prompts={"no_context": {"input_ids": IDS, "attention_mask": torch.ones(2, 8) * 2}}, **RUN)
    with pytest.raises(InputError, match="the role 'config': expected a name that is no attribute of a model"):
        composed("base + config", config=shared("llama", 2))


def test_a_member_of_weight_0_needs_no_prompt() -> None:
    model = composed(ContextAware(alpha=0.0))
    assert model.generate(IDS, **RUN).equal(shared("llama", 1).generate(IDS, **RUN))
    assert model.passes["no_context"] == 0


def test_a_recipe_without_alpha_takes_the_formula_s_own() -> None:
    assert Recipe.from_json({"format_version": 2, "base": "b", "formula": "classifier-free-guidance"}).alpha == 1.5
    with pytest.raises(RecipeError, match="expected members of the formula 'context-aware': no_context; got expert"):
        Recipe.from_json({"format_version": 2, "base": "b", "expert": "e", "formula": "context-aware"})


@pytest.mark.parametrize("loop", [FusedDecoding, SpeculativeDecoding])
def test_a_loop_s_own_streamer_gets_the_prompt_without_padding(loop: Any) -> None:
    if loop is SpeculativeDecoding:
        loop = functools.partial(loop, draft=PromptLookupDraft())
    heard: list[list[int]] = []
    streamer = SimpleNamespace(put=lambda ids: heard.append(ids.flatten().tolist()), end=lambda: None)
    model = composed(ContextAware(alpha=0.7))
    out = model.generate(IDS[:1], prompts={"no_context": LONGER[:1]}, custom_generate=loop(streamer=streamer), **RUN)
    assert [token for ids in heard for token in ids] == out[0].tolist()


def test_companions_pass_only_where_a_gate_is_open() -> None:
    gated = ProxyTuning(alpha=0.7, gate=Gate(entropy=1e9))
    model = composed(gated, expert=shared("llama", 2), antiexpert=shared("llama", 3))
    model.generate(IDS, **RUN)
    assert model.passes == {"base": 5, "expert": 0, "antiexpert": 0}
