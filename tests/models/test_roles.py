"""Members in the wrong roles: what is certain is refused, what is likely is said, and right use is silent."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import build, shared

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.demo import bundled
from proxytune.errors import MemberError, RecipeError, SteeringWarning
from proxytune.formulas import ProxyTuning
from proxytune.recipe import MemberRef, Recipe

BASE, EXPERT, ANTIEXPERT = shared("llama", 1), shared("llama", 2), shared("llama", 3)
SAME = "the antiexpert: expected another model than the expert; got .*only the base is left. Pass the model that"


def wrap(base: Any = BASE, expert: Any = EXPERT, antiexpert: Any = ANTIEXPERT, **kwargs: Any) -> ProxyTunedModel:
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, check_vocabulary=False, **kwargs)


def processor(expert: Any = EXPERT, antiexpert: Any = ANTIEXPERT, **kwargs: Any) -> ProxyTuningLogitsProcessor:
    return ProxyTuningLogitsProcessor(expert, antiexpert, check_vocabulary=False, **kwargs)


# --- certain -------------------------------------------------------------------------------------------------------


def test_one_object_as_expert_and_antiexpert_is_refused() -> None:
    for door in (lambda: wrap(antiexpert=EXPERT), lambda: processor(antiexpert=EXPERT)):
        with pytest.raises(MemberError, match=SAME):
            door()


def test_one_folder_for_both_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for expert, antiexpert in (("no/such", "no/such"), (tmp_path / "model", str(tmp_path / "model" / ".." / "model"))):
        with pytest.raises(MemberError, match=SAME):
            wrap(expert=expert, antiexpert=antiexpert)
        with pytest.raises(MemberError, match=SAME):
            processor(expert=expert, antiexpert=antiexpert)
    recipe = Recipe(base=MemberRef("b"), expert=MemberRef("e"), antiexpert=MemberRef("e"))
    (tmp_path / "proxytune_config.json").write_text(recipe.dumps())
    with pytest.raises(MemberError, match=SAME):
        ProxyTunedModel.from_pretrained(tmp_path)


def test_two_revisions_of_one_id_are_two_models() -> None:
    with pytest.raises(MemberError, match="no/such"):  # not found, which is the error after that one
        wrap(expert="no/such", antiexpert="no/such", revisions={"expert": "tuned"})


# What PEFT asks the model for on loading, and what it says of a second adapter.
peft_warnings = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft")


@peft_warnings
def test_two_adapters_in_one_model_are_refused() -> None:
    peft = pytest.importorskip("peft")
    inner = build("llama", 2)
    one, other = (peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"])) for _ in range(2))
    with pytest.raises(MemberError, match="one PeftModel.* for both, in which the same adapters are active for both"):
        wrap(expert=one, antiexpert=other)
    with pytest.raises(MemberError, match=SAME):
        wrap(expert=one, antiexpert=one)


class OnlyExpert(ProxyTuning):
    """Weights that do not cancel."""

    def weights(self) -> tuple[float, ...]:
        return (self.alpha, 0.0)


def test_a_formula_whose_weights_do_not_cancel_may_have_one_model_in_both_roles() -> None:
    assert wrap(antiexpert=EXPERT, formula=OnlyExpert(alpha=0.5)).expert is EXPERT


# --- likely --------------------------------------------------------------------------------------------------------


def test_equal_weights_are_said() -> None:
    for door in (wrap, processor):
        with pytest.warns(SteeringWarning, match="expert and antiexpert have equal weights"):
            door(antiexpert=copy.deepcopy(EXPERT))
    one = copy.deepcopy(EXPERT)
    with torch.no_grad():
        one.lm_head.weight[5, 7] += 0.25
    wrap(antiexpert=one)


@pytest.mark.parametrize(
    ("expert", "antiexpert", "swapped"),
    [
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", True),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", True),
        ("/models/tiny-base", "/models/tiny-tuned/", True),
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-it", True),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B", False),
        ("me/math-llama", "meta-llama/Llama-2-7b-chat-hf", False),  # tuned from the chat model
        ("me/Llama-2-7b-chat-sft", "meta-llama/Llama-2-7b-chat", False),
        ("a/small", "b/small", False),
        ("", "", False),
    ],
)
def test_names_that_look_swapped_are_said(expert: str, antiexpert: str, swapped: bool) -> None:
    members = copy.deepcopy({"expert": EXPERT, "antiexpert": ANTIEXPERT})
    members["expert"].config.name_or_path, members["antiexpert"].config.name_or_path = expert, antiexpert
    if not swapped:
        wrap(**members)
        return
    for door in (wrap, processor):
        with pytest.warns(SteeringWarning, match="expert and antiexpert look swapped: the antiexpert is"):
            door(**members)
    wrap(**members, alpha=-1.0)  # turned round on purpose


@peft_warnings
def test_an_antiexpert_that_is_an_adapter_of_the_expert_is_said() -> None:
    peft = pytest.importorskip("peft")
    inner, expert = copy.deepcopy(ANTIEXPERT), copy.deepcopy(EXPERT)
    inner.name_or_path = expert.config.name_or_path = "some/small"
    antiexpert = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(SteeringWarning, match="look swapped: the antiexpert is an adapter of 'some/small'"):
        wrap(expert=expert, antiexpert=antiexpert)
    wrap(expert=antiexpert, antiexpert=expert)


def test_an_antiexpert_with_end_tokens_of_its_own_is_said() -> None:
    antiexpert = copy.deepcopy(ANTIEXPERT)
    antiexpert.generation_config.eos_token_id = [2, 7]
    with pytest.warns(SteeringWarning, match=r"look swapped: the antiexpert has end tokens of its own \(ids 7\)"):
        wrap(antiexpert=antiexpert)
    # An expert that ends as neither of them has been tuned, too.
    expert, base = copy.deepcopy(EXPERT), copy.deepcopy(BASE)
    expert.generation_config.eos_token_id, base.generation_config.eos_token_id = 7, None
    wrap(base, expert, end_tokens="union")
    expert.generation_config.eos_token_id = None
    wrap(base, expert, antiexpert, end_tokens="union")


def test_a_companion_larger_than_the_base_is_said() -> None:
    small, large = bundled("tiny-base"), bundled("large-base")
    with pytest.warns(SteeringWarning, match="the expert is larger than the base"):
        model = proxytune.wrap(small, expert=bundled("large-tuned"), antiexpert=bundled("tiny-tuned"))
    with pytest.warns(SteeringWarning, match="the expert is larger than the base"):
        processor(model.expert, model.antiexpert).attach(model.base)
    # One model as base and antiexpert checks exactness, and one as base and expert is contrastive decoding.
    large = model.expert
    proxytune.wrap(large, expert=model.base, antiexpert=large)
    proxytune.wrap(large, expert=large, antiexpert=model.base)


def test_an_antiexpert_of_another_size_is_said() -> None:
    other = build("llama", 3, hidden=16)
    with pytest.warns(SteeringWarning, match="the antiexpert is another model .*: hidden_size is 16, the expert's 32"):
        wrap(antiexpert=other)
    with pytest.warns(SteeringWarning, match="the antiexpert is another model"), processor(EXPERT, other).attach(BASE):
        pass
    # One model as base and antiexpert checks exactness, also if it was loaded twice.
    base, again = copy.deepcopy(BASE), build("llama", 3, hidden=16)
    base.config.name_or_path = again.config.name_or_path = "org/large"
    wrap(base, antiexpert=again)
    wrap(antiexpert=other, formula=OnlyExpert(alpha=0.5))


def test_an_alpha_far_out_is_said_at_every_door(tmp_path: Path) -> None:
    far = "alpha=1000 weighs the shift 1000 times"
    model = wrap()
    doors = [
        lambda: wrap(alpha=1000),
        lambda: wrap(formula=ProxyTuning(alpha=1000)),
        lambda: setattr(model, "alpha", 1000),
        lambda: processor(alpha=1000),
        lambda: setattr(processor(), "alpha", 1000),
    ]
    for door in doors:
        with pytest.warns(SteeringWarning, match=far):
            door()
    model.alpha = -3.0
    assert wrap(alpha=10.0).alpha == 10


def test_the_base_as_antiexpert_saved_and_tuned_in_memory_is_still_told_apart(tmp_path: Path) -> None:
    for role, model in {"base": BASE, "small": EXPERT}.items():
        model.save_pretrained(tmp_path / role)
    load = type(EXPERT).from_pretrained
    expert, antiexpert = load(tmp_path / "small"), load(tmp_path / "small")
    with torch.no_grad():
        expert.lm_head.weight.mul_(2)
    with pytest.raises(RecipeError, match="expected an expert and an antiexpert from different places"):
        wrap(load(tmp_path / "base"), expert, antiexpert).save_pretrained(tmp_path / "kit")
