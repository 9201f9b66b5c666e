"""An adapter folder: small text files that open again everywhere, and nothing left behind when saving fails."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import BOS, CONTEXT, PAD, build
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, pipeline

import proxytune
from proxytune import ProxyTunedConfig, ProxyTunedModel
from proxytune.errors import RecipeError
from proxytune.recipe import RECIPE_FILE, Recipe

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {"config.json", "generation_config.json", "modeling_proxytune.py", RECIPE_FILE} | TOKENIZER
WORDS = {"<unk>": 0} | {f"w{i}": i for i in range(1, 240)}
PROMPT = torch.arange(20, 28)[None]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models with a tokenizer each, as on the hub; nobody may write to them."""
    folder = tmp_path_factory.mktemp("members")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(WORDS, unk_token="<unk>")), unk_token="<unk>"
    )
    for seed, (role, kind) in enumerate({"base": "llama", "expert": "gpt2", "antiexpert": "gpt2"}.items()):
        build(kind, seed).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder


def compose(members: Path, **kwargs: Any) -> ProxyTunedModel:
    return proxytune.wrap(
        members / "base", **({"expert": members / "expert", "antiexpert": members / "antiexpert"} | kwargs)
    )


@pytest.fixture(scope="module")
def shared_model(members: Path) -> ProxyTunedModel:
    return compose(members, alpha=0.7)


@pytest.fixture
def model(shared_model: ProxyTunedModel) -> Any:
    """The composition; α and the generation settings may be changed."""
    settings = copy.deepcopy(shared_model.generation_config)
    yield shared_model
    shared_model.generation_config, shared_model.alpha = settings, 0.7


def generated(model: Any) -> list[int]:
    return model.generate(PROMPT, **GREEDY)[0].tolist()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_only_small_text_files_are_written(model: ProxyTunedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "kit")
    written = snapshot(tmp_path / "kit")
    assert set(written) == FILES
    own = {name: content or b"" for name, content in written.items() if name not in TOKENIZER}
    assert sum(len(content) for content in own.values()) < 2500
    assert all(content.decode("ascii").endswith(("}\n", "}", "\n")) for content in own.values())
    assert os.listdir(tmp_path) == ["kit"]
    config = json.loads((tmp_path / "kit" / "config.json").read_text())
    # The class that programs look up in transformers, and no trace of one member's shape.
    assert config["architectures"] == ["AutoModelForCausalLM"]
    carried = {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert set(config) == {"model_type", "architectures", "auto_map", "transformers_version"} | carried


def test_harnesses_find_contexts_and_ids_without_the_model(model: ProxyTunedModel, tmp_path: Path) -> None:
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.max_position_embeddings) == (256, CONTEXT)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, [2, 7], PAD)
    opened = ProxyTunedModel.from_pretrained(tmp_path)
    assert opened.config.max_position_embeddings == CONTEXT
    assert opened.config.vocab_size == 256


def test_the_name_leads_to_a_tokenizer(model: ProxyTunedModel, members: Path, tmp_path: Path) -> None:
    # The base's folder; the recipe's, once it is opened from there.
    assert model.name_or_path == model.config.name_or_path == str(members / "base")
    model.save_pretrained(tmp_path)
    assert ProxyTunedModel.from_pretrained(tmp_path).name_or_path == str(tmp_path)


def test_the_recipe_says_where_the_members_are(model: ProxyTunedModel, members: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    recipe = Recipe.load(tmp_path)
    assert {role: ref.id for role, ref in recipe.members.items()} == {
        role: str(members / role) for role in ("base", "expert", "antiexpert")
    }
    assert recipe.alpha == 0.7
    assert recipe == model.recipe


def test_folders_are_absolute_wherever_one_stood(
    members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(members)
    model = proxytune.wrap("base", expert="./expert", antiexpert=Path("..") / members.name / "antiexpert")
    model.save_pretrained(tmp_path)
    monkeypatch.chdir("/")
    assert generated(ProxyTunedModel.from_pretrained(tmp_path)) == generated(model)


@pytest.mark.smoke
def test_alpha_and_generation_settings_are_saved_as_they_stand(model: ProxyTunedModel, tmp_path: Path) -> None:
    model.alpha = -1.25
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(tmp_path)
    opened = ProxyTunedModel.from_pretrained(tmp_path)
    assert opened.alpha == opened.recipe.alpha == -1.25  # type: ignore[union-attr]
    assert opened.generation_config.max_new_tokens == 3
    assert opened.generation_config.repetition_penalty == 1.3
    assert torch.equal(opened.generate(PROMPT), model.generate(PROMPT))
    assert opened.generate(PROMPT).shape[1] == PROMPT.shape[1] + 3


def test_saving_again_replaces_the_adapter_and_keeps_other_files(model: ProxyTunedModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.alpha = 0.1
    model.save_pretrained(str(tmp_path))
    assert set(snapshot(tmp_path)) == FILES | {"README.md"}
    assert (tmp_path / "README.md").read_text() == "mine"
    assert Recipe.load(tmp_path).alpha == 0.1


def test_a_tokenizer_that_is_there_already_stays(model: ProxyTunedModel, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_folder_inside_the_tokenizer_is_saved_and_undone(
    model: ProxyTunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tokenizers with several chat templates save them to a folder.
    def save(self: Any, folder: Path) -> None:
        (Path(folder) / "templates").mkdir()
        for name in ("templates/one", "tokenizer_config.json"):
            (Path(folder) / name).write_text("{}")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", save)
    replace = os.replace

    def fail_at_config(source: Any, target: Any) -> None:
        if Path(target).name == "config.json":
            raise OSError("full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_config)
        with pytest.raises(RecipeError, match="full"):
            model.save_pretrained(tmp_path / "kit")
    assert os.listdir(tmp_path) == []
    model.save_pretrained(tmp_path / "kit")
    assert (tmp_path / "kit" / "templates" / "one").read_text() == "{}"


def test_a_pipeline_opens_from_the_folder_alone(model: ProxyTunedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ask = pipeline("text-generation", str(tmp_path))
    assert isinstance(ask.model, ProxyTunedModel)
    got = ask("w5 w9", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = ask.tokenizer("w5 w9", return_tensors="pt")
    assert got == model.generate(**ids, max_new_tokens=4, do_sample=False)[0].tolist()


# --- opening again -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_it_opens_again_and_generates_the_same(model: ProxyTunedModel, tmp_path: Path) -> None:
    want = generated(model)
    assert want != generated(model.base)  # or opening the base alone would pass
    model.save_pretrained(tmp_path)
    for opened in (
        ProxyTunedModel.from_pretrained(tmp_path),
        ProxyTunedModel.from_pretrained(str(tmp_path / RECIPE_FILE)),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path)),
    ):
        assert type(opened) is ProxyTunedModel
        assert opened.alpha == 0.7
        assert generated(opened) == want
        assert opened.recipe == model.recipe


IMPORTS = {
    "proxytune first": "import proxytune\nfrom transformers import AutoModelForCausalLM\ntrust = {}",
    "a tokenizer first": "import proxytune\nfrom transformers import AutoTokenizer\n"
    "from transformers import AutoModelForCausalLM\ntrust = {}",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport proxytune\ntrust = {}",
    "never": "from transformers import AutoModelForCausalLM\ntrust = {'trust_remote_code': True}\n"
    "import sys; assert 'proxytune' not in sys.modules",
}


@pytest.mark.smoke
@pytest.mark.parametrize("imports", IMPORTS)
def test_it_opens_in_another_process(model: ProxyTunedModel, tmp_path: Path, imports: str) -> None:
    model.save_pretrained(tmp_path / "kit")
    script = f"""
import warnings; warnings.simplefilter("error")
import torch; torch.set_num_threads(1)
{IMPORTS[imports]}
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "kit")!r}, **trust)
ids = model.generate(torch.tensor({PROMPT.tolist()}), **{GREEDY!r})[0].tolist()
print(type(model).__name__, model.alpha, ids, sep="|")
"""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(proxytune.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ProxyTunedModel|0.7|{generated(model)}"


def test_a_recipe_written_by_hand_is_enough(members: Path, model: ProxyTunedModel, tmp_path: Path) -> None:
    # Members beside the recipe, named by relative folders; and then all of it moved elsewhere.
    kit = tmp_path / "kit"
    shutil.copytree(members, kit / "members")
    recipe = {role: f"members/{role}" for role in ("base", "expert", "antiexpert")}
    (kit / RECIPE_FILE).write_text(json.dumps({"format_version": 1, **recipe, "formula": "proxy-tuning", "alpha": 0.7}))
    kit.rename(tmp_path / "moved")
    opened = ProxyTunedModel.from_pretrained(tmp_path / "moved")
    assert generated(opened) == generated(model)
    assert opened.generation_config.pad_token_id == opened.base.generation_config.pad_token_id == 0


def test_an_alpha_edited_by_hand_takes_effect(model: ProxyTunedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    recipe = json.loads((tmp_path / RECIPE_FILE).read_text())
    (tmp_path / RECIPE_FILE).write_text(json.dumps(recipe | {"alpha": -3}))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.alpha == -3.0
    model.alpha = -3.0
    torch.testing.assert_close(opened(PROMPT).logits, model(PROMPT).logits)
    (tmp_path / RECIPE_FILE).write_text(json.dumps(recipe | {"alhpa": 1}))
    with pytest.raises(RecipeError, match="got unknown 'alhpa'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / RECIPE_FILE).unlink()
    for door in (AutoModelForCausalLM, ProxyTunedModel, ProxyTunedConfig):
        with pytest.raises(RecipeError, match=f"expected a {RECIPE_FILE}; got no file at"):
            door.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_arguments_reach_all_members(model: ProxyTunedModel, tmp_path: Path, dtype: Any) -> None:
    model.save_pretrained(tmp_path)
    for door in (ProxyTunedModel, AutoModelForCausalLM):
        opened = door.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        for member in (opened.base, opened.expert, opened.antiexpert):
            assert {p.dtype for p in member.parameters()} == {torch.bfloat16}
            assert member.config._attn_implementation == "eager"
        assert opened(PROMPT).logits.dtype == torch.float32


# --- what cannot be saved ------------------------------------------------------------------------------------------


def of_memory(members: Path) -> ProxyTunedModel:
    return compose(members, expert=build("gpt2", 9), check_vocabulary=False)


def with_adapter(members: Path) -> ProxyTunedModel:
    expert = AutoModelForCausalLM.from_pretrained(members / "expert")
    expert.peft_config = {"default": None}  # what PEFT, and transformers' own adapters, leave on a model
    return compose(members, expert=expert, check_vocabulary=False)


def tuned_in_memory(members: Path) -> ProxyTunedModel:
    expert, antiexpert = (AutoModelForCausalLM.from_pretrained(members / "antiexpert") for _ in range(2))
    with torch.no_grad():
        expert.lm_head.weight.mul_(2)
    return compose(members, expert=expert, antiexpert=antiexpert)


NOWHERE = "expected members that were loaded from a folder or the hub; got a member that exists only in memory"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_memory, NOWHERE),
        (with_adapter, NOWHERE),
        (tuned_in_memory, "expected an expert and an antiexpert from different places; got '.*/antiexpert' for both"),
    ],
    ids=["in memory", "adapter", "same place"],
)
def test_what_its_name_does_not_tell_of_is_refused(
    members: Path, tmp_path: Path, make: Callable[[Path], ProxyTunedModel], message: str
) -> None:
    with pytest.raises(RecipeError, match="save_pretrained: " + message):
        make(members).save_pretrained(tmp_path / "kit")
    assert os.listdir(tmp_path) == []


def test_one_model_in_two_roles_is_saved(members: Path, tmp_path: Path) -> None:
    # At base = antiexpert and α = 1 the composition is the expert: a free check of exactness.
    base = AutoModelForCausalLM.from_pretrained(members / "base")
    model = proxytune.wrap(base, expert=members / "expert", antiexpert=base)
    model.save_pretrained(tmp_path)
    opened = ProxyTunedModel.from_pretrained(tmp_path)
    assert torch.equal(opened(PROMPT).logits, model(PROMPT).logits)
    torch.testing.assert_close(opened(PROMPT).logits, opened.expert(PROMPT).logits, atol=2e-5, rtol=1e-5)


# --- failing -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["new folder", "new folder in a new folder", "existing folder", "folder with an adapter"])
def target(request: pytest.FixtureRequest, model: ProxyTunedModel, tmp_path: Path) -> Path:
    """A place to save to, in every state that it may be in."""
    folder = tmp_path / "a" / "b" / "kit" if "in a new" in request.param else tmp_path / "kit"
    if request.param == "existing folder":
        folder.mkdir()
        (folder / "notes").mkdir()
        (folder / "README.md").write_text("mine")
    if request.param == "folder with an adapter":
        model.alpha = 0.3
        model.save_pretrained(folder)
        (folder / "config.json").write_text("an older one")
        model.alpha = 0.7
    return folder


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_when_a_move_fails_everything_is_as_it_was(
    model: ProxyTunedModel, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before, replace = snapshot(tmp_path), os.replace
    # A tokenizer that is there already is not written again.
    moves = len(FILES - TOKENIZER if (target / "tokenizer_config.json").exists() else FILES)
    for failing in range(1, moves + 1):
        calls = 0

        def fail(*args: Any, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise error
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(RecipeError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
                model.save_pretrained(target)
        if isinstance(error, OSError):
            assert str(caught.value).startswith("save_pretrained: expected a folder that can be written; got")
            assert "No space left on device" in str(caught.value)
        assert calls >= failing
        assert snapshot(tmp_path) == before
    # One call more than there are files: every one of them was tried above.
    model.save_pretrained(target)
    assert set(snapshot(target)) >= FILES
    assert Recipe.load(target).alpha == 0.7


@pytest.mark.parametrize("function", ["tempfile.mkdtemp", "pathlib.Path.write_text", "shutil.copy2"])
def test_when_the_disk_fails_everything_is_as_it_was(
    model: ProxyTunedModel, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    if function == "shutil.copy2" and not (target / "config.json").exists():
        model.save_pretrained(target)  # only what is replaced is copied first
    before = snapshot(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        with pytest.raises(RecipeError, match="expected a folder that can be written; got .*Permission denied"):
            model.save_pretrained(target)
    assert snapshot(tmp_path) == before


def test_only_the_folder_itself_has_to_be_writable(
    model: ProxyTunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mounted volume: its parent is another disk, and often nobody's to write to. (Root may write everywhere, so the
    # refusal is made here.)
    (tmp_path / "volume").mkdir()
    mkdtemp = tempfile.mkdtemp

    def refuse_outside(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if Path(dir) == tmp_path:
            raise PermissionError(13, "Permission denied", str(dir))
        return mkdtemp(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse_outside)
    model.save_pretrained(tmp_path / "volume")
    assert set(snapshot(tmp_path / "volume")) == FILES


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"note": object()}, "Object of type object is not JSON serializable"),
        ({"temperature": 0.3, "do_sample": False}, "GenerationConfig is invalid"),
    ],
    ids=["no JSON", "invalid"],
)
def test_generation_settings_that_cannot_be_saved(
    model: ProxyTunedModel, target: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    before = snapshot(tmp_path)
    model.generation_config = GenerationConfig()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(RecipeError, match=message):
        model.save_pretrained(target)
    assert snapshot(tmp_path) == before


def test_places_that_are_no_folder(model: ProxyTunedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match=r"save_pretrained: expected a folder; got the file .*/file\. Name a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(RecipeError, match="expected a folder that can be written; got .*/file/kit"):
        model.save_pretrained(tmp_path / "file" / "kit")
    with pytest.raises(RecipeError, match="File name too long"):
        model.save_pretrained(tmp_path / "new" / ("x" * 300))
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(RecipeError, match="Is a directory"):
        model.save_pretrained(tmp_path / "taken")
    assert snapshot(tmp_path) == {"file": b"mine", "taken": None, "taken/config.json": None}


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_a_member_is_not_overwritten(model: ProxyTunedModel, members: Path, role: str) -> None:
    before = snapshot(members)
    match = f"expected a folder that is not a member's; got {members / role}, the {role}'s"
    with pytest.raises(RecipeError, match=re.escape(match)):
        model.save_pretrained(members / role)
    with pytest.raises(RecipeError, match=re.escape(match)):
        model.save_pretrained(members / "expert" / ".." / role)
    assert snapshot(members) == before


def test_uploading_is_not_left_out_silently(model: ProxyTunedModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"got push_to_hub=True\. Call model\.push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path / "kit", push_to_hub=True)
    assert os.listdir(tmp_path) == []


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_duplicate_is_whole_and_independent(
    model: ProxyTunedModel, tmp_path: Path, duplicate: Callable[[ProxyTunedModel], ProxyTunedModel]
) -> None:
    other = duplicate(model)
    assert torch.equal(other(PROMPT).logits, model(PROMPT).logits)
    assert generated(other) == generated(model)
    assert other.recipe == model.recipe
    # What runs is the duplicate's own: changing its weights or α changes it, and not the original.
    want = model(PROMPT).logits
    other.alpha = 5.0
    assert not torch.allclose(other(PROMPT).logits, want)
    other.alpha = 0.7
    with torch.no_grad():
        other.expert.get_input_embeddings().weight.zero_()
    assert not torch.allclose(other(PROMPT).logits, want)
    assert torch.equal(model(PROMPT).logits, want)
    other.save_pretrained(tmp_path)
    assert Recipe.load(tmp_path) == model.recipe
