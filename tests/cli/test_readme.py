"""The README says what is so: its code prints what it shows, its figures are those on record, its commands are real."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from proxytune.demo.bundle import bundled_record

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCE.findall(README)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("readme_bench", ROOT / "benches" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("which", ["proxy", "base"])
def test_the_first_code_prints_what_stands_below_it(which):
    (_, code), (_, proxy), (_, base) = BLOCKS[1:4]
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    assert f"alpha={bundled_record()['alpha']})" in code
    if which == "base":
        code = re.sub(r"alpha=[\d.]+", "alpha=0.0", code)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == (proxy if which == "proxy" else base).strip()
    assert proxy != base


def test_the_figures_are_of_the_bundled_weights(bench):
    assert len(bench.weights()) == 4
    assert bench.load("demo.json")["weights"] == bench.weights()


def test_the_figures_are_those_on_record(bench):
    assert bench.filled(README) == README


def test_an_edited_figure_is_noticed(bench):
    position = README.index("<!-- end -->") - 2
    edited = README[:position] + "9" + README[position:]
    assert bench.filled(edited) == README


def test_an_unknown_block_is_refused(bench):
    with pytest.raises(SystemExit, match="nonsense"):
        bench.filled("<!-- generated: nonsense -->\n\n<!-- end -->")


def test_two_commands_make_their_own_environment():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(commands) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command, last in zip(commands, (".venv/bin/proxytune demo", ".venv/bin/pytest -n 2"), strict=True):
        make, install, then = command.split(" && ")
        assert make == "python3 -m venv .venv"
        words = shlex.split(install)
        assert words[:2] == [".venv/bin/pip", "install"]
        assert words[words.index("-c") + 1] == "constraints.txt"
        wanted = re.search(r"\[(.*)\]", words[-1])
        assert wanted is None or set(wanted[1].split(",")) <= set(extras)
        assert then == last


def test_the_gate_runs_the_readme_s_test_command():
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    expression = re.search(r"sed -n 's/(.*)/\\1/p' README\.md", gate)[1]
    found = subprocess.run(
        ["sed", "-n", f"s/{expression}/\\1/p", "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = found.stdout.splitlines()
    assert command.endswith("&& .venv/bin/pytest -n 2")
    assert ".venv-ci/bin/pytest -n" not in gate, "the gate has a test command of its own"


def test_all_its_python_parses():
    for language, code in BLOCKS:
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("command", re.findall(r"^proxytune (\w+.*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_every_option_it_names_exists(run, command):
    words = shlex.split(command)
    helped = run(words[0], "--help")
    assert helped.code == 0
    for word in words[1:]:
        if word.startswith("--"):
            assert word in helped.out
