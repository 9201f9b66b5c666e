"""`python -m lab`: quick help, the table, and a training run that is killed and continued."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from lab.__main__ import app
from typer import rich_utils
from typer.testing import CliRunner

from proxytune.errors import LabError

BENCHES = Path(__file__).resolve().parents[3] / "benches"
PAGE = BENCHES / "README.md"


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lab.__main__ import app\n"
        "for arguments in (['--help'], ['train', '--help'], ['studies', '--help'],\n"
        "                  ['puzzles', '--help'], ['table', '--help']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'accelerate') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=BENCHES, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_leaves_nothing_out_and_the_page_names_real_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 400)  # no line is broken
    found = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in found.items():
        shown = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
        for parameter in command.params:
            assert " ".join((parameter.help or "").split()) in shown, (name, parameter.name)
    named = re.findall(r"^python -m lab (\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert named
    assert set(named) <= set(found)


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lab", "table", "--help"]
    ran = subprocess.run(command, cwd=BENCHES, capture_output=True, text=True, check=True)
    assert "Usage: python -m lab table" in ran.stdout


def test_no_command_prints_the_help() -> None:
    ended = CliRunner().invoke(app, [])
    assert ended.exit_code == 2
    assert "Usage: " in ended.output


def test_table_of_the_bundled_family() -> None:
    result = CliRunner().invoke(app, ["table", "--problems", "3"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("base, 0-shot", "base, 3-shot", "antiexpert alone", "expert alone", "proxy", "tuned directly", "gap"):
        assert name in result.stdout


def test_table_as_json_at_a_chosen_alpha() -> None:
    arguments = ["table", "--problems", "2", "--split", "validation", "--alpha", "0", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    record = json.loads(result.stdout)
    assert (record["split"], record["alpha"]) == ("validation", 0.0)
    scores = {row["name"]: row["scores"] for row in record["rows"]}
    assert scores["proxy, alpha 0"] == scores["base, 0-shot"]  # at alpha 0 the proxy is the base


def test_table_without_a_family_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"Finish the training \(see benches/README\.md"):
        CliRunner().invoke(app, ["table", "--family", str(tmp_path)], catch_exceptions=False)
