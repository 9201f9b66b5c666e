"""The run on a GPU, without one: every part at toy sizes, and what is kept, resumed and merged."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreter import patch_the_language_once_per_launch

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture(scope="module")
def gpu_run() -> Iterator[Any]:
    pytest.importorskip("triton")
    sys.path.insert(0, str(BENCHES))
    yield importlib.import_module("gpu_run")
    sys.path.remove(str(BENCHES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.filterwarnings("ignore")  # of the profiler, the interpreter and transformers
def test_a_dry_run_runs_every_part_and_resumes(
    gpu_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch_the_language_once_per_launch()
    gpu_run.main(["--out", str(tmp_path), "--dry-run"])
    parts = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert list(parts) == list(gpu_run.PARTS)
    assert {name: part for name, part in parts.items() if part["status"] != "run"} == {}
    raced = {(cell["case"], cell["rows_like"]): cell["differ"] for cell in parts["races"]["found"]["cells"]}
    assert raced == {("statistics", "peaked"): 0, ("p.9, T 2", "flat"): 0}
    assert parts["kernels"]["found"]["cells"][0]["times"]["proxytune"] == {"cold": 2.0, "warm": 1.0}
    (family,) = parts["throughput, 13 + 7 + 7, a tenth"]["found"]["families"]
    ran = {name for name, method in family["cells"][0]["methods"].items() if method["status"] == "run"}
    assert ran >= {"naive loop", "composite door", "fused loop", "fused, overlap", "fused, gated, 0.2 planted"}
    assert ran >= {"speculation, 0.7 planted", "speculation, 0.9 planted"}
    (family,) = parts["throughput, 8 + 1 + 1, a tenth, compiled"]["found"]["families"]
    assert family["cells"][0]["methods"]["fused, graphs"]["same_tokens"] == 1.0
    assert isinstance(parts["kernels"]["found"]["cells"][0]["times"]["torch.compile"], dict)
    assert " passed in " in parts["correctness"]["found"]["tests"][-1]
    for name, seen in parts["trace"]["found"].items():
        assert json.loads(gzip.decompress((tmp_path / seen["file"]).read_bytes()))["traceEvents"], name
    with pytest.raises(SystemExit, match="figures of a GPU; got those of a dry run"):
        gpu_run.main(["--out", str(tmp_path), "--write"])
    for module in ("bench_kernels", "bench_throughput"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path / f"{module}.json")
        (tmp_path / f"{module}.json").write_text("{}")
    gpu_run.write_results({name: part | {"dry run": False} for name, part in parts.items()})
    written = {
        name: json.loads((tmp_path / f"bench_{name}.json").read_text())["gpu"] for name in ("kernels", "throughput")
    }
    assert written["kernels"]["mix"][0]["rows"] == 2
    assert len(written["throughput"]["families"]) == 5
    # What is there and of this code is not run again; the rest is.
    monkeypatch.setattr(gpu_run, "run_part", lambda name, *_: again.append(name))
    again: list[str] = []
    capsys.readouterr()
    gpu_run.main(["--out", str(tmp_path), "--dry-run"])
    assert again == []
    assert capsys.readouterr().out.count(", kept from before |") == len(gpu_run.PARTS)
    monkeypatch.setattr(gpu_run, "code", lambda: "changed")
    gpu_run.run_all(60.0, tmp_path, dry=True)
    assert again == list(gpu_run.PARTS)
    assert "| trace | run |" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_nothing_pretends(gpu_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_run.main(["--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("| not run: no CUDA device |") == len(gpu_run.PARTS)


def test_an_interruption_says_how_to_go_on_and_an_empty_folder_has_nothing_to_write(
    gpu_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="--write: expected a folder with figures of a GPU.*; got no results at all"):
        gpu_run.main(["--out", str(tmp_path), "--write"])
    gpu_run.exchange(
        gpu_run.file_of(tmp_path, "races"), {"status": "run", "code": gpu_run.code(), "found": {}}, "a part"
    )
    with pytest.raises(SystemExit, match="got races: run. Run it on a machine with a GPU, without --write"):
        gpu_run.main(["--out", str(tmp_path), "--write"])

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run.subprocess, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        gpu_run.main(["--out", str(tmp_path)])
    assert ended.value.code == 130
    said = f"Interrupted: {tmp_path} has 1 of {len(gpu_run.PARTS)} parts. The same command runs the others.\n"
    assert capsys.readouterr().out.endswith(said)
    with pytest.raises(SystemExit):
        gpu_run.main(["--help"])
    assert "--part NAME" in capsys.readouterr().out


def test_a_part_that_fails_or_is_late_keeps_what_it_has(
    gpu_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(how: Any) -> dict[str, Any]:
        how.keep({"half": 1})
        raise SystemExit("entropy is off")

    def late(command: list[str], **how: Any) -> None:
        name = command[command.index("--part") + 1]
        seconds.append(float(command[command.index("--seconds") + 1]))
        now.append(now[-1] + how["timeout"])
        if name == "races":
            gpu_run.exchange(gpu_run.file_of(tmp_path, name), {"status": "partly run", "found": {"half": 1}}, "a part")
        raise subprocess.TimeoutExpired(command, how["timeout"])

    now, seconds = [0.0], [0.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run.subprocess, "run", late)
    gpu_run.run_all(540.0, tmp_path, clock=lambda: now[-1])
    assert now[-1] <= 540.0
    assert seconds[1:4] == [gpu_run.PARTS[name].seconds for name in ("correctness", "kernels", "races")]
    kept = gpu_run.kept(tmp_path)
    assert kept["races"]["found"] == {"half": 1}
    assert kept["correctness"] == {"status": "failed", "reason": "it ended without a result"}
    assert kept["throughput, 8 + 1 + 1"] == {"status": "not run", "reason": "no time left"}
    monkeypatch.setitem(gpu_run.PARTS, "races", gpu_run.Part(1.0, failing))
    gpu_run.run_part("races", 1.0, tmp_path, False)
    found = gpu_run.kept(tmp_path)["races"]
    assert found["status"] == "failed"
    assert found["found"] == {"half": 1, "reason": "SystemExit: entropy is off"}
