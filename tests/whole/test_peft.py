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
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import MemberError, RecipeError, UnsupportedModelError

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


def test_the_model_that_got_the_adapter_is_no_untuned_one() -> None:
    expert = lora()
    inside = expert.get_base_model()
    with pytest.raises(MemberError, match="the antiexpert: expected a model of its own beside the expert"):
        proxytune.wrap(build("llama", 1), expert=expert, antiexpert=inside, check_vocabulary=False)
    with pytest.raises(MemberError, match="the base: expected a model of its own beside the expert"):
        proxytune.wrap(inside, expert=expert, antiexpert=build("llama", 2), check_vocabulary=False)
    with pytest.raises(MemberError, match="the antiexpert: expected a model of its own"):
        ProxyTuningLogitsProcessor(expert, inside, check_vocabulary=False)


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    expert = peft.get_peft_model(build("llama", 2), config)
    with pytest.raises(UnsupportedModelError, match="the expert: expected an adapter in the weights.*learns a prompt"):
        ProxyTuningLogitsProcessor(expert, build("llama", 3), check_vocabulary=False)


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
