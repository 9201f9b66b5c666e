"""The first page: its two commands, its length, and the order in which a person meets things."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib

from _pages.code import ROOT, blocks_of

from proxytune.demo.bundle import bundled_record

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_its_first_code_has_six_lines_and_the_recorded_alpha() -> None:
    code = next(block.code for block in blocks_of(README) if block.language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    assert f"alpha={bundled_record()['alpha']}," in code


def test_two_commands_make_their_own_environment() -> None:
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


def test_the_gate_runs_the_readme_s_test_command() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    expression = re.search(r"sed -n 's/(.*)/\\1/p' README\.md", gate)[1]
    found = subprocess.run(
        ["sed", "-n", f"s/{expression}/\\1/p", "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = found.stdout.splitlines()
    assert command.endswith("&& .venv/bin/pytest -n 2")
    assert ".venv-ci/bin/pytest -n" not in gate, "the gate has a test command of its own"
