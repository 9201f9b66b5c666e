"""The benchmark of speculation on hybrids, at a tiny size, and what the page shows of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHES))
    module = importlib.import_module("bench_hybrids")
    for name, value in {"LAYERS": 4, "NEW": 12, "ROUNDS": 1, "ACCEPTED": (0.6,), "PROMPT": 8}.items():
        monkeypatch.setattr(module, name, value)
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    monkeypatch.setattr(module, "SHAPE", {**module.SHAPE, **small})
    monkeypatch.setattr(module, "HIDDEN", 64)
    monkeypatch.setattr(module, "VOCABULARY", 64)
    yield module
    sys.modules.pop("bench_hybrids")


def test_all_models_get_the_same_drafts(bench: Any) -> None:
    cells = bench.measure()
    attention, *hybrids = cells
    assert [cell["model"] for cell in cells] == list(bench.models())
    # Attention reads each round's last token and its drafts, the last round fewer; a hybrid the kept ones again.
    assert attention["tokens"] <= attention["passes"] * (bench.DRAFTED + 1)
    for cell in hybrids:
        assert cell["tokens"] > attention["tokens"]
        assert cell["passes"] >= attention["passes"]
        assert cell["ms a token"] > 0


def test_the_committed_figures_are_shown(bench: Any) -> None:
    record = json.loads((BENCHES / "results" / "hybrids.json").read_text(encoding="utf-8"))
    table = bench.hybrids_table(record)
    for cell in record["cells"]:
        assert f"{cell['to attention'][0]:.2f}×" in table
        assert cell["ms a token"] > 0
    assert len(record["cells"]) == 2 * len(bench.models())
