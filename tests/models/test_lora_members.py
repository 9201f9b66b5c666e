"""An expert that is the antiexpert with a LoRA: both doors, every mode, recipes, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny import build, shared
from transformers import PreTrainedModel

import proxytune
from proxytune import (
    ForkDecoding,
    FusedDecoding,
    LatentDecoding,
    ProxyTunedModel,
    ProxyTuningLogitsProcessor,
    SiblingDecoding,
    SpeculativeDecoding,
)
from proxytune.errors import InputError, MemberError, MemberNotFoundError, UnsupportedModeError
from proxytune.formulas import View

# PEFT calls transformers by names that the newest version has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LORA = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
WRAP = {"alpha": 0.7, "check_vocabulary": False}
RUN = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: "large", "small", and "lora", an adapter of the small one."""
    folder = tmp_path_factory.mktemp("places")
    shared("qwen3", 1).save_pretrained(folder / "large")
    shared("llama", 2).save_pretrained(folder / "small")
    tuned().save_pretrained(folder / "lora")
    return folder


def tuned() -> Any:
    torch.manual_seed(4)
    return peft.get_peft_model(build("llama", 2), LORA).eval()


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    return tuned().merge_and_unload()


@pytest.fixture(scope="module")
def want(merged: PreTrainedModel) -> ProxyTunedModel:
    """The same with two models."""
    return proxytune.wrap(shared("qwen3", 1), expert=merged, antiexpert=shared("llama", 2), **WRAP)


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    expert = tuned()
    return proxytune.wrap(shared("qwen3", 1), expert=expert, antiexpert=expert.get_base_model(), **WRAP)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 240, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "a prompt in parts": {"prefill_chunk_size": 4},
    "a static cache": {"cache_implementation": "static"},
    "fused": {"custom_generate": FusedDecoding()},
    "speculation": {"custom_generate": SpeculativeDecoding()},
    "trees": {"custom_generate": ForkDecoding(threshold=1.0, branches=3, seed=0), "do_sample": True, "top_k": 0},
    "siblings": {"custom_generate": SiblingDecoding(threshold=1.0, siblings=3, seed=0), "do_sample": True, "top_k": 0},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_what_two_models_write(
    mode: str, model: ProxyTunedModel, want: ProxyTunedModel, inputs: dict[str, torch.Tensor]
) -> None:
    found = []
    for each in (model, want):
        torch.manual_seed(0)
        before = each.token_forwards
        ids = each.generate(**inputs, **RUN | {"do_sample": False} | MODES[mode])
        found.append((ids, {role: n - before[role] for role, n in each.token_forwards.items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_pair_takes_one_pass_a_step(model: ProxyTunedModel, inputs: dict[str, torch.Tensor]) -> None:
    rows: list[int] = []
    handle = model.antiexpert.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    model.generate(**inputs, **RUN, do_sample=False, num_beams=3)
    handle.remove()
    assert rows == [12] * 6


def test_latent_steps_are_those_of_two_models_unless_adapters_change_embeddings(
    model: ProxyTunedModel, want: ProxyTunedModel, inputs: dict[str, torch.Tensor]
) -> None:
    run = RUN | {"do_sample": False, "custom_generate": LatentDecoding("mean", seed=1)}
    assert torch.equal(model.generate(**inputs, **run), want.generate(**inputs, **run))
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    expert = peft.get_peft_model(build("llama", 2), config).eval()
    pair = proxytune.wrap(shared("qwen3", 1), expert=expert, antiexpert=expert.get_base_model(), **WRAP)
    with pytest.raises(UnsupportedModeError, match="latent steps for the antiexpert: expected embeddings that are the"):
        pair.generate(**inputs, **run)


def test_drafts_of_an_assistant_are_taken_back_from_both(model: ProxyTunedModel, want: ProxyTunedModel) -> None:
    ids = torch.randint(3, 240, (1, 9))
    run = RUN | {"do_sample": False, "assistant_model": shared("llama", 2)}
    assert torch.equal(model.generate(ids, **run), want.generate(ids, **run))


def doors(places: Path) -> dict[str, ProxyTunedModel]:
    expert, small = tuned(), build("llama", 2)
    base, lora = shared("qwen3", 1), f"lora:{places / 'lora'}"
    return {
        "a view": proxytune.wrap(base, expert=expert, antiexpert=View("expert", adapter=False), **WRAP),
        "onto an object": proxytune.wrap(base, expert=lora, antiexpert=small, **WRAP),
        "onto it once more": proxytune.wrap(base, expert=lora, antiexpert=small, **WRAP),
        "by places": proxytune.wrap(str(places / "large"), expert=lora, antiexpert=str(places / "small"), **WRAP),
    }


def test_all_doors_are_one_model_in_memory(
    places: Path, want: ProxyTunedModel, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    text = want.generate(**inputs, **RUN, do_sample=False)
    for name, model in doors(places).items():
        assert torch.equal(model.generate(**inputs, **RUN, do_sample=False), text), name
        own = {id(weight) for weight in model.antiexpert.parameters()}
        assert {id(weight) for weight in model.expert.parameters()} == own, name


def test_who_holds_the_antiexpert_finds_it_as_it_was(places: Path, inputs: dict[str, torch.Tensor]) -> None:
    small = build("llama", 2)
    before = small(**inputs).logits
    for _ in range(2):
        proxytune.wrap(shared("qwen3", 1), expert=f"lora:{places / 'lora'}", antiexpert=small, **WRAP)
        assert torch.equal(small(**inputs).logits, before)
    assert torch.equal(small.generate(**inputs, **RUN), build("llama", 2).generate(**inputs, **RUN))


def test_the_base_with_an_adapter_is_one_model_in_three_roles(places: Path, merged: PreTrainedModel) -> None:
    base, ids = build("llama", 2), torch.randint(3, 240, (2, 9))
    given = {"alpha": 0.5, "check_vocabulary": False}
    want = proxytune.wrap(shared("llama", 2), expert=merged, antiexpert=shared("llama", 2), **given)
    text = want.generate(ids, **RUN, do_sample=False)
    lora, place = f"lora:{places / 'lora'}", str(places / "small")
    for model in (
        proxytune.wrap(base, expert=lora, antiexpert=base, **given),
        proxytune.wrap(place, expert=lora, antiexpert=place, **given),
    ):
        assert torch.equal(model.generate(ids, **RUN, do_sample=False), text)
        assert len(model.members) == 2
        assert model.token_forwards == {"base": 2 * 14, "expert": 2 * 14}


@pytest.mark.parametrize("own_base", [False, True])
def test_a_recipe_names_the_adapter(places: Path, own_base: bool) -> None:
    base = str(places / ("small" if own_base else "large"))
    given = {"alpha": 0.5, "check_vocabulary": False}
    model = proxytune.wrap(base, expert=f"lora:{places / 'lora'}", antiexpert=str(places / "small"), **given)
    model.save_pretrained(places / "recipe")
    saved = json.loads((places / "recipe" / "proxytune_config.json").read_text())
    assert saved["expert"] == {"id": "../small", "revision": None, "adapter": "../lora"}
    assert saved["antiexpert"] == {"id": "../small", "revision": None}
    opened = ProxyTunedModel.from_pretrained(places / "recipe", check_vocabulary=False)
    ids = torch.randint(3, 240, (1, 7))
    assert torch.equal(opened.generate(ids, **RUN), model.generate(ids, **RUN))
    assert len({id(p) for p in opened.parameters()}) == len({id(p) for p in model.parameters()})


def test_a_processor_takes_the_pair(places: Path, want: ProxyTunedModel, inputs: dict[str, torch.Tensor]) -> None:
    base, expert = build("qwen3", 1), tuned()
    text = want.generate(**inputs, **RUN, do_sample=False)
    pairs: list[tuple[Any, Any]] = [
        (expert, expert.get_base_model()),
        (f"lora:{places / 'lora'}", str(places / "small")),
        (f"lora:{places / 'lora'}", build("llama", 2)),
    ]
    for pair in pairs:
        with ProxyTuningLogitsProcessor(*pair, 0.7, check_vocabulary=False).attach(base):
            assert torch.equal(base.generate(**inputs, **RUN, do_sample=False), text)


def test_what_is_no_adapter_of_the_model_is_refused_and_leaves_it_as_it_was(places: Path, tmp_path: Path) -> None:
    base, lora = shared("qwen3", 1), f"lora:{places / 'lora'}"
    small, ids = build("llama", 2, hidden=64), torch.randint(3, 240, (1, 7))
    before, names = small(ids).logits, [name for name, _ in small.named_modules()]
    with pytest.raises(MemberError, match="the expert: expected an adapter of the model that it goes onto.*lora'"):
        proxytune.wrap(base, expert=lora, antiexpert=small, **WRAP)
    assert [name for name, _ in small.named_modules()] == names
    assert torch.equal(small(ids).logits, before)
    with pytest.raises(MemberError, match="expected an adapter of the model that it goes onto.*not found in the base"):
        proxytune.wrap(base, expert=lora, antiexpert=build("gpt2", 2), **WRAP)
    with pytest.raises(MemberNotFoundError, match="the expert: expected a folder or hub id of a PEFT adapter"):
        proxytune.wrap(base, expert=f"lora:{places / 'small'}", antiexpert=build("llama", 2), **WRAP)
    with pytest.raises(MemberError, match="expected an adapter of a model without others; got .* carries default"):
        proxytune.wrap(base, expert=lora, antiexpert=tuned(), **WRAP)
    with pytest.raises(InputError, match="the antiexpert: expected a model, .*: 'lora:…' stands for the expert only"):
        proxytune.wrap(base, expert=build("llama", 2), antiexpert=lora, **WRAP)
    with pytest.raises(InputError, match="members: expected none for the expert, an adapter of the antiexpert"):
        proxytune.wrap(
            base, expert=lora, antiexpert=str(places / "small"), members={"expert": {"dtype": "float32"}}, **WRAP
        )
    folder = tmp_path / "biases"
    config = copy.deepcopy(LORA)
    config.bias = "lora_only"
    peft.get_peft_model(build("llama", 2), config).save_pretrained(folder)
    with pytest.raises(MemberError, match="which can be switched off; got .* bias='lora_only', which trains biases"):
        proxytune.wrap(base, expert=f"lora:{folder}", antiexpert=build("llama", 2), **WRAP)


def test_an_adapter_of_more_layers_is_no_adapter_of_the_model(places: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((places / "lora" / file).read_bytes())
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): weight.clone() for name, weight in weights.items()}
    save_file(weights | more, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        MemberError, match="expected an adapter of the model that it goes onto.*14 weights that are miss"
    ):
        proxytune.wrap(shared("qwen3", 1), expert=f"lora:{tmp_path}", antiexpert=build("llama", 2), **WRAP)


def test_one_adapter_state_twice_is_no_shift(places: Path) -> None:
    expert = tuned()
    for view in (View("expert"), View("expert", adapter="default")):
        with pytest.raises(
            MemberError, match="expected another model than the expert; got one PeftModel for expert and"
        ):
            proxytune.wrap(shared("qwen3", 1), expert=expert, antiexpert=view, **WRAP)
