"""A chat expert ends its turn with another token than the base: every door stops there, and the recipe keeps it."""

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import EOS, PAD, shared, tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import proxytune
from proxytune import (
    ForkDecoding,
    FusedDecoding,
    LatentDecoding,
    ProxyTunedModel,
    ProxyTuningLogitsProcessor,
    SpeculativeDecoding,
)
from proxytune.errors import InputError, RecipeError, SteeringWarning
from proxytune.methods.latent import LatentMixture
from proxytune.models.end_tokens import EndWatch, stopping_ids
from proxytune.recipe import RECIPE_FILE, Recipe

IDS = torch.arange(40, 48)[None]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
SAID = "the expert also ends its turn with .*Nothing is wrong: pass end_tokens='union'"


def trio(end: int | list[int]) -> dict[str, Any]:
    """Base, expert and antiexpert; the expert is a copy with other end tokens."""
    expert = copy.copy(shared("llama", 2))
    expert.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=PAD)
    return {"base": shared("llama", 1), "expert": expert, "antiexpert": shared("llama", 3)}


def wrapped(end: int | list[int], **kwargs: Any) -> ProxyTunedModel:
    return proxytune.wrap(**trio(end), check_vocabulary=False, **kwargs)


@pytest.fixture(scope="module")
def end() -> int:
    """A token that the composition writes early, but not first: the end token of the expert."""
    text = wrapped(EOS).generate(IDS, **GREEDY, eos_token_id=None)[0, IDS.shape[1] :].tolist()
    found: int = next(token for i, token in enumerate(text) if i > 1 and token not in text[:i])
    return found


@pytest.fixture(scope="module")
def text(end: int) -> list[int]:
    """The text up to that token."""
    whole: list[int] = wrapped(EOS).generate(IDS, **GREEDY, eos_token_id=None)[0].tolist()
    return whole[: whole.index(end, IDS.shape[1]) + 1]


def test_the_union_is_said_once_and_named(end: int) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        models = [wrapped(end) for _ in range(3)]
    assert [w.category for w in said] == [SteeringWarning]
    assert f"(id {end})" in str(said[0].message) or f"id {end}" in str(said[0].message)
    assert all(m.generation_config.eos_token_id == m.config.eos_token_id == [EOS, end] for m in models)
    # Nothing was changed on the members themselves.
    assert models[0].base.generation_config.eos_token_id == EOS


@pytest.mark.parametrize(
    "loop",
    [
        None,
        FusedDecoding(seed=0),
        SpeculativeDecoding(seed=0),
        LatentDecoding(LatentMixture(kind="onehot")),
        "expert as assistant",
        "beams",
    ],
    ids=lambda loop: loop if isinstance(loop, str) else type(loop).__name__,
)
def test_every_loop_stops_where_the_expert_ends_its_turn(end: int, text: list[int], loop: Any) -> None:
    model = wrapped(end, end_tokens="union")
    more: dict[str, Any] = {"custom_generate": loop}
    if isinstance(loop, str):
        more = {"assistant_model": model.expert} if "assistant" in loop else {"num_beams": 2}
    got = model.generate(IDS, **GREEDY, **more)[0].tolist()
    if loop == "beams":
        assert any(token in (EOS, end) for token in got[IDS.shape[1] :]) or len(got) == IDS.shape[1] + 10
        return
    assert got == text


def test_a_tree_stops_there_too(end: int) -> None:
    out = wrapped(end, end_tokens="union").generate(
        IDS,
        do_sample=True,
        max_new_tokens=10,
        custom_generate=ForkDecoding(threshold=0.0, branches=3, seed=1),
        return_dict_in_generate=True,
    )
    for row in out.sequences[:, IDS.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in (EOS, end)]
        assert not ends or set(row[ends[0] + 1 :]) <= {PAD}


@pytest.mark.parametrize(("wanted", "ids"), [("base", EOS), ("expert", [7, 9]), ("union", [EOS, 7, 9])])
def test_the_setting_is_silent_and_kept(wanted: Any, ids: Any) -> None:
    model = wrapped([7, 9], end_tokens=wanted)
    assert model.generation_config.eos_token_id == ids


@pytest.mark.parametrize(
    ("base", "expert", "named", "want"),
    [
        (2, 2, None, None),  # nothing to change
        ([2, 7], 7, None, None),
        (None, 7, None, [7]),
        (2, [7, 2], None, [2, 7]),
        (2, 2, (None, 9), [2, 9]),  # the tokenizer of a fine-tune names the end of a turn
        (2, 2, (9, 9), None),  # that of the base does so too: not tuned
        (2, None, (None, 9), None),  # an expert that was told never to end
    ],
)
def test_whose_tokens_count(base: Any, expert: Any, named: Any, want: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=expert))
    tokenizers = dict(zip(("base", "expert"), (SimpleNamespace(eos_token_id=n) for n in named or ()), strict=False))
    assert stopping_ids(base, model, "union", tokenizers) == want
    tokenizers.pop("base", None)  # then nobody knows
    assert stopping_ids(base, model, "union", tokenizers) == (None if named else want)


@pytest.mark.parametrize("wanted", [None, "union", "expert", "base"])
def test_an_end_that_is_never_written_is_said(wanted: Any) -> None:
    wide = copy.copy(shared("llama", 2, 260))
    wide.generation_config = GenerationConfig(eos_token_id=258, pad_token_id=PAD)
    members = {"expert": wide, "antiexpert": shared("llama", 3)}
    own: dict[str, Any] = {"check_vocabulary": False, "end_tokens": wanted}

    def attached() -> None:
        ProxyTuningLogitsProcessor(**members, **own).attach(shared("llama", 1)).detach()

    for door in (lambda: proxytune.wrap(shared("llama", 1), **members, **own), attached):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = door()
        texts = [str(warning.message) for warning in said]
        if wanted == "base":
            assert texts == []
            continue
        assert [text[: text.index(",")] for text in texts] == ["texts cannot end with id 258"]
        if isinstance(made, ProxyTunedModel):
            assert made.generation_config.eos_token_id == EOS, "those that are written still end a text"


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="end_tokens: expected 'union', 'base' or 'expert'; got 'both'"):
        wrapped(EOS, end_tokens="both")
    with pytest.raises(InputError, match="end_tokens"):
        ProxyTuningLogitsProcessor(shared("llama", 2), shared("llama", 3), check_vocabulary=False, end_tokens="all")


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, end: int) -> Path:
    folder = tmp_path_factory.mktemp("members")
    for role, model in trio(end).items():
        model.save_pretrained(folder / role)
        tokenizer().save_pretrained(folder / role)
    return folder


def composed(folders: Path, **kwargs: Any) -> ProxyTunedModel:
    return proxytune.wrap(
        folders / "base", expert=folders / "expert", antiexpert=folders / "antiexpert", alpha=1.0, **kwargs
    )


def test_the_recipe_keeps_the_choice(folders: Path, tmp_path: Path, end: int, text: list[int]) -> None:
    with pytest.warns(SteeringWarning, match=SAID):
        composed(folders).save_pretrained(tmp_path / "union")
    composed(folders, end_tokens="base").save_pretrained(tmp_path / "base")
    assert Recipe.load(tmp_path / "union").end_tokens == "union"
    # Opened without a warning: both were decided.
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "union")
    assert opened.generation_config.eos_token_id == opened.config.eos_token_id == [EOS, end]
    assert opened.generate(IDS, **GREEDY)[0].tolist() == text
    assert ProxyTunedModel.from_pretrained(tmp_path / "base").generation_config.eos_token_id == EOS
    again = ProxyTunedModel.from_pretrained(tmp_path / "base", end_tokens="expert")
    assert again.generation_config.eos_token_id == end
    # A choice when opening is made from what the base ends with, not from what an earlier choice saved.
    again = ProxyTunedModel.from_pretrained(tmp_path / "union", end_tokens="base")
    assert again.generation_config.eos_token_id == again.config.eos_token_id == EOS
    assert again.recipe.end_tokens == "base"
    # Its file opens a recipe as its folder does.
    opened_file = ProxyTunedModel.from_pretrained(tmp_path / "union" / RECIPE_FILE)
    assert opened_file.generation_config.eos_token_id == [EOS, end]
    # What was set by hand is what is saved.
    opened.generation_config.eos_token_id = [7]
    opened.save_pretrained(tmp_path / "own")
    assert ProxyTunedModel.from_pretrained(tmp_path / "own").generation_config.eos_token_id == [7]


def test_a_recipe_of_before_says_it_when_it_is_opened(folders: Path, tmp_path: Path, end: int) -> None:
    composed(folders, end_tokens="base").save_pretrained(tmp_path)
    file = tmp_path / RECIPE_FILE
    data = json.loads(file.read_text())
    assert data.pop("end_tokens") == "base"
    file.write_text(json.dumps(data))
    with pytest.warns(SteeringWarning, match=SAID):
        assert ProxyTunedModel.from_pretrained(tmp_path).generation_config.eos_token_id == [EOS, end]
    (tmp_path / "generation_config.json").unlink()
    file.write_text(json.dumps(data | {"end_tokens": "union"}))
    assert ProxyTunedModel.from_pretrained(tmp_path).generation_config.eos_token_id == [EOS, end]
    file.write_text(json.dumps(data | {"end_tokens": "unoin"}))
    with pytest.raises(RecipeError, match="recipe key 'end_tokens': .*Did you mean 'union'"):
        Recipe.load(tmp_path)


def test_a_recipe_of_members_that_end_alike_has_no_such_key(tmp_path: Path, folders: Path) -> None:
    model = proxytune.wrap(folders / "base", expert=folders / "antiexpert", antiexpert=folders / "base")
    model.save_pretrained(tmp_path)
    assert "end_tokens" not in json.loads((tmp_path / RECIPE_FILE).read_text())


# --- the attached processor ----------------------------------------------------------------------------------------


def attached(end: int, **kwargs: Any) -> ProxyTuningLogitsProcessor:
    members = trio(end)
    return ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], 1.0, check_vocabulary=False, **kwargs)


def test_an_attached_base_stops_there_until_it_is_detached(end: int, text: list[int]) -> None:
    base = shared("llama", 1)
    processor = attached(end)
    with pytest.warns(SteeringWarning, match=SAID):
        processor.attach(base)
    with processor:
        assert base.generate(IDS, **GREEDY)[0].tolist() == text
        assert base.generate(IDS, custom_generate=FusedDecoding(), **GREEDY)[0].tolist() == text
        # What a call says comes first.
        assert base.generate(IDS, **GREEDY, eos_token_id=EOS).shape[1] == 18
        assert base.generate(IDS, GenerationConfig(**GREEDY, eos_token_id=[EOS, 99])).shape[1] == 18
        assert base.generate(IDS, GenerationConfig(**GREEDY))[0].tolist() == text
    assert base.generation_config.eos_token_id == EOS
    assert base._prepare_generation_config(None)[0].eos_token_id == EOS
    with attached(end, end_tokens="base").attach(base):
        assert base.generate(IDS, **GREEDY).shape[1] == 18


def test_a_pipeline_made_before_stops_there_too(end: int) -> None:
    base = shared("llama", 1)
    write = pipeline("text-generation", base, tokenizer=tokenizer())
    with attached(end, end_tokens="union").attach(base):
        ids = write("abc", **GREEDY, return_tensors=True)[0]["generated_token_ids"]
        want = base.generate(torch.tensor([ids[:3]]), **GREEDY)[0].tolist()
    assert ids == want
    assert base.generation_config.eos_token_id == EOS


def test_an_unattached_processor_says_that_a_text_goes_on(end: int) -> None:
    base = shared("llama", 1)
    with pytest.warns(SteeringWarning, match=f"goes on after id {end}, .*eos_token_id=") as said:
        base.generate(IDS.repeat(2, 1), logits_processor=[attached(end)], **GREEDY)
    assert len(said) == 1
    # Where it stops there, or was told not to, nothing is said; nor of tokens of the prompt.
    stop = [EOS, end]
    base.generate(IDS.repeat(2, 1), logits_processor=[attached(end)], eos_token_id=stop, **GREEDY)
    base.generate(IDS, logits_processor=[attached(end, end_tokens="base")], **GREEDY)
    base.generate(
        torch.tensor([[40, end, 41, 42, 43]]), logits_processor=[attached(end)], **GREEDY | {"max_new_tokens": 3}
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[9, 7, 7, 7]], True),  # one row: its next token is asked for, so it goes on, whatever it repeats
        ([[9, 7, 4, 4]], True),
        ([[9, 7, 4, 4, 5], [9, 8, 8, 8, 8]], True),  # a repetition at first
        ([[9, 7, 0, 0], [9, 8, 8, 8]], False),  # stopped there, and padded
        ([[9, 2, 7, 7], [9, 8, 8, 8]], False),  # stopped elsewhere, and padded with that token
        ([[9, 7, 7, 7], [7, 0, 0, 0]], True),  # one of them goes on
        ([[9, 9, 9, 7]], False),
    ],
)
def test_a_text_that_goes_on_is_told_from_padding(rows: list[list[int]], said: bool) -> None:
    watch, ids = EndWatch([7]), torch.tensor([[3, 7, 4, *row] for row in rows])  # the prompt has one, too
    found = [watch.passed(ids[:, :length]) for length in range(3, ids.shape[1] + 1)]
    assert (7 in found) == said
