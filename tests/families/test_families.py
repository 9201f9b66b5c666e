"""A dozen families in every role, against what is on record: right stays right, and a refusal keeps its reason.

All of them: `python tests/families/matrix.py -j 2 --out tests/families/results/transformers-VERSION.json`.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from families.matrix import ROLES, family
from families.record import FOLDER, compact, modes_of, read
from families.tiny_models import names

# Every kind of layer, alone and mixed, and every family that keeps its states in a way of its own.
GATE = (
    *("deepseek_v32", "falcon_h1", "gemma3n_text", "granitemoehybrid", "jamba", "lfm2", "llama4_text", "mamba"),
    *("mamba2", "minimax", "nemotron_h", "qwen3_next", "zamba2"),
)
MODES = ("greedy", "forks", "speculation")
RECORD = FOLDER / f"transformers-{transformers.__version__}.json"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    if not RECORD.exists():
        pytest.skip(f"no record of transformers {transformers.__version__}")
    return read(RECORD)["names"]


@pytest.mark.parametrize("name", GATE)
def test_a_family_does_what_is_on_record(record: dict[str, Any], name: str) -> None:
    if name not in record:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    found = compact(family(name, modes=MODES, alone=False))["roles"]
    for role in ROLES:
        for mode in MODES:
            got, want = modes_of(found[role], mode), modes_of(record[name]["roles"][role], mode)
            assert got == want, f"{name}, {role}, {mode}"


def test_every_name_is_on_record(record: dict[str, Any]) -> None:
    assert set(names()) == set(record)


def test_only_what_is_wrong_by_itself_is_wrong_or_crashes(record: dict[str, Any]) -> None:
    by_itself = {"run", "causal", "single", "several", "short", "greedy"}
    bad = [
        (name, role, outcome, modes)
        for name, result in record.items()
        for role, cells in result.get("roles", {}).items()
        for outcome in cells.keys() & {"wrong", "crashed"}
        for modes in cells[outcome].values()
        if not ({"static"} if modes == "static" else by_itself) & set(result["alone"])
    ]
    assert not bad
