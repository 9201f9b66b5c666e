"""`adapter_names=`: one adapter of a PEFT base for each row, composed and below an attached processor."""

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from support.tiny import build
from transformers import CompileConfig

import proxytune
from proxytune import (
    ForkDecoding,
    FusedDecoding,
    LatentDecoding,
    LatentLogitsProcessor,
    ProxyTunedModel,
    ProxyTuningLogitsProcessor,
    SiblingDecoding,
    SpeculativeDecoding,
)
from proxytune.errors import CacheError, InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.models.members.cache_name import CACHE

# PEFT calls transformers by names that the newest version has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NAMES = ["default", "other", "__base__"]
COMPANIONS = {"expert": build("gpt2", 2), "antiexpert": build("gpt2", 3)}


def lora(task_type: str | None = "CAUSAL_LM") -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=task_type)
    model = peft.get_peft_model(build("llama", 1), config)
    model.add_adapter("other", config)
    return model.eval()


def composed(base: Any) -> ProxyTunedModel:
    return proxytune.wrap(base, **COMPANIONS, alpha=0.7, check_vocabulary=False)


@pytest.fixture(scope="module")
def base() -> Any:
    return lora()


@pytest.fixture(scope="module")
def model(base: Any) -> ProxyTunedModel:
    return composed(base)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 240, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


RUN: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}


def each_alone(base: Any, inputs: dict[str, torch.Tensor], call: Any) -> torch.Tensor:
    """`call` with each row alone, its adapter active."""
    found = []
    for i, name in enumerate(NAMES):
        with base.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                base.set_adapter(name)
            found.append(call(**{k: x[i : i + 1] for k, x in inputs.items()}))
    base.set_adapter("default")
    return torch.cat(found)


@pytest.fixture(scope="module")
def want(base: Any, model: ProxyTunedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = each_alone(base, inputs, lambda **one: model.generate(**one, use_cache=False, **RUN))
    assert not (found == model.generate(**inputs, **RUN)).all(1)[1:].any()  # the names matter
    return found


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 4},
    "fused": {"custom_generate": FusedDecoding()},
    "speculation": {"custom_generate": SpeculativeDecoding(draft_tokens=2)},
    "lookup": {"custom_generate": SpeculativeDecoding(draft=PromptLookupDraft())},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_row_is_what_it_is_alone(
    mode: str, model: ProxyTunedModel, inputs: dict[str, torch.Tensor], want: torch.Tensor
) -> None:
    assert torch.equal(model.generate(**inputs, adapter_names=NAMES, **RUN, **MODES[mode]), want)


def test_beams_returned_sequences_and_drafts_follow_their_rows(
    base: Any, model: ProxyTunedModel, inputs: dict[str, torch.Tensor]
) -> None:
    beams = RUN | {"num_beams": 3, "num_return_sequences": 2}
    alone = each_alone(base, inputs, lambda **one: model.generate(**one, **beams, use_cache=False))
    assert torch.equal(model.generate(**inputs, adapter_names=NAMES, **beams), alone)
    draws = RUN | {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    streams = FusedDecoding(seed=4)
    rows = model.generate(**inputs, adapter_names=NAMES, custom_generate=streams, **draws)
    twice = {k: x.repeat_interleave(2, 0) for k, x in inputs.items()}
    twice_named = {"adapter_names": [name for name in NAMES for _ in range(2)]}
    once = draws | {"num_return_sequences": 1}
    assert torch.equal(model.generate(**twice, **twice_named, custom_generate=streams, **once), rows)
    coupled = SpeculativeDecoding(seed=4, accept="coupled", draft_tokens=2)
    assert torch.equal(model.generate(**twice, **twice_named, custom_generate=coupled, **once), rows)
    one = {"input_ids": inputs["input_ids"][:1]}
    base.set_adapter("other")
    alone = model.generate(**one, **RUN)
    base.set_adapter("default")
    for draft in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model.expert}):
        assert torch.equal(model.generate(**one, adapter_names=["other"], **draft, **RUN), alone)


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together.*")
def test_a_draft_of_transformers_does_not_get_the_names(model: ProxyTunedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    want = model.generate(ids, adapter_names=["other"], **RUN)
    got = model.generate(ids, adapter_names=["other"], assistant_model=build("llama", 9), **RUN)
    assert torch.equal(got, want)


def test_scoring_whole_and_in_parts(base: Any, model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 240, (3, 7))
    alone = each_alone(base, {"input_ids": ids}, lambda **one: model(**one).logits)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, adapter_names=NAMES).logits, alone)
        monkeypatch.setattr("proxytune.models.chunked_forward.PART", 9)
        torch.testing.assert_close(model(ids, adapter_names=tuple(NAMES)).logits, alone, atol=1e-4, rtol=1e-4)


def test_below_an_attached_processor(base: Any, inputs: dict[str, torch.Tensor], want: torch.Tensor) -> None:
    with ProxyTuningLogitsProcessor(**COMPANIONS, alpha=0.7, check_vocabulary=False).attach(base):
        assert torch.equal(base.generate(**inputs, adapter_names=NAMES, **RUN), want)


def test_a_cache_of_other_adapters_is_refused(model: ProxyTunedModel) -> None:
    ids = torch.randint(3, 240, (3, 5))
    for names in (NAMES, None):
        filled = model(ids, adapter_names=names)[CACHE]
        with pytest.raises(CacheError, match="filled before the adapter_names changed"):
            model(ids, adapter_names=NAMES[::-1], **{CACHE: filled})
    model(ids, adapter_names=NAMES[::-1], **{CACHE: model(ids, adapter_names=NAMES[::-1])[CACHE]})


@pytest.mark.parametrize("loop", [SiblingDecoding, ForkDecoding, LatentDecoding])
def test_loops_with_other_rows_are_refused_and_leave_nothing_behind(
    loop: Any, base: Any, model: ProxyTunedModel, inputs: dict[str, torch.Tensor]
) -> None:
    plain = base.generate(**inputs, **RUN)
    made = loop("mean") if loop is LatentDecoding else loop(threshold=1.0, seed=0)
    named = {"adapter_names": NAMES, **RUN, "do_sample": True}
    for steered in (base, model):
        with pytest.raises(UnsupportedModeError, match=f"adapter_names: expected none with {loop.__name__}"):
            steered.generate(**inputs, custom_generate=made, **named)
        if loop is LatentDecoding:
            refused = pytest.raises(UnsupportedModeError, match="expected none with LatentLogitsProcessor")
            with LatentLogitsProcessor("mean").attach(steered), refused:
                steered.generate(**inputs, **named)
    assert torch.equal(base.generate(**inputs, **RUN), plain)


def test_what_does_not_fit_is_refused_by_name(base: Any, model: ProxyTunedModel) -> None:
    ids = torch.randint(3, 240, (2, 5))
    known = "expected one name per row, 2 in all, of default, other, __base__; got"
    for names, got in (
        (["default"], r"\['default'\], 1 in all"),
        (["nope", "other"], r"'nope' in \['nope', 'other'\]"),
        ("other", "'other'"),
    ):
        for call in (model, lambda ids, **named: model.generate(ids, **named, **RUN)):
            with pytest.raises(InputError, match=f"adapter_names: {known} {got}"):
                call(ids, adapter_names=names)
    two = {"adapter_names": ["default", "other"]}
    with pytest.raises(UnsupportedModeError, match="adapter_names: expected no guidance_scale"):
        model.generate(ids, guidance_scale=1.5, **two, **RUN)
    with pytest.raises(InputError, match="expected a base that is a PEFT model.*for a LlamaForCausalLM"):
        composed(build("llama", 1)).generate(ids, **two, **RUN)
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(UnsupportedModeError, match="that PEFT can mix in a batch, such as LoRA; got a IA3Model"):
        composed(peft.get_peft_model(build("llama", 1), ia3))(ids, adapter_names=["default", "default"])
    with pytest.raises(UnsupportedModeError, match="got one model as the base and the antiexpert"):
        proxytune.wrap(base, expert=COMPANIONS["expert"], antiexpert=base, check_vocabulary=False)(ids, **two)
    model.compile_members(CompileConfig(backend="eager"), roles=["base"])
    with pytest.raises(UnsupportedModeError, match="compile_members for the base"):
        model(ids, **two)
    model.compile_members(roles=())


def test_an_adapter_that_waits_for_its_invocation() -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, alora_invocation_tokens=[17, 18]
    )
    base = peft.get_peft_model(build("llama", 1), config).eval()
    ids = torch.tensor([[5, 17, 18, 6, 7], [8, 9, 17, 18, 4]])
    with pytest.raises(UnsupportedModelError, match="the base: .* got a PEFT model with aLoRA"):
        composed(base)
    with pytest.raises(UnsupportedModelError, match="the expert: .* got a PEFT model with aLoRA"):
        ProxyTuningLogitsProcessor(base, build("llama", 1), check_vocabulary=False)
    want = ids  # by hand, since PEFT's own generate() goes wrong with use_cache=False
    for _ in range(5):
        one, two, three = (m(input_ids=want).logits[:, -1] for m in (base, *COMPANIONS.values()))
        want = torch.cat([want, (one + 0.7 * (two - three)).argmax(-1, keepdim=True)], 1)
    run = {"attention_mask": torch.ones_like(ids)} | RUN
    with ProxyTuningLogitsProcessor(**COMPANIONS, alpha=0.7, check_vocabulary=False).attach(base):
        for loop in (None, FusedDecoding(), SpeculativeDecoding(draft=PromptLookupDraft())):
            assert torch.equal(base.generate(input_ids=ids, custom_generate=loop, **run), want)
        with pytest.raises(UnsupportedModeError, match="expected none with SiblingDecoding.*an offset of aLoRA"):
            base.generate(input_ids=ids, custom_generate=SiblingDecoding(threshold=1.0), **run | {"do_sample": True})


def test_hooks_that_peft_left_after_an_error_are_noticed() -> None:
    base, ids = lora(None), torch.randint(3, 240, (2, 5))
    model = composed(base)
    want = model(ids).logits
    named = {"adapter_names": ["other", "default"]}
    model.base.register_forward_hook(lambda *_: 1 / 0, always_call=False)  # an error in the middle of a pass
    with pytest.raises(ZeroDivisionError):
        model(ids, **named)
    base._forward_hooks.clear()
    assert torch.equal(model(ids).logits, want)
    base._enable_peft_forward_hooks(**named).__enter__()  # as a generate() of PEFT that ended in an error
    with pytest.raises(
        UnsupportedModeError, match="the base: expected a PEFT model that runs all rows with its active"
    ):
        model(ids)
