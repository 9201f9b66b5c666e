"""The benchmark of the kernels at tiny sizes: the form of what it keeps, and the GPU part's logic without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture(scope="module", autouse=True)
def _found() -> Iterator[None]:
    sys.path.insert(0, str(BENCHES))
    yield
    sys.path.remove(str(BENCHES))


def bench(name: str) -> Any:
    return importlib.import_module(name)


def tiny() -> dict[str, Any]:
    return bench("bench_kernels").measure_cpu((1500,), (1, 2), (torch.bfloat16,), rounds=3, target_ms=0.1)


def test_the_cpu_part_has_its_form_and_is_shown() -> None:
    part = tiny()
    assert part["status"] == "run"
    assert [(c["case"], c["rows"]) for c in part["cells"]] == [
        (case, rows) for rows in (1, 2) for case in ("statistics", "temperature draw", "k50 + p.9", "greedy")
    ]
    for cell in part["cells"]:
        assert cell["width"] == 1500
        assert cell["dtype"] == "bfloat16"
        assert set(cell["ms"]) == set(cell["peak_extra"]) == {"proxytune", *cell["times_ours"]}
        assert all(ms > 0 for ms in cell["ms"].values())
        for ratio in cell["times_ours"].values():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    shown = bench("bench_kernels").kernels_table(
        {"cpu": part, "gpu": {"status": "not run", "reason": "no CUDA device"}}
    )
    assert shown.count("1,500") == 8
    assert shown.endswith("On a GPU: not run (no CUDA device).")


def test_the_script_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = bench("bench_kernels")
    monkeypatch.setattr(kernels, "RESULTS", tmp_path / "kernels.json")
    monkeypatch.setattr(kernels, "measure_cpu", lambda: {"status": "not run", "reason": "a test"})
    mixtures = kernels.measure_mix(tiny_mixtures(), 3, 0.1)
    monkeypatch.setattr(kernels, "measure_mix", lambda: mixtures)
    verified = kernels.measure_verify(tiny_rounds(), 3, 0.1)
    monkeypatch.setattr(kernels, "measure_verify", lambda: verified)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.main(["--write"])
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["gpu"] == {"status": "not run", "reason": "no CUDA device"}
    assert capsys.readouterr().out == kernels.kernels_table() + "\n"
    # The mixtures alone replace the mixtures, and the GPU part alone keeps the CPU part.
    kernels.main(["--write", "--mix"])
    said = "Measured now: mixtures of embeddings, on the CPU. The other rows are as kept in kernels.json, of an earlier"
    assert capsys.readouterr().out.startswith(said)
    assert json.loads((tmp_path / "kernels.json").read_text()) == record
    assert record["cpu"]["mix"] == mixtures
    kernels.main(["--write", "--verify"])
    assert json.loads((tmp_path / "kernels.json").read_text()) == record
    assert record["cpu"]["verify"] == verified
    monkeypatch.setattr(kernels, "measure_cpu", lambda: pytest.fail("not asked for"))
    with pytest.raises(SystemExit, match="bench_kernels --gpu: expected a CUDA device; got none"):
        kernels.main(["--write", "--gpu"])
    assert json.loads((tmp_path / "kernels.json").read_text()) == record
    # What a GPU once gave is not lost where there is none.
    monkeypatch.setattr(kernels, "measure_cpu", lambda: {"status": "not run", "reason": "another test"})
    monkeypatch.setattr(kernels, "_gpu_table", lambda part: f"GPU: {part['cells']}")
    (tmp_path / "kernels.json").write_text(json.dumps(record | {"gpu": {"status": "run", "cells": [7]}}))
    capsys.readouterr()
    kernels.main(["--write"])
    out = capsys.readouterr().out
    assert out.startswith("Measured now: all rows on the CPU. The other rows are as kept")
    assert out.endswith("GPU: [7]\n")
    assert json.loads((tmp_path / "kernels.json").read_text())["gpu"] == {"status": "run", "cells": [7]}


def tiny_rounds() -> tuple[Any, ...]:
    what = bench("_kernels.verify")
    return what.Round(what.TEMPERATURE, 1, 2, 1500), what.Round(what.TRUNCATED, 3, 3, 1500)


def test_verification_is_timed_beside_a_composition_of_the_same_law() -> None:
    kernels, what = bench("bench_kernels"), bench("_kernels.verify")
    cells = kernels.measure_verify(tiny_rounds(), 3, 0.1)
    assert [(c["case"], c["rows"], c["drafts"], c["width"]) for c in cells] == [
        ("temperature draw", 1, 2, 1500), ("k50 + p.9", 3, 3, 1500),
    ]  # fmt: skip
    for cell in cells:
        assert 0 <= cell["accepted"] <= cell["drafts"]
        assert set(cell["ms"]) == set(cell["peak_extra"]) == {"proxytune", "plain"}
    part = {"status": "not run", "reason": "a test", "verify": cells}
    shown = kernels.kernels_table({"cpu": part, "gpu": {"status": "not run", "reason": "no CUDA device"}})
    assert "| k50 + p.9 | 1,500 | 3 | 3 |" in shown
    busy = max(c["load"] for c in cells) > cells[0]["threads"] + 1
    assert ("on a busy machine" in shown) == busy
    # The two have the same law: as many drafts are accepted, within four standard errors of 200 texts.
    many = what.Round(what.TRUNCATED, 200, 3, 1500)
    given = what.given(many, "cpu")
    torch.manual_seed(0)
    ours, plain = (f(given)[1].double() for f in (what.ours(many, "cpu", "torch"), what.plain(many)))
    assert 0.2 < float(ours.mean()) < 2.8
    error = ((ours.var() + plain.var()) / 200).sqrt()
    assert abs(float(ours.mean() - plain.mean())) <= 4 * float(error)


def tiny_mixtures() -> tuple[Any, ...]:
    mixture = bench("_kernels.mix").Mixture
    return mixture(1, 64, 3, 50), mixture(4, 64, 3, 50)


def test_mixtures_are_timed_beside_a_composition_that_gives_the_same() -> None:
    kernels, mixing = bench("bench_kernels"), bench("_kernels.mix")
    for mixture in tiny_mixtures():
        x = mixing.given(mixture, "cpu")
        torch.testing.assert_close(mixing.ours("torch")(x), mixing.eager(x), rtol=1e-2, atol=1e-2)
    cells = kernels.measure_mix(tiny_mixtures(), 3, 0.1)
    assert [(c["rows"], c["bytes"]) for c in cells] == [(1, 4 * 64 * 2), (4, 4 * 4 * 64 * 2)]
    cpu = {"status": "not run", "reason": "a test", "mix": cells}
    gpu = {"status": "not run", "reason": "no CUDA device"}
    assert kernels.kernels_table({"cpu": cpu, "gpu": gpu}).count("| D=64, K=3 |") == 2

    class Clock:
        def bandwidth(self) -> float:
            return 4e12

        def replayed(self, calls: list[Any], cold: bool) -> float:
            for call in calls:
                call()
            return 2.0 if cold else 1.0

    there = mixing.measure_gpu(Clock(), tiny_mixtures(), "cpu")
    assert there[1]["times"] == {name: {"cold": 2.0, "warm": 1.0} for name in ("proxytune", "eager")}
    assert there[1]["floor_us"] == pytest.approx(2048 / 4e12 * 1e6, abs=1e-3)
    shown = kernels.kernels_table({"cpu": cpu, "gpu": gpu | {"mix": there}})
    assert shown.count("| 2.0, 1.0 | 0 % | 1.0× |") == 2


def test_the_figures_that_are_kept_are_of_this_form() -> None:
    record = json.loads((BENCHES / "results" / "kernels.json").read_text())
    assert record["cpu"]["status"] == "run"
    assert record["gpu"]["status"] in ("run", "not run")
    bench("bench_kernels").kernels_table(record)


def test_every_cell_that_plain_code_wins_is_shown_and_counted() -> None:
    kernels = bench("bench_kernels")
    record = json.loads((BENCHES / "results" / "kernels.json").read_text())
    cells = record["cpu"]["cells"]
    ratios = [ratio["median"] for cell in cells for ratio in cell["times_ours"].values()]
    won = [ratio for ratio in ratios if ratio < 1]
    table = kernels.kernels_table(record).split("\n\n")[0]
    assert table.count("**") == 2 * len(won)
    assert {(cell["width"], cell["rows"]) for cell in cells} == {
        (int(row.split("|")[2].replace(",", "")), int(row.split("|")[3])) for row in table.splitlines()[2:]
    }
    said = kernels.losses(cells)
    assert said.startswith(f"Plain code is faster in {len(won)} of {len(ratios)} comparisons")
    assert f"({min(won):.2f}–" in said

    def cell(plain: float, width: int = 1000) -> dict[str, Any]:
        return {"width": width, "rows": 2, "times_ours": {"plain": {"q1": plain, "median": plain, "q3": plain}}}

    assert kernels.losses([cell(1.0), cell(2.0)]).startswith("Plain code is faster in none of 2 comparisons")
    assert "plain torch in 2 of 3 (0.50–0.90×, all at V = 1k, B = 2)." in kernels.losses(
        [cell(0.5), cell(0.9), cell(1)]
    )
    assert "plain torch in 2 of 2 (0.50–0.90×)." in kernels.losses([cell(0.5), cell(0.9, 2000)])


@pytest.mark.parametrize("width", [40_000, 130_000])
def test_memory_does_not_grow_with_the_batch(width: int) -> None:
    """No temporary has the size of the batch: three blocks of scratch and two products, half a megabyte each."""
    kernels, cases = bench("bench_kernels"), bench("_kernels.cases")
    assert torch.get_num_threads() == 1
    for rows in (8, 24):
        logits = cases.members(rows, width, torch.bfloat16, "cpu")
        for case in (*cases.CASES, cases.GREEDY):
            held = kernels.peak_bytes(cases.decision(case, rows, "cpu", "torch"), logits)
            # What is left per row: sums per tile, maxima per group, and the tile that is drawn from.
            assert held < 5.2 * (1 << 19) + rows * 250_000, (case.name, held)


@pytest.mark.parametrize("rows_like", ["peaked", "flat"])
def test_all_compositions_make_the_same_decision(rows_like: str) -> None:
    cases = bench("_kernels.cases")
    logits = cases.members(4, 3000, torch.bfloat16, "cpu", rows_like)
    for case in (*cases.CASES, cases.GREEDY):
        ours = cases.decision(case, 4, "cpu", "torch")(logits)
        for plain in [cases.plain(case)] + ([cases.plain_candidates(case)] if case.top_k else []):
            theirs = plain(logits)
            assert theirs.keys() == ours.keys()
            for name in ours.keys() - {"tokens", "logprobs"}:  # drawn with other noise
                torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-4)
            for name in ours:
                assert theirs[name].shape == ours[name].shape
    assert torch.equal(ours["tokens"], theirs["tokens"])  # greedy
    entropy = cases.decision(cases.STATISTICS, 4, "cpu", "torch")(logits)["entropy"]
    assert (entropy < 4).all() if rows_like == "peaked" else (entropy > 4).all()


# --- the GPU part, without one --------------------------------------------------------------------------------------


class Pretended:
    """Work that takes no time, on a clock that is set by hand."""

    def __init__(self, wrong: str | None = None) -> None:
        self.now = 100.0
        self.wrong = wrong
        self.done: list[tuple[Any, str]] = []

    def clock(self) -> float:
        return self.now

    def describe(self) -> dict[str, Any]:
        return {"device": "none", "torch": "0", "triton": "0"}

    def bandwidth(self) -> float:
        return 4e12

    def check(self, cell: Any) -> str | None:
        self.now += 0.1
        return self.wrong

    def time(self, cell: Any, what: str) -> dict[str, float]:
        if what == "FlashInfer":
            raise ModuleNotFoundError("no flashinfer")
        if what == "transformers":
            raise RuntimeError("cannot be captured\nat some place")
        self.done.append((cell, what))
        self.now += 40.0 if "autotune" in what else 20.0 if "compile" in what else 0.25
        ours = what == "proxytune"
        return {"cold": 20.0 if ours else 400.0, "warm": 16.0 if ours else 400.0}


def test_cells_and_the_floor() -> None:
    gpu = bench("_kernels.gpu")
    cells = gpu.cells()
    assert len(cells) == len(set(cells)) == 4 * 4 * 3 + 3
    cell = next(c for c in cells if (c.rows, c.width) == (64, 128_256))
    assert cell.bytes == 3 * 64 * 128_256 * 2
    assert gpu.floor_us(cell, 4.3e12) == pytest.approx(11.45, abs=0.01)
    planned = list(gpu.plan(cells))
    assert len(planned) == len(set(planned))
    assert {what for _, what in planned[: 2 * len(cells)]} == {"proxytune", "eager"}
    searched = {(c.rows, c.width) for c, what in planned if what == gpu.AUTOTUNE}
    assert searched == {(1, 128_256), (64, 128_256)}
    assert {c for c, what in planned if what == gpu.COMPILE} == set(cells)


def test_the_deadline_leaves_out_the_least_important_and_says_so() -> None:
    gpu, pretended = bench("_kernels.gpu"), Pretended()
    part = gpu.measure(pretended, 540.0, gpu.cells(), pretended.clock)
    assert part["status"] == "run"
    assert pretended.now - 100.0 < 600.0
    assert part["seconds"] == pytest.approx(pretended.now - 100.0, abs=0.1)
    main = next(c for c in part["cells"] if (c["rows"], c["width"], c["case"]) == (64, 128_256, "k50 + p.9"))
    assert main["share_of_floor"] == pytest.approx({"cold": 12.312 / 20}, abs=1e-3)
    assert main["times_ours"][gpu.EAGER] == {"cold": 20.0, "warm": 25.0}
    assert main["times"]["FlashInfer"] == "not run: not installed"
    assert main["times"]["transformers"] == "not run: RuntimeError: cannot be captured"
    for cell in part["cells"]:
        assert isinstance(cell["times"]["proxytune"], dict)
        assert isinstance(cell["times"]["eager"], dict)
    compiled = [c["times"][gpu.COMPILE] for c in part["cells"]]
    assert 6 <= sum(isinstance(t, dict) for t in compiled) < len(compiled)
    assert {t for t in compiled if isinstance(t, str)} == {"not run: deadline"}
    shown = bench("bench_kernels").kernels_table({"cpu": {"status": "not run", "reason": "a test"}, "gpu": part})
    assert "20.0, 16.0 | 62 %" in shown


def test_nothing_is_timed_where_a_decision_is_wrong() -> None:
    gpu, pretended = bench("_kernels.gpu"), Pretended("entropy is off by 1")
    with pytest.raises(SystemExit, match="statistics, B=1, V=32000, peaked: entropy is off by 1"):
        gpu.measure(pretended, 540.0, gpu.cells(), pretended.clock)
    assert pretended.done == []


def test_the_checks_and_the_functions_run_where_only_the_graphs_are_missing() -> None:
    cuda, gpu = bench("_kernels.cuda"), bench("_kernels.gpu")

    class OnTheCpu(cuda.CpuBench):  # type: ignore[misc, name-defined]
        def replayed(self, calls: list[Any], cold: bool) -> float:
            assert len(calls) == 2
            return float(super().replayed(calls, cold))

    it = OnTheCpu("torch")
    for cell in gpu.cells((2000,), (1, 3)):
        assert it.check(cell) is None
        for what in (gpu.OURS, gpu.EAGER) if cell.case.temperature is None else (gpu.OURS, gpu.EAGER, "transformers"):
            assert it.time(cell, what) == {"cold": 2.0, "warm": 1.0}


def test_the_checks_see_what_is_wrong() -> None:
    cuda, cases = bench("_kernels.cuda"), bench("_kernels.cases")
    logits = cases.members(4, 3000, torch.bfloat16, "cpu")
    good = cases.decision(cases.STATISTICS, 4, "cpu", "torch")(logits)
    for name in good:
        bad = good | {name: good[name] + (1 if name == "argmax" else 0.01)}
        assert name in str(cuda.wrong(cases.STATISTICS, logits, bad, good))
    drawn = cases.decision(cases.TRUNCATED, 4, "cpu", "torch")(logits)
    assert cuda.wrong(cases.TRUNCATED, logits, drawn, drawn) is None
    least = cases.combined(logits).argmin(1, keepdim=True)
    assert "support" in str(cuda.wrong(cases.TRUNCATED, logits, drawn | {"tokens": least}, drawn))
    other = {"tokens": (drawn["tokens"] + 1) % 3000}
    assert "4 of 4 tokens differ" in str(cuda.wrong(cases.TRUNCATED, logits, drawn, other))
