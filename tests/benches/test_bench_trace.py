"""The bench of recordings: it measures two generations of one text, and prints what it keeps."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune import FusedDecoding
from proxytune.throughput.shapes import Shape, Trio
from proxytune.throughput.subjects import Cell, random_subject

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHES))
    yield importlib.import_module("bench_trace")
    sys.modules.pop("bench_trace")


def test_both_doors_are_compared(bench: Any) -> None:
    shape = Shape(128, 2, 4, 2, 96, 97)
    subject = random_subject(Trio("tiny", shape, Shape(96, 1, 4, 4, 64, 90, tied=True)), dtype=torch.float32)
    cells = {
        name: bench.compare(subject, loop, 2, Cell(5, 6))
        for name, loop in (("generate", None), ("fused", FusedDecoding(seed=0)))
    }
    for cell in cells.values():
        assert 0 < cell["low"] <= cell["value"] <= cell["high"]
    machine = {"torch": "2.13.0", "load": 0.5}
    table = bench.trace_table({"families": {"tiny": cells}, "rounds": 2, "machine": machine})
    assert f"| tiny | {cells['generate']['value']:.3f} [" in table


def test_the_committed_figures_are_shown(bench: Any) -> None:
    record = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    table = bench.trace_table(record)
    for cells in record["families"].values():
        for cell in cells.values():
            assert f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in table
