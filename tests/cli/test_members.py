"""Members that the command line treats with care: an expert with end tokens of its own, and code of a member's own."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from typing import get_args

import pytest
from transformers import AutoTokenizer

import proxytune
from proxytune.cli.options import EndTokensOption
from proxytune.recipe import RECIPE_FILE, EndTokens, Recipe

PROMPT = "Question: Who"
LENGTH = 8
SAID = r"warning: the expert also ends its turn with [^\n]*\. Nothing is wrong: pass --end-tokens union to keep that"

pytestmark = pytest.mark.filterwarnings("default")  # they are shown, as for a user


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- where a text stops ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ending(family, tmp_path_factory):
    """Members whose expert ends its turn with a token of its own, as options; and after how many tokens it comes."""
    base, antiexpert = family / "large-base", family / "tiny-base"
    model = proxytune.wrap(base, expert=family / "tiny-tuned", antiexpert=antiexpert)
    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")["input_ids"]
    text = model.generate(ids, do_sample=False, max_new_tokens=LENGTH)[0, ids.shape[1] :].tolist()
    place = next(i for i, token in enumerate(text) if i > 1 and token not in text[:i])
    assert place + 1 < LENGTH == len(text)
    expert = shutil.copytree(family / "tiny-tuned", tmp_path_factory.mktemp("ending") / "expert")
    edit(expert / "generation_config.json", eos_token_id=text[place])
    return ["--base", base, "--expert", expert, "--antiexpert", antiexpert], place + 1


def lengths(ended):
    """How many tokens the texts of a call have."""
    if measured := re.search(r"measured +(\d+) tokens in (\d+) texts", ended.out):
        return [int(measured[1]) / int(measured[2])]
    return [leaf["tokens"] for line in ended.lines for leaf in line.get("leaves", [line])]


CALLS = {
    "generate": ("generate", PROMPT, f"max_new_tokens={LENGTH}"),
    "speculation": ("generate", PROMPT, "--speculate", f"max_new_tokens={LENGTH}"),
    "samples": (
        *("sample", PROMPT, "--no-forks", "--branches", 2, "--json"),
        *(f"max_new_tokens={LENGTH}", "temperature=0.001"),
    ),
    "a tree": (
        *("sample", PROMPT, "--where", "start", "--branches", 1, "--json"),
        *(f"max_new_tokens={LENGTH}", "temperature=0.001"),
    ),
    "calibrate": (
        *("calibrate", PROMPT, "--samples", 32, "--temperature", 0.001, "--max-new-tokens", LENGTH),
        *("--share", 0.5),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_text_stops_where_the_expert_ends_its_turn_which_is_said_once(run, ending, call):
    members, length = ending
    ended = run(*CALLS[call], *members)
    assert ended.code == 0, ended.err
    assert set(lengths(ended)) == {length}
    assert len(re.findall(SAID, ended.err)) == ended.err.count("end-tokens union") == 1, ended.err
    for wanted, there in (("union", length), ("expert", length), ("base", LENGTH)):
        ended = run(*CALLS[call], *members, "--end-tokens", wanted)
        assert ended.code == 0, ended.err
        assert "end-tokens" not in ended.err
        assert set(lengths(ended)) == {there}, wanted


def test_a_recipe_keeps_where_texts_stop_until_the_option_says_otherwise(run, ending, tmp_path):
    members, length = ending
    kit, out = tmp_path / "kit", tmp_path / "out.jsonl"
    call = CALLS["generate"]
    assert "end-tokens" in run(*call, *members, "--save-recipe", kit).err
    assert Recipe.load(kit).end_tokens == "union"
    ended = run(*call, "--recipe", kit, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(out.read_text())["tokens"] == length
    # The other end tokens are no continuation of that run.
    ended = run(*call, "--recipe", kit, "--out", out, "--resume", "--end-tokens", "base")
    assert ended.code == 2
    assert '--resume with recipe.end_tokens: expected "union", with which' in ended.err
    for recipe in (kit, kit / RECIPE_FILE):
        ended = run(*call, "--recipe", recipe, "--end-tokens", "base")
        assert (ended.code, ended.err, lengths(ended)) == (0, "", [LENGTH])


def test_the_options_words_are_the_recipe_s():
    option = get_args(EndTokensOption)[0]
    assert [word for kind in get_args(option) for word in get_args(kind)] == list(get_args(EndTokens))


# --- code of a member's own -----------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Unread(io.StringIO):
    """A stdin that nobody may read."""

    def read(self, *_):
        raise AssertionError("stdin was read")

    readline = readlines = __next__ = read

    def isatty(self):
        return True


@pytest.fixture
def own(family, tmp_path, monkeypatch):
    """A folder with members, each as it is and with code that leaves the file `marker` when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", Unread())
    for role, member in (("base", "large-base"), ("expert", "tiny-tuned"), ("antiexpert", "tiny-base")):
        (tmp_path / role).symlink_to(family / member)
        folder = shutil.copytree(family / member, tmp_path / f"own-{role}")
        (folder / "modeling_own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
        code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        edit(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(**members):
    family = {role: role for role in ("base", "expert", "antiexpert")} | members
    return [word for role, name in family.items() for word in (f"--{role}", name)]


def refused(ended, role, got, flag=None):
    """Refused by name, with the file and the option; and nothing ran."""
    assert ended.code == 2
    assert re.fullmatch(
        rf"(warning: [^\n]*\n)?error: the {role}: expected [^\n]*; got '[^']*{got}', which would run modeling_own.py "
        rf"of its own. Read that file first. If you trust it, pass --trust {flag or role}[.,][^\n]*\n",
        ended.err,
    ), ended.err
    assert ended.out == ""


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_code_of_a_member_s_own_runs_with_the_option_alone(run, own, role):
    call = ("generate", PROMPT, "max_new_tokens=2", *options(**{role: f"own-{role}"}))
    another = "base" if role != "base" else "expert"
    for given in ((), ("--trust", another)):
        refused(run(*call, *given), role, f"own-{role}")
        assert not (own / "marker").exists()
    plain = run("generate", PROMPT, "max_new_tokens=2", *options())
    ended = run(*call, "--trust", another, "--trust", role, "--save-recipe", "kit")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == plain.out
    # A recipe vouches for no folder.
    (own / "marker").unlink()
    call = ("generate", PROMPT, "max_new_tokens=2", "--recipe", "kit")
    refused(run(*call), role, f"own-{role}")
    assert not (own / "marker").exists()
    assert run(*call, "--trust", "all").out == plain.out


def test_sample_and_calibrate_have_the_option_too(run, own):
    for call in (
        ("sample", PROMPT, "--no-forks", "--branches", 1, "max_new_tokens=2", *options(base="own-base")),
        ("calibrate", PROMPT, *options(base="own-base")),
        ("calibrate", PROMPT, "--base", "own-base"),
    ):
        refused(run(*call), "base", "own-base")
        assert not (own / "marker").exists()
    assert run("calibrate", PROMPT, "--samples", 8, "--base", "own-base", "--trust", "base").code == 0


def test_a_tokenizer_with_code_of_its_own(run, own):
    shutil.copytree(own / "base", own / "own-tokenizer")
    (own / "own-tokenizer" / "modeling_own.py").write_text(CODE.format(marker=str(own / "marker")))
    code = {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}
    edit(own / "own-tokenizer" / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=code)
    call = ("generate", PROMPT, "max_new_tokens=2", *options(base="own-tokenizer"))
    refused(run(*call), "base's tokenizer", "own-tokenizer", "base")
    assert not (own / "marker").exists()
    ended = run(*call, "--trust", "base")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == run("generate", PROMPT, "max_new_tokens=2", *options()).out


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_recipe_of_another_name_is_the_one_that_is_opened(run, family, tmp_path):
    members = {"base": "large-base", "expert": "tiny-tuned", "antiexpert": "tiny-base"}
    named = [word for role, name in members.items() for word in (f"--{role}", family / name)]
    call = ("generate", PROMPT, "max_new_tokens=6")
    expected = {alpha: run(*call, *named, "--alpha", alpha).out for alpha in (0, 2)}
    assert expected[0] != expected[2]
    assert run(*call, *named, "--alpha", 0, "--save-recipe", tmp_path).code == 0
    shutil.copy(tmp_path / RECIPE_FILE, tmp_path / "strong.json")
    edit(tmp_path / "strong.json", alpha=2.0)
    assert run(*call, "--recipe", tmp_path).out == expected[0]
    assert run(*call, "--recipe", tmp_path / "strong.json").out == expected[2]


@pytest.mark.parametrize("setting", ["temperature=2", "repetition_penalty=2", "top_p=1"])
def test_a_whole_number_is_a_number(run, family, ending, setting):
    members, _ = ending
    for call in (("sample", "--no-forks", "--branches", 1), ("generate", "do_sample=true")):
        ended = run(call[0], PROMPT, *members, *call[1:], setting, "max_new_tokens=2", "--end-tokens", "base")
        assert (ended.code, ended.err) == (0, "")
