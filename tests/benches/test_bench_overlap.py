"""The benchmark of members at the same time, at tiny sizes, and what the README shows of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHES))
    module = importlib.import_module("bench_overlap")
    shape = (2, 16, 32, 2, 1, 600)
    monkeypatch.setattr(module, "FAMILIES", {"tiny": (shape, shape)})
    monkeypatch.setattr(module, "ROUNDS", 2)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    sys.modules.pop("bench_overlap")


def test_every_way_takes_the_same_steps(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    model = bench.model
    monkeypatch.setattr(bench, "model", lambda *args: made.append(model(*args)) or made[-1])
    calls: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        original = torch.nn.Embedding.forward

        def counted(self: Any, ids: torch.Tensor) -> torch.Tensor:
            calls.append(next(i for i, m in enumerate(made) if m.get_input_embeddings() is self))
            return original(self, ids)

        monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
        cell = bench.threads_cell("tiny", "float32", 2, pool, 2)
    assert list(cell["ways"]) == ["in turn, 2 threads", "in turn, 1 thread", "split", "shared"]
    # The prompt, and in each of 3 rounds each of 4 ways: one step to warm up and those that are timed.
    assert [calls.count(i) for i in range(3)] == [1 + 3 * 4 * (1 + bench.STEPS)] * 3
    assert all(way["ms"] > 0 for way in cell["ways"].values())
    assert cell["ways"]["in turn, 2 threads"]["ratio"] == [1, 1, 1]


def test_stacked_products_are_the_same_ones(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: dict[str, Any] = {}
    monkeypatch.setattr(bench, "measured", lambda given, steps: ways.update(given) or {})
    seen: dict[str, list[torch.Tensor]] = {"one": [], "both": []}
    linear, bmm = bench.linear, torch.bmm
    monkeypatch.setattr(bench, "linear", lambda x, w: seen["one"].append(linear(x, w)) or seen["one"][-1])
    monkeypatch.setattr(torch, "bmm", lambda x, w: seen["both"].append(bmm(x, w)) or seen["both"][-1])
    bench.stacking_cell("tiny", "float32", 3)
    for way in ways.values():
        way()
    assert len(seen["both"]) == 2 * 7 + 1
    first, second = seen["one"][: len(seen["both"])], seen["one"][len(seen["both"]) :]
    for one, other, both in zip(first, second, seen["both"], strict=True):
        torch.testing.assert_close(torch.stack([one, other]), both)


def test_the_ratio_is_that_of_the_medians(bench: Any) -> None:
    first = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert bench.ratio([2 * x for x in first], first) == (2, 2, 2)  # the rounds are paired
    middle, low, high = bench.ratio([1.0, 9.0, 1.0, 9.0, 9.0], [3.0] * 5)
    assert middle == 3
    assert low == pytest.approx(1 / 3)
    assert high == 3


def test_the_readme_s_table_has_all_cells_of_the_record(bench: Any) -> None:
    record = json.loads((BENCHES / "results" / "overlap.json").read_text(encoding="utf-8"))
    table = bench.overlap_table(record)
    assert len(record["threads_cells"]) == len(record["stacking_cells"]) == 10
    rows = [line for line in table.splitlines() if line.startswith("| ") and "×" in line]
    for row, cell in zip(rows, record["threads_cells"], strict=True):
        assert row.count("×") == 4
        assert f"| {cell['ways']['in turn, 2 threads']['ms']:,.1f} |" in row
