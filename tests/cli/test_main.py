"""The front of the command line: quick help, and errors of one line with the right exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer import rich_utils

import proxytune
from proxytune.cli import app, doctor
from proxytune.errors import InputError

HELPS = (
    ["--help"],
    ["-h"],
    ["demo", "--help"],
    ["generate", "--help"],
    ["doctor", "--help"],
    ["sample", "--help"],
    ["calibrate", "--help"],
    ["check", "--help"],
)


@pytest.mark.smoke
@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_names_its_options_without_importing_torch(words):
    program = (
        "import sys\n"
        "from proxytune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: proxytune" in ran.stdout
    assert "--help" in ran.stdout


def commands(group: typer.core.TyperGroup, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def test_help_leaves_nothing_out_of_what_options_say(run, monkeypatch):
    # Wide, so that no line is broken; what stands in brackets would be taken for markup, and vanish.
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 400)
    found = dict(commands(typer.main.get_command(app)))
    assert {("sample",), ("generate",)} <= found.keys()
    for words, command in found.items():
        shown = " ".join(run(*words, "--help").out.split())
        for parameter in command.params:
            assert " ".join((parameter.help or "").split()) in shown, (words, parameter.name)


def test_help_imports_few_modules():
    """It answers at once because it imports little; a count, since a time depends on what else the machine does."""
    program = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "from proxytune.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0, ended.code\n"
        "print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = json.loads(ran.stderr)
    # 387, of which 21 are the package's own; typer, rich and what they import take the others.
    assert len(imported) <= 400, imported
    own = [name for name in imported if name.split(".")[0] == "proxytune"]
    assert len(own) <= 22, own
    heavy = {"torch", "transformers", "numpy", "accelerate", "triton", "safetensors", "tokenizers", "matplotlib"}
    assert heavy.isdisjoint(imported)


def test_the_version_is_the_package_s(run):
    assert run("--version").out.split() == ["proxytune", proxytune.__version__]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nope"], "--nope"),
        (["generate", "--nope"], "--nope"),
        (["demo", "--problems", "0"], "--problems"),
        (["demo", "--problems", "many"], "--problems"),
        (["dmeo"], "dmeo"),
        (["demo", "extra"], "extra"),
        (["sample", "x", "--branches"], "--branches"),
        (["sample", "x", "--where", "there"], "--where"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(run, words, expected):
    ended = run(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("error: ")
    assert expected in ended.err
    # The help of the command that was called; of the program, where none was.
    command = f"proxytune {words[0]}" if words[0] in ("generate", "demo", "sample") else "proxytune"
    assert ended.err.endswith(f" (see {command} --help)\n")


def test_no_command_prints_the_help(run):
    ended = run()
    assert ended.code == 2
    assert "Usage: proxytune" in ended.out
    assert ended.err == ""


def _raises(error):
    def examine():
        raise error

    return examine


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError.of("x", expected="a", got="b", remedy="Do c."), 2),
        (OSError("no space\nleft"), 1),
        (RuntimeError("out of memory"), 1),
        (ValueError("odd"), 1),
    ],
)
def test_errors_become_one_line_and_a_traceback_only_with_debug(run, monkeypatch, error, code):
    monkeypatch.setattr(doctor, "examine", _raises(error))
    ended = run("doctor")
    assert ended.code == code
    assert ended.err.count("\n") == 1
    for word in str(error).split():
        assert word in ended.err
    # --debug lets it through, before and after the command's name.
    for words in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(type(error)):
            proxytune.cli.main(words)


def test_a_bug_is_not_dressed_up_as_a_wrong_call(monkeypatch):
    monkeypatch.setattr(doctor, "examine", _raises(KeyError("bug")))
    with pytest.raises(KeyError):
        proxytune.cli.main(["doctor"])


def test_a_long_error_is_not_broken_into_lines(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(doctor, "examine", _raises(InputError("word " * 100)))
    assert run("doctor").err.count("\n") == 1


def test_text_in_square_brackets_is_no_markup(run, monkeypatch):
    monkeypatch.setattr(doctor, "examine", _raises(InputError("got [bold]x[/bold] and [/nothing]")))
    assert "[bold]x[/bold] and [/nothing]" in run("doctor").err


def test_a_word_after_two_dashes_is_no_option(run):
    # The prompt '--debug' is a prompt there; the call fails for want of models, which it says.
    assert "--base" in run("generate", "--", "--debug").err
