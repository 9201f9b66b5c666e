"""PEFT models as members, and as the base that a processor is attached to."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from support.tiny import build
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

import proxytune
from proxytune import (
    ForkDecoding,
    FusedDecoding,
    LatentLogitsProcessor,
    ProxyTuningLogitsProcessor,
    SiblingDecoding,
    SpeculativeDecoding,
)
from proxytune.errors import MemberError, RecipeError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.models.members.cache_name import CACHE

# PEFT calls transformers by names that the newest version has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ALPHA = 0.7
RUN = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def lora(seed: int = 2) -> Any:
    """A small Llama with a LoRA that does something, and a second one."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama", seed), config)
    model.add_adapter("other", config)
    return model.eval()


def merged(model: Any, adapter: str) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    twin.set_adapter(adapter)
    return twin.merge_and_unload()


def reference(expert: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    members = {"base": build("qwen3", 1), "expert": expert, "antiexpert": build("llama", 2)}
    return proxytune.wrap(**members, alpha=ALPHA, check_vocabulary=False).generate(ids, **RUN)


def test_a_lora_expert_equals_the_merged_one_and_may_switch_adapters() -> None:
    expert, ids = lora(), torch.randint(3, 240, (1, 9))
    want = {name: reference(merged(expert, name), ids) for name in ("default", "other")}
    assert not torch.equal(want["default"], want["other"])
    base = build("qwen3", 1)
    model = proxytune.wrap(base, expert=expert, antiexpert=build("llama", 2), alpha=ALPHA, check_vocabulary=False)
    processor = ProxyTuningLogitsProcessor(expert, build("llama", 2), ALPHA, check_vocabulary=False)
    for name in ("default", "other", "default"):
        expert.set_adapter(name)
        assert torch.equal(model.generate(ids, **RUN), want[name])
        with processor.attach(base):
            assert torch.equal(base.generate(ids, **RUN), want[name])


def test_attaching_to_a_peft_base_steers_it() -> None:
    base, ids = lora(1), torch.randint(3, 240, (1, 9))
    expert, antiexpert = build("gpt2", 2), build("gpt2", 3)
    want = proxytune.wrap(
        merged(base, "default"), expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False
    ).generate(ids, **RUN)
    alone = base.generate(input_ids=ids, **RUN)
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
    with processor.attach(base):
        assert torch.equal(base.generate(input_ids=ids, **RUN), want)
    assert processor.token_forwards["expert"] == 9 + 7
    assert torch.equal(base.generate(input_ids=ids, **RUN), alone)
    assert not torch.equal(alone, want)


def test_the_model_that_got_the_adapter_is_the_untuned_one_without_it() -> None:
    expert, ids = lora(), torch.randint(3, 240, (1, 9))
    inside = expert.get_base_model()
    base = build("qwen3", 1)
    want = reference(merged(expert, "default"), ids)
    model = proxytune.wrap(base, expert=expert, antiexpert=inside, alpha=ALPHA, check_vocabulary=False)
    assert torch.equal(model.generate(ids, **RUN), want)
    with ProxyTuningLogitsProcessor(expert, inside, ALPHA, check_vocabulary=False).attach(base):
        assert torch.equal(base.generate(ids, **RUN), want)
    with pytest.raises(MemberError, match="the antiexpert: expected another model than the expert; got one PeftModel"):
        proxytune.wrap(base, expert=expert, antiexpert=expert, check_vocabulary=False)
    with pytest.raises(MemberError, match="the antiexpert: expected another model than the expert; got one PeftModel"):
        ProxyTuningLogitsProcessor(expert, expert, check_vocabulary=False)


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    expert = peft.get_peft_model(build("llama", 2), config)
    with pytest.raises(UnsupportedModelError, match="the expert: expected an adapter in the weights.*learns a prompt"):
        ProxyTuningLogitsProcessor(expert, build("llama", 3), check_vocabulary=False)


LEARNED = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


# Where the cache has its new name, this peft does not find it, and reads the prompt anew in every step.
@pytest.mark.skipif(
    CACHE == "cache" and Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"prompts on transformers {transformers.__version__} want peft >= {MIN_PEFT_VERSION}",
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", LEARNED)
def test_a_base_with_a_learned_prompt_is_right_in_trees_and_refused_by_speculation(kind: str) -> None:
    base = peft.get_peft_model(build("llama", 1), LEARNED[kind]).eval()
    for weight in base.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    ids = torch.randint(3, 240, (2, 9))
    run = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0} | RUN
    want = base.generate(input_ids=ids, **run)
    assert not torch.equal(want, base.get_base_model().generate(input_ids=ids, **run))
    assert torch.equal(base.generate(input_ids=ids, custom_generate=FusedDecoding(), **run), want)
    for loop in (ForkDecoding(threshold=1.0, branches=3, seed=0), SiblingDecoding(threshold=1.0, siblings=3, seed=0)):
        out = base.generate(
            input_ids=ids, custom_generate=loop, return_dict_in_generate=True, **run | {"do_sample": True, "top_k": 0}
        )
        assert [len(tree) for tree in out.trees] == [3, 3]
        for tree in out.trees:
            for branch in tree:
                text = torch.cat([ids[tree.prompt], torch.tensor(branch.along("tokens"))])[None]
                logits = base(input_ids=text).logits[0, -9:-1].log_softmax(-1)
                found = logits.gather(1, text[0, -8:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(branch.along("logprobs")), found, atol=1e-4, rtol=1e-4)
    processor = ProxyTuningLogitsProcessor(build("gpt2", 2), build("gpt2", 3), ALPHA, check_vocabulary=False)
    alone = base.generate(input_ids=ids, logits_processor=[processor], **run)
    with processor.attach(base):
        assert torch.equal(base.generate(input_ids=ids, **run), alone)
        match = "SpeculativeDecoding: expected a cache of the text alone.*whose learned tokens stand in the cache"
        with pytest.raises(UnsupportedModeError, match=match):
            base.generate(input_ids=ids, custom_generate=SpeculativeDecoding(draft=PromptLookupDraft()), **run)


@pytest.mark.skipif(CACHE != "cache" or Version(peft.__version__) > Version("0.21.2"), reason="they are right there")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_prompt_is_refused_where_peft_does_not_find_the_cache(kind: str) -> None:
    base = peft.get_peft_model(build("llama", 1), LEARNED[kind]).eval()
    for weight in base.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    ids = torch.randint(3, 240, (1, 7))
    run = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0} | RUN
    companions = build("gpt2", 2), build("gpt2", 3)
    says = "expected a release of peft that finds the cache as 'cache'"
    with ProxyTuningLogitsProcessor(*companions, alpha=0.5, check_vocabulary=False).attach(base):
        for loop in (None, FusedDecoding(), ForkDecoding(threshold=1.0, branches=2, seed=0)):
            with pytest.raises(UnsupportedModeError, match=says):
                base.generate(input_ids=ids, custom_generate=loop, **run)
        if kind == "prefix":  # it is a cache itself
            with pytest.raises(UnsupportedModeError, match=says):
                base.generate(input_ids=ids, use_cache=False, **run)
            return
        found = base.generate(input_ids=ids, use_cache=False, **run)
    text = ids
    with torch.no_grad():
        while text.shape[1] < found.shape[1]:
            z = [model(input_ids=text).logits[:, -1] for model in (base, *companions)]
            text = torch.cat([text, (z[0] + 0.5 * (z[1] - z[2])).argmax(-1)[:, None]], 1)
    assert torch.equal(found, text)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of transformers {transformers.__version__} wants peft >= {MIN_PEFT_VERSION}",
)
def test_an_adapter_added_after_wrapping_is_not_lost_in_saving(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("expert", 2), ("antiexpert", 3)):
        build("llama", seed).save_pretrained(tmp_path / name)
    folders = {role: str(tmp_path / role) for role in ("base", "expert", "antiexpert")}
    model = proxytune.wrap(**folders, check_vocabulary=False)
    model.save_pretrained(tmp_path / "before")
    model.expert.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RecipeError, match="save_pretrained: expected members .*; got .* carries a PEFT adapter"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("make", [LatentLogitsProcessor, ProxyTuningLogitsProcessor])
def test_a_hook_holds_whichever_model_it_is_put_on_and_whichever_generates(make: Any, task_type: str | None) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type=task_type)
    ids = torch.randint(3, 240, (2, 7))
    run = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0} | RUN | {"max_new_tokens": 4}

    def processor() -> Any:
        if make is LatentLogitsProcessor:
            return LatentLogitsProcessor("mean")
        return ProxyTuningLogitsProcessor(build("gpt2", 2), build("gpt2", 3), ALPHA, check_vocabulary=False)

    inside = build("llama", 1)
    before = processor().attach(inside)  # then PEFT wraps a model that has hooks
    base = peft.get_peft_model(inside, config).eval()
    twin = copy.deepcopy(base).merge_and_unload()
    alone = twin.generate(input_ids=ids, **run)
    with processor().attach(twin):
        want = twin.generate(input_ids=ids, **run)
    assert not torch.equal(want, alone)
    for attached in (before, processor(), processor()):
        if attached is not before:
            attached.attach(base if task_type else inside)
        for model in (base, inside, base):
            assert torch.equal(model.generate(input_ids=ids, **run), want)
        attached.detach()
        for model in (base, inside):
            assert torch.equal(model.generate(input_ids=ids, **run), alone)


def test_a_prompt_that_takes_the_place_of_latent_steps_is_noticed() -> None:
    inside = build("llama", 1)
    base = peft.get_peft_model(inside, LEARNED["prompt"]).eval()
    ids = torch.randint(3, 240, (1, 7))
    run = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0} | RUN
    with (
        LatentLogitsProcessor("mean").attach(inside),
        pytest.raises(UnsupportedModeError, match="LatentLogitsProcessor: .*; got another method in its place"),
    ):
        base.generate(input_ids=ids, **run)
