"""The benchmark of memory at tiny sizes, and what the pages show of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture
def bench() -> Any:
    if str(BENCHES) not in sys.path:
        sys.path.insert(0, str(BENCHES))
    return importlib.import_module("bench_memory")


def test_the_peak_is_compared_with_the_members_alone(bench: Any) -> None:
    record = bench.measure((192, 2), (64, 2), vocabulary=600, prompt=96, chunks=(None, 16), scored=(64, 2048))
    assert set(record) == set(json.loads(bench.RESULTS.read_text(encoding="utf-8")))
    assert [(c["batch"], c["way"], c["chunk"]) for c in record["cells"]] == [
        (batch, way, chunk) for batch in (1, 8) for way in bench.WAYS for chunk in (None, 16)
    ]
    for cell in record["cells"]:
        alone = cell["alone"]
        assert cell["share"] == round(cell["bytes"] / sum(alone.values()), 4)
        # Alone, a member needs more than its weights; together they need all weights, and no more than the three alone.
        assert all(alone[role] > 2 * record["parameters"][role] for role in bench.ROLES)
        assert 2 * sum(record["parameters"].values()) < cell["bytes"] < 1.05 * sum(alone.values())
    chunked = {chunk: [c["bytes"] for c in record["cells"] if c["chunk"] == chunk] for chunk in (None, 16)}
    assert all(parts < whole for parts, whole in zip(chunked[16], chunked[None], strict=True))
    short, long = record["scoring"]
    assert long["whole logits"] == 32 * short["whole logits"] == 2048 * 600 * (3 * 2 + 4)
    assert short["score"] < long["score"] < 16 * short["score"], "caches and one part, not the text's logits"


def test_what_is_shown_is_what_is_kept(bench: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    record = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "memory.json")
    monkeypatch.setattr(bench, "measure", lambda: record)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", "--write"])
    bench.main()
    assert json.loads((tmp_path / "memory.json").read_text(encoding="utf-8")) == record
    assert capsys.readouterr().out == bench.memory_block(record) + "\n" + bench.scoring_block(record) + "\n"
    rows = [line for line in bench.memory_block(record).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + len(bench.WAYS) * 2
    for cell in record["cells"]:
        assert any(f"{cell['share']:.2f}" in row for row in rows if row.startswith(f"| {cell['way']} |"))


def test_the_figures_on_record_are_of_the_sizes_in_the_bench(bench: Any) -> None:
    record = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    assert [record["prompt"], record["vocabulary"], record["threads"]] == [bench.PROMPT, bench.VOCABULARY, 1]
    assert [round(count / 1e6) for count in record["parameters"].values()] == [100, 19, 19]
    assert {c["chunk"] for c in record["cells"]} == set(bench.CHUNKS)
    assert {c["batch"] for c in record["cells"]} == set(bench.BATCHES)
    assert tuple(c["tokens"] for c in record["scoring"]) == bench.SCORED
    # What one part takes, whatever the text: a few hundred megabytes less than its logits.
    first, *_, last = record["scoring"]
    assert last["score"] < 2.5 * first["score"] < last["whole logits"] / 8
    for cell in record["scoring"]:
        assert f"{cell['score'] / 2**20:,.0f}" in bench.scoring_block(record)
