"""The kernels compile for GPUs that are not here, within the committed budget; and a step inside `torch.compile`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.interpreter import patch_the_language_once_per_launch

from proxytune.ops import OUTPUTS, StepOutput, step
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
BUDGET = json.loads((ROOT / "benches/results/kernels_budget.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_installed_triton_stays_within_the_budget(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # One process: the other core has tests of its own.
    script = [sys.executable, "benches/kernels_budget.py", "--check", "--target", target, "--jobs", "1"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "within the budget" in done.stdout
    # Every variant of the budget was compiled for it.
    variants = next(iter(BUDGET.values()))[target]
    assert all(any(target in line and variant in line for line in done.stdout.splitlines()) for variant in variants)


def test_the_budget_is_of_both_ends_of_the_range_and_is_a_good_one() -> None:
    assert {v.rsplit(".", 1)[0] for v in BUDGET} >= {"3.6", "3.9"}
    for version, targets in BUDGET.items():
        assert set(targets) == {"sm_80", "sm_90", "gfx942"}
        for target, variants in targets.items():
            for variant, counts in variants.items():
                where = f"{version} {target} {variant}"
                # A few of the widest variants spill a handful of registers; the pass over the rows must not.
                # A mixture with noise of 8,192 coordinates is the one that needs ten: its threads have no more than
                # 128 registers each on sm_80.
                wide_mixture = variant.startswith("mix_rows") and "D=8192" in variant and target == "sm_80"
                assert counts["spills"] <= (10 if wide_mixture else 8), where
                if variant.startswith("steer_tiles") and "five" not in variant:
                    assert counts["spills"] == 0, where
                if variant.startswith("mix_rows") and not wide_mixture:
                    assert counts["spills"] == 0, where
                if variant.startswith(("steer_tiles", "mix_rows")):
                    assert counts["wide_loads"] > 0, where
                # No multiply-add in what combines logits, or rows: torch would get other bits, and other ties.
                plain = variant.startswith("mix_rows") and "noise" not in variant
                combined = ("scores", "statistics", "offsets, floors, scores")
                if plain or variant in {f"steer_tiles: {name}" for name in combined}:
                    assert counts["fused"] == 0, where


def test_an_excess_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("kernels_budget", ROOT / "benches/kernels_budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = BUDGET[min(BUDGET)]
    assert module.excesses(one, one) == []
    worse = json.loads(json.dumps(one))
    worse["sm_90"]["steer_tiles: draw"]["registers"] += 1
    worse["sm_90"]["steer_tiles: draw"]["wide_loads"] -= 1
    worse["sm_90"]["steer_tiles: draw"]["per_column"] += 0.1
    assert [line.split(": ", 1)[0] for line in module.excesses(worse, one)] == ["sm_90, steer_tiles"] * 3
    assert module.excesses(one, worse) == []
    assert "not in the budget" in module.excesses({"sm_90": {"new": {}}}, one)[0]
    assert module.too_many_reads({"9": {"good": {"row": 2.0, "workspaces": 1.0}}}) == []
    record = json.loads(module.LATENCY.read_text(encoding="utf-8"))
    assert module.longer(record, record) == []
    slower = json.loads(json.dumps(record))
    slower["decision"]["32000"]["resolve"]["µs"] = 99.0
    assert [line.split(" modelled")[0] for line in module.longer(slower, record)] == ["V = 32000, resolve: 99.0 µs"]
    assert module.longer(record, slower) == []
    assert "3.01 row reads" in module.too_many_reads({"9": {"bad": {"row": 3.0, "workspaces": 0.01}}})[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter loads")
@pytest.mark.parametrize("name", ["flat, p .9", "constant, k 50, p .9", "flat, k 5,000, p .9, min-p"])
def test_a_truncated_draw_reads_its_row_three_times_at_most(name: str) -> None:
    pytest.importorskip("triton")
    from _kernels import row_reads

    patch_the_language_once_per_launch()
    record = json.loads((ROOT / "benches/results/row_reads.json").read_text())
    with np.errstate(all="ignore"):
        reads = row_reads.row_reads(name, 32_000)
    assert reads == record["32000"][name]
    assert all(sum(one.values()) <= 3 for cases in record.values() for one in cases.values())
    assert set(record) == {"32000", "128256", "256000"}
    assert all(set(cases) == set(row_reads.CASES) for cases in record.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="models what the interpreter runs")
def test_a_truncated_draw_takes_no_longer_than_recorded() -> None:
    triton = pytest.importorskip("triton")
    from _kernels import latency

    patch_the_language_once_per_launch()
    record = json.loads((ROOT / "benches/results/latency.json").read_text(encoding="utf-8"))
    if record["triton"] != triton.__version__:
        pytest.skip(f"recorded with Triton {record['triton']}, whose interpreter has other operations")
    recorded = record["decision"]["32000"]
    found = latency.decision(32_000)
    assert list(found) == ["steer_tiles", "resolve", "resolve_wide"]
    assert {kernel: of["µs"] for kernel, of in found.items() if of["µs"] > recorded[kernel]["µs"]} == {}


@pytest.mark.parametrize("settings", [None, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}])
def test_inside_torch_compile_it_is_one_node_with_the_same_result(settings: dict[str, float] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(3, v, generator=generator) * 3 for v in (1500, 1400, 1600)]
    want = tuple(OUTPUTS) if settings else ("tokens", "entropy", "scores")
    sampling = None if settings is None else SamplingParams.of(3, **settings)  # type: ignore[arg-type]
    noise = None if settings is None else Noise.of(3, seed=5)
    draws = 2 if settings else 1

    def decide(*rows: torch.Tensor) -> StepOutput:
        out = step(rows, (1.0, 0.5, -0.5), sampling=sampling, noise=noise, draws=draws, want=want)
        assert out.tokens is not None
        return out

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(decide, backend=keep, fullgraph=True)(*members)
    plain = decide(*members)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("proxytune" in name for name in called) == 1
    for name in want:
        assert torch.equal(getattr(compiled, name), getattr(plain, name)), name
    # Shapes and dtypes of the stand-ins that the compiler reasons with.
    torch._dynamo.reset()
    aot = torch.compile(decide, backend="aot_eager", fullgraph=True)(*members)
    assert torch.equal(aot.tokens, plain.tokens)


def test_the_operator_passes_torchs_own_checks() -> None:
    members = [torch.randn(2, 300, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    s, n = SamplingParams.of(2, temperature=0.7, fork_threshold=2.0, fork_temperature=1.0), Noise.of(2, seed=5)
    assert s.fork_threshold is not None
    assert s.fork_temperature is not None
    settings = [s.temperature, s.top_k, s.top_p, s.log_min_p, s.truncated, s.fork_threshold, s.fork_temperature]
    arguments = (
        members,
        None,
        [1.0, 0.5, -0.5],
        None,
        None,
        0,
        settings,
        [0, 0, 0],
        [n.seed, n.row, n.position, n.branch],
        2,
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.proxytune.step.default, (*arguments, ",".join(OUTPUTS), "torch"), test_utils=checks)
