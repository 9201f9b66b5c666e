"""`proxytune check`: the verdict first, what is wrong with what to do, then the figures; and its exit codes."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import proxytune
from proxytune.cli import check


@pytest.fixture
def three(family):
    return [family / name for name in ("large-base", "tiny-tuned", "tiny-base")]


def test_members_that_fit(run, three):
    ended = run("check", *three, "--alpha", 0.5)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == "nothing wrong was found"
    begun = ("vocabulary", "stops at   <|end|> (id 1)", "a token", "shift      KL(expert ‖ antiexpert)", "ends turns")
    for start in (*begun, "refused    no mode"):
        assert any(line.startswith(start) for line in lines), start
    report = json.loads(run("check", *three, "--alpha", 0.5, "--json").out)
    assert (report["ok"], report["verdict"], report["findings"]) == (True, lines[0], [])
    assert f"{report['shift']['pair']:.3g} nats per token" in ended.out
    assert f"{report['cost']['bytes']:.2f} × the bytes of the base alone" in ended.out


def test_files_alone(run, three):
    ended = run("check", *three, "--no-weights")
    assert ended.code == 0
    assert ended.out.splitlines()[0] == "nothing wrong was found; weights were not looked at"
    assert "KL(" not in ended.out


def test_seconds_are_written_as_seconds():
    assert [check._time(x) for x in (0.0028449, 0.9, 1.0, 20.31)] == ["2.84 ms", "900 ms", "1 s", "20.3 s"]


def test_a_problem_stands_first_and_is_an_exit_code(run, three):
    base, expert, antiexpert = three
    ended = run("check", base, antiexpert, expert, "--no-weights")
    assert (ended.code, ended.err) == (1, "")
    verdict, problem, *_ = ended.out.splitlines()
    assert verdict == "1 problem"
    assert re.match("problem: expert and antiexpert look swapped: the antiexpert is '.*tiny-tuned'", problem)
    ended = run("check", base, antiexpert, expert, "--no-weights", "--json")
    assert ended.code == 1
    report = json.loads(ended.out)
    assert (report["ok"], [found["kind"] for found in report["findings"]]) == (False, ["problem"])
    # What the library says in the terms of Python, in those of the command line.
    assert "For the base alone, pass --alpha 0." in run("check", base, expert, expert, "--no-weights").out


def test_a_recipe_has_its_own_alpha_and_end_tokens(run, three, tmp_path):
    base, expert, antiexpert = three
    ending = shutil.copytree(expert, tmp_path / "tiny-ending")
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    model = proxytune.wrap(base, expert=ending, antiexpert=antiexpert, alpha=0.25, end_tokens="expert")
    model.save_pretrained(tmp_path / "recipe")
    own, other = (
        json.loads(run("check", *words, "--json").out)
        for words in (("--recipe", tmp_path / "recipe"), (base, ending, antiexpert, "--alpha", 0.25))
    )
    assert own["findings"] == []
    assert [found["kind"] for found in other["findings"]] == ["note"]
    assert list(own["ends"]) == list(other["ends"]) == ["1", "7"]
    assert own["shift"] == other["shift"]
    ended = run("check", base, ending, antiexpert, "--no-weights")
    assert ended.code == 0
    assert "note: the expert also ends its turn with" in ended.out
    assert "pass --end-tokens union to keep that" in ended.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected BASE, EXPERT, ANTIEXPERT, or --recipe; got none of them"),
        (("a", "b"), "got BASE, EXPERT. Name three models: the antiexpert is what the expert was tuned from"),
        (("a", "b", "c", "--recipe", "r"), "got --recipe and BASE, EXPERT, ANTIEXPERT. Drop one"),
        (("--recipe", "nowhere"), "expected a proxytune_config.json"),
        (("a", "b", "c", "--dtype", "fp32"), "--dtype"),
        (("a", "b", "c", "--device", "abacus"), "--device"),
        (("a", "b", "c", "--alpha", "nan"), "alpha"),
        (("a", "b", "c", "--trust", "me"), "--trust"),
    ],
)
def test_a_wrong_call_is_another_exit_code(run, words, said):
    ended = run("check", *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_recipe_without_its_option_is_named(run, tmp_path):
    (tmp_path / "proxytune_config.json").write_text("{}")
    assert f"Pass --recipe {tmp_path}." in run("check", tmp_path).err
