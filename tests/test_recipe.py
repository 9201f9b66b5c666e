"""The recipe file: what is written comes back, what is wrong is refused by name, and folders move along."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxytune
from proxytune.errors import RecipeError
from proxytune.formulas import DExperts, EmulatedFineTuning, ProxyTuning, View
from proxytune.models.config import load_recipe
from proxytune.recipe import FORMAT_VERSION, RECIPE_FILE, ROLES, MemberRef, Recipe

PLAIN: dict[str, Any] = {
    "format_version": 2,
    "base": {"id": "org/large", "revision": None},
    "expert": {"id": "org/small-tuned", "revision": "v2"},
    "antiexpert": {"id": "org/small", "revision": None},
    "formula": "proxy-tuning",
    "alpha": 0.5,
}

NOT_FINITE = "recipe key 'alpha': alpha: expected a finite number .*; got "

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)  # lone surrogates are no UTF-8
references = st.builds(MemberRef, names, st.none() | names)
recipes = st.builds(
    Recipe,
    base=references,
    expert=references,
    antiexpert=references,
    formula=st.sampled_from([f.name for f in (ProxyTuning, DExperts, EmulatedFineTuning)]),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
)


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in PLAIN.items() if k != key}


@pytest.mark.smoke
@given(recipes)
@settings(max_examples=100, deadline=None)
def test_what_is_written_comes_back(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(recipe.dumps())) == recipe


@given(recipes)
@settings(max_examples=30, deadline=None)
def test_what_is_written_to_a_file_comes_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    file = tmp_path_factory.mktemp("recipe") / RECIPE_FILE
    file.write_text(recipe.dumps(), encoding="utf-8")
    # Drawn names are no folders beside the file, except the names of that folder and those above it.
    if any(os.path.isdir(file.parent / ref.id) for ref in recipe.members.values()):
        return
    assert Recipe.load(file) == Recipe.load(file.parent) == Recipe.load(str(file)) == recipe


def test_the_file_is_small_text_that_a_person_can_edit() -> None:
    text = Recipe.from_json(PLAIN).dumps()
    assert json.loads(text) == PLAIN
    assert text.endswith("}\n")
    assert text.count("\n") > len(PLAIN)
    assert "Großmodell/β" in Recipe.from_json(PLAIN | {"base": "Großmodell/β"}).dumps()
    with pytest.raises(ValueError, match="JSON compliant"):  # no NaN literal, which other readers of JSON reject
        Recipe(**{role: MemberRef("x") for role in ROLES}, alpha=float("nan")).dumps()


def test_a_recipe_of_version_1_is_read() -> None:
    assert Recipe.from_json(PLAIN | {"format_version": 1}) == Recipe.from_json(PLAIN)


def test_other_members_views_schedules_and_settings_come_back() -> None:
    data = {
        "format_version": 2,
        "base": {"id": "org/large", "revision": None},
        "expert": {"id": "org/small", "revision": None, "adapter": "org/lora"},
        "antiexpert": {"of": "expert", "adapter": False},
        "formula": "base + 0.5 * (expert - antiexpert) - 0.2 * (no_context - base)",
        "alpha": "linear(1, 0, 64)",
        "members": {"no_context": {"of": "base", "prompt": {"without": ["<context>", "</context>"]}}},
        "settings": {"gate": {"entropy": 0.1}, "plausible": {"of": "base", "share": 0.1}},
        "evidence": {"items": 40},
    }
    recipe = Recipe.from_json(data)
    assert json.loads(recipe.dumps()) == data
    assert recipe.antiexpert == View("expert", adapter=False)
    assert recipe.members.keys() == {"base", "expert"}
    formula = recipe.made_formula()
    assert formula.roles == ("expert", "antiexpert", "no_context")
    assert formula.gate.entropy == formula.mask.share == 0.1


def test_a_bare_string_is_an_id() -> None:
    recipe = Recipe.from_json(PLAIN | {"expert": "org/other"})
    assert recipe.expert == MemberRef("org/other", None)
    assert recipe.members == {"base": recipe.base, "expert": recipe.expert, "antiexpert": recipe.antiexpert}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("data", "message"),
    [
        # The document itself.
        ([], "recipe: expected a JSON object; got list"),
        (None, "recipe: expected a JSON object; got NoneType"),
        ("proxy-tuning", "recipe: expected a JSON object; got str"),
        # The version is told before anything else: a newer format may have other keys.
        (without("format_version"), "recipe format_version: expected a whole number from 1 to 2; got None"),
        (PLAIN | {"format_version": "1"}, "recipe format_version: expected a whole number from 1 to 2; got '1'"),
        (PLAIN | {"format_version": 1.0}, "recipe format_version: expected a whole number from 1 to 2; got 1.0"),
        (PLAIN | {"format_version": True}, "recipe format_version: expected a whole number from 1 to 2; got True"),
        (PLAIN | {"format_version": 0}, "recipe format_version: expected a whole number from 1 to 2; got 0"),
        (
            {"format_version": 3, "temperature": 1},
            "recipe format_version: expected at most 2, the newest that this version of proxytune reads; got 3. "
            "Upgrade proxytune.",
        ),
        # Keys: unknown ones all at once, then missing ones all at once.
        (PLAIN | {"Alpha": 1, "topk": 2}, "recipe: expected only the keys format_version, base, formula, expert, "),
        (PLAIN | {"Alpha": 1, "topk": 2}, "got unknown 'Alpha', 'topk'. Remove or correct them"),
        (without("alpha") | {"format_version": 1}, "; got no alpha. Add them."),
        (without("expert"), "recipe: expected a member for each role of the formula 'proxy-tuning'; got no expert."),
        (PLAIN | {"format_version": 1, "members": {}}, "got unknown 'members'"),
        (PLAIN | {"members": []}, "recipe key 'members': expected an object of members by role, other than base, "),
        (PLAIN | {"members": {"base": "x"}}, "got ['base']. Write e.g."),
        (PLAIN | {"members": {"x": {"of": "base", "promt": 1}}}, "expected only the keys of, prompt, adapter; got "),
        (
            PLAIN | {"settings": {"share": 0.1}},
            "settings of the formula 'proxy-tuning': expected settings that it has",
        ),
        (PLAIN | {"settings": {"gate": {"entropy": -1}}}, "entropy of a Gate: expected a finite number of nats ≥ 0"),
        (PLAIN | {"settings": 3}, "recipe key 'settings': expected an object; got 3"),
        ({"format_version": 1, "alpha": 1}, "; got no base, expert, antiexpert, formula. Add them."),
        (
            {"format_version": 2, "alpha": 1},
            "recipe: expected the keys format_version, base, formula; got no base, formula.",
        ),
        # The formula; also of types that cannot be looked up in a dictionary.
        (PLAIN | {"formula": "damped"}, "recipe key 'formula': expected one of proxy-tuning, "),
        (PLAIN | {"formula": None}, ", or a sum such as 'base + 0.5*(math - small)'; got None"),
        (
            PLAIN | {"formula": ["proxy-tuning"]},
            ", or a sum such as 'base + 0.5*(math - small)'; got ['proxy",
        ),
        (PLAIN | {"formula": {}}, ", or a sum such as 'base + 0.5*(math - small)'; got {}"),
        # α: what JSON can hold and α cannot be.
        (PLAIN | {"alpha": "0.5"}, "recipe key 'alpha': alpha: expected a finite number"),
        (PLAIN | {"alpha": None}, "; got None. Pass e.g. alpha=1.0."),
        (PLAIN | {"alpha": True}, "; got True. Pass e.g. alpha=1.0."),
        (PLAIN | {"alpha": [1.0]}, "; got [1.0]. Pass e.g. alpha=1.0."),
        # Members.
        (PLAIN | {"base": None}, "recipe key 'base': expected a string or an object with an id; got NoneType"),
        (PLAIN | {"base": ["org/large"]}, "recipe key 'base': expected a string or an object with an id; got list"),
        (
            PLAIN | {"expert": {"id": "x", "rev": "v1"}},
            "recipe key 'expert': expected only the keys id, revision, load, adapter; ",
        ),
        (PLAIN | {"expert": {"id": "x", "rev": "v1"}}, "got unknown 'rev'."),
        (
            PLAIN | {"antiexpert": {}},
            "recipe key 'antiexpert': expected a non-empty string as id, and a string or null",
        ),
        (PLAIN | {"antiexpert": {"revision": "v1"}}, "got id=None, revision='v1'. Name a hub id or a folder."),
        (PLAIN | {"base": ""}, "got id='', revision=None."),
        (PLAIN | {"base": {"id": 3}}, "got id=3, revision=None."),
        (PLAIN | {"base": {"id": "x", "revision": 2}}, "got id='x', revision=2."),
    ],
)
def test_what_is_wrong_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_json(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Python's reader takes literals that are no JSON, and numbers that no float holds.
        (json.dumps(PLAIN | {"alpha": float("nan")}), NOT_FINITE + "nan"),
        (json.dumps(PLAIN | {"alpha": float("-inf")}), NOT_FINITE + "-inf"),
        (json.dumps(PLAIN).replace("0.5", "1e999"), NOT_FINITE + "inf"),
        (json.dumps(PLAIN).replace("0.5", "1" * 400), NOT_FINITE + "1{400}"),
        # No JSON at all: with the file's name, and where it breaks.
        ("", r"recipe .*proxytune_config\.json: expected JSON; got Expecting value: line 1 column 1"),
        ("{'alpha': 1}", r"recipe .*proxytune_config\.json: expected JSON; got Expecting property name .* line 1"),
        (json.dumps(PLAIN)[:-5], r"recipe .*proxytune_config\.json: expected JSON; got "),
        (json.dumps(PLAIN) + "}", r"recipe .*proxytune_config\.json: expected JSON; got Extra data"),
        (json.dumps(PLAIN).replace("0.5", "1" * 5000), r"recipe .*proxytune_config\.json: expected JSON; got .*digits"),
        ("[" * 100_000, r"recipe .*proxytune_config\.json: expected JSON; got .*recursion"),
    ],
    ids=["NaN", "-Infinity", "1e999", "400 digits", "empty", "quotes", "cut off", "extra", "5000 digits", "nested"],
)
def test_a_file_that_cannot_be_right(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECIPE_FILE).write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(tmp_path)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_bytes(json.dumps(PLAIN).encode("utf-16"))
    with pytest.raises(RecipeError, match="expected JSON; got 'utf-8' codec can't decode"):
        Recipe.load(tmp_path)


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / RECIPE_FILE, tmp_path / "no" / "such" / "folder"):
        with pytest.raises(
            RecipeError, match=r"recipe: expected a proxytune_config\.json; got no file at " + str(path)
        ):
            Recipe.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="recipe: expected a file that can be read; got .*Not a directory"):
        Recipe.load(tmp_path / "file" / RECIPE_FILE)
    (tmp_path / "twice" / RECIPE_FILE).mkdir(parents=True)
    with pytest.raises(RecipeError, match="recipe: expected a file that can be read; got .*Is a directory"):
        Recipe.load(tmp_path / "twice")


# --- where the members are ---------------------------------------------------------------------------------------


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(json.dumps(PLAIN | changes))
    return folder


@pytest.mark.smoke
def test_a_relative_folder_is_looked_for_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "kit", base="base", expert={"id": "./tuned/", "revision": "v1"}, antiexpert="../small")
    for member in ("kit/base", "kit/tuned", "small", "elsewhere/base"):
        (tmp_path / member).mkdir(parents=True)
    # A folder of the same name in the working directory must not win, and where one stands must not matter.
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = [str(tmp_path / "kit" / "base"), str(tmp_path / "kit" / "tuned"), str(tmp_path / "small")]
    for path in (folder, folder / RECIPE_FILE, Path("..") / "kit"):
        recipe = Recipe.load(path)
        assert [ref.id for ref in recipe.members.values()] == expected
        assert {ref.revision for ref in recipe.members.values()} == {None}  # a folder has no revisions

    (tmp_path / "kit").rename(tmp_path / "moved")
    moved = Recipe.load(tmp_path / "moved")
    assert moved.base.id == str(tmp_path / "moved" / "base")
    assert moved.antiexpert.id == str(tmp_path / "small")


@pytest.mark.parametrize(
    "name",
    [
        "org/large",  # a hub id
        "large",  # one without an owner
        "/no/such/folder",  # an absolute folder that is not there (yet): the message has to name it as it was written
        "./no-such-folder",
        "x" * 300,  # longer than any file name may be
        "a\0b",
    ],
)
def test_what_is_no_folder_beside_the_recipe_is_kept_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "large").write_text("a file is no model")
    folder = write(tmp_path, base={"id": name, "revision": "v3"})
    assert Recipe.load(folder).base == MemberRef(name, "v3")


def test_nothing_is_looked_up_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe from the hub names hub ids; a folder that happens to lie in the working directory is not meant.
    (tmp_path / "org" / "large").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Recipe.from_json(PLAIN).base.id == "org/large"
    assert Recipe.from_json(PLAIN).to_json() == PLAIN


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [".", "../kit", "base/.."])
def test_a_recipe_is_no_member_of_itself(tmp_path: Path, role: str, name: str) -> None:
    folder = write(tmp_path / "kit", **{role: name})
    (folder / "base").mkdir()
    message = f"recipe key '{role}': expected the folder of a model; got the folder of the recipe itself, {folder}"
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.load(folder)


def test_load_recipe_reads_folders_files_and_subfolders(tmp_path: Path) -> None:
    outer, inner = write(tmp_path, alpha=1.0), write(tmp_path / "inner", alpha=2.0)
    assert load_recipe(outer).alpha == load_recipe(outer / RECIPE_FILE).alpha == 1.0
    assert load_recipe(outer, subfolder="inner").alpha == load_recipe(inner, subfolder="").alpha == 2.0
    with pytest.raises(RecipeError, match="got no file at .*/outermost"):
        load_recipe(outer, subfolder="outermost")
    with pytest.raises(RecipeError, match=f"expected a folder or hub id with a {RECIPE_FILE}; got 'no/recipe'"):
        load_recipe("no/recipe", local_files_only=True)


def test_a_recipe_from_the_hub_is_read_with_the_same_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's cache gives a file; what lies beside it there is not the user's.
    cached = write(tmp_path, base="base") / RECIPE_FILE
    (tmp_path / "base").mkdir()
    monkeypatch.setattr("proxytune.models.config.cached_file", lambda name, file, **hub: str(cached))
    assert load_recipe("org/kit").base == MemberRef("base")
    cached.write_text("{")
    with pytest.raises(RecipeError, match="expected JSON; got "):
        load_recipe("org/kit")


def test_it_never_holds_weights_and_is_a_value() -> None:
    recipe = Recipe.from_json(PLAIN)
    assert hash(recipe) == hash(Recipe.from_json(PLAIN))
    assert set(recipe.to_json()) == set(PLAIN)
    assert recipe.to_json()["format_version"] == FORMAT_VERSION
    with pytest.raises(AttributeError):
        recipe.alpha = 2.0  # type: ignore[misc]
    assert proxytune.Recipe is Recipe
