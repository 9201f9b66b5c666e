"""The throughput script on a tiny set: what it keeps and prints, and that it refuses a GPU that is not there."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.throughput import run as throughput
from proxytune.throughput.shapes import Shape, Trio
from proxytune.throughput.subjects import Cell, random_subject

BENCHES = Path(__file__).resolve().parents[2] / "benches"
TINY = Trio("tiny trio", Shape(96, 1, 2, 2, 64, 80), Shape(64, 1, 2, 1, 48, 72, tied=True))


@pytest.fixture(scope="module", autouse=True)
def _found() -> Iterator[None]:
    sys.path.insert(0, str(BENCHES))
    yield
    sys.path.remove(str(BENCHES))


def bench(name: str) -> Any:
    return importlib.import_module(name)


def plans(size: str = "quick", *rest: Any) -> list[throughput.Plan]:
    cells = (Cell(4, 12), Cell(4, 6, 2))
    build = throughput.Plan(
        lambda: random_subject(TINY, dtype=torch.float32), cells, 2, 0.0, (0.7,), cells[0], lengths=(0, 2)
    )
    return [build] if size == "quick" else [build, build]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return throughput.measure(plans())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: dict[str, Any]) -> Any:
    """The script with a temporary file, and with what was measured once."""
    module = bench("bench_throughput")

    def measure(given: Any, *, keep: Any, **how: Any) -> dict[str, Any]:
        asked.append(how | {"plans": len(given)})
        keep(measured)
        return measured

    module.asked = asked = []
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "throughput.json")
    monkeypatch.setattr(module, "cpu_plans", plans)
    monkeypatch.setattr(module, "gpu_plans", plans)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


def test_the_script_writes_what_it_prints(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--write", "--quick"])
    record = json.loads(script.RESULTS.read_text())
    assert capsys.readouterr().out == script.throughput_table(record) + "\n"
    assert record["gpu"] == {"status": "not run", "reason": "no CUDA device"}
    assert [family["name"] for family in record["cpu"]["families"]] == ["tiny trio"]
    assert [len(one["speculation"]) for one in record["floors"]] == [4, 4, 4]
    script.main(["--markdown"])
    assert capsys.readouterr().out == script.throughput_table(record) + "\n"
    text = script.throughput_table(record)
    assert "nan" not in text
    assert "On a GPU: not run (no CUDA device)." in text
    for block in text.split("\n\n"):
        assert len({row.count("|") for row in block.split("\n") if row.startswith("|")}) <= 1


def test_without_write_nothing_is_kept(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--quick"])
    assert not script.RESULTS.exists()
    assert "| fused loop |" in capsys.readouterr().out


def test_a_gpu_is_not_made_up(script: Any) -> None:
    with pytest.raises(SystemExit, match="expected a CUDA device; got none"):
        script.main(["--write", "--gpu"])
    assert not script.RESULTS.exists()


def test_the_gpu_part_keeps_the_cpu_part_and_has_a_deadline(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write("cpu", {"status": "not run", "reason": "a test"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    script.main(["--write", "--gpu"])
    record = json.loads(script.RESULTS.read_text())
    assert record["cpu"] == {"status": "not run", "reason": "a test"}
    assert record["gpu"]["families"][0]["name"] == "tiny trio"
    (how,) = script.asked
    assert how["gpu"] is True
    assert how["deadline"] < 600


def test_figures_are_kept_after_each_family_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure_family", lambda plan, **how: {"name": plan.cells[0].name})
    kept: list[Any] = []
    throughput.measure(plans("full"), keep=lambda so_far: kept.append((len(so_far["families"]), so_far["left_out"])))
    assert kept == [(1, 1), (2, 0)]
    assert throughput.measure(plans("full"), deadline=-1.0)["left_out"] == 2


def test_published_shapes_are_the_gpu_part_s_and_fit_its_memory() -> None:
    names = []
    for plan, trio in zip(throughput.gpu_plans(device="meta"), bench("bench_throughput").PUBLISHED, strict=True):
        names.append(trio.name)
        untied = [replace(shape, tied=False) for shape in (trio.base, trio.small)]
        base, small = (
            2 * shape.build(dtype=torch.bfloat16, device="meta").num_parameters() / 2**30 for shape in untied
        )
        rows = max(cell.rows * (cell.prompt + cell.new) for cell in plan.cells)
        cache = (
            rows
            * 2
            * 2
            / 2**30
            * sum(
                n * shape.layers * shape.key_heads * (shape.width // shape.heads)
                for n, shape in ((1, trio.base), (2, trio.small))
            )
        )
        assert base + 2 * small + cache < 76, trio.name  # of 78 GiB; logits and activations are small beside it
    assert names == ["13B + 7B + 7B", "32B + 1.5B + 1.5B", "8B + 1B + 1B"]


def test_the_full_set_has_the_protocol_s_lines() -> None:
    lab = throughput.cpu_plans("full")[0].cells
    assert [(c.prompt, c.new, c.rows) for c in lab] == [
        (8, 504, 1), (504, 8, 1), (8, 8, 1), (8, 128, 8), (8, 128, 32), (8, 128, 1),
    ]  # fmt: skip
    assert [(c.prompt, c.new, c.rows) for c in throughput.gpu_plans("full")[0].cells][:2] == [(8, 512, 1), (512, 8, 1)]


# --- the committed record ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> Any:
    return json.loads((BENCHES / "results" / "throughput.json").read_text(encoding="utf-8"))


def test_the_record_has_all_families_methods_and_lines(committed: Any) -> None:
    assert committed["cpu"]["status"] == "run"
    assert committed["gpu"]["status"] in ("run", "not run")
    assert [family["name"] for family in committed["cpu"]["families"]] == ["lab", "13 : 7 : 7", "32 : 1.5 : 1.5"]
    for family in committed["cpu"]["families"]:
        assert len(family["cells"]) == 6
        for cell in family["cells"]:
            assert cell["rounds"] >= 2
            for name in ("base alone", "tuned alone", "expert alone", "naive loop", "processor door", "fused loop"):
                found = cell["methods"][name]
                for key in ("over_tuned", "over_members", "over_floor"):
                    assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
            for name, found in cell["methods"].items():
                if found["status"] == "run" and found["kind"] == "steered":
                    assert found["mb_per_token"] == pytest.approx(found["floor_mb_per_token"], rel=0.02), name
        assert family["drafting"]["lines"]


def test_the_committed_floors_are_those_of_the_shapes(committed: Any) -> None:
    script = bench("bench_throughput")
    assert committed["floors"] == [script.published_floors(trio, script.RATES) for trio in script.PUBLISHED]


def test_tokens_per_round_of_the_record_are_those_of_the_cost_model(committed: Any) -> None:
    for family in committed["cpu"]["families"]:
        for line in family["drafting"]["lines"]:
            tokens = line["tokens_per_round"]
            assert tokens["measured"] == pytest.approx(tokens["predicted"], rel=0.2), (family["name"], line)
