"""`proxytune lab`: quick help, the table, and a training run that is killed and continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxytune.cli.lab import app
from proxytune.errors import LabError


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from proxytune.cli.lab import app\n"
        "for arguments in (['--help'], ['train', '--help'], ['studies', '--help'],\n"
        "                  ['puzzles', '--help'], ['table', '--help']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'accelerate') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


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
    with pytest.raises(LabError, match="proxytune lab train"):
        CliRunner().invoke(app, ["table", "--family", str(tmp_path)], catch_exceptions=False)
