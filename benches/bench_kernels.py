"""Time a decoding decision, `proxytune.ops.step`, against the code one would write instead, and keep the results.

::

    python benches/bench_kernels.py --write          measure the CPU part, and the GPU part if there is a GPU
    python benches/bench_kernels.py --write --gpu    the GPU part only, in minutes; fails without one; the rest is kept
    python benches/bench_kernels.py --write --mix    the mixtures of embeddings only, on the CPU; the rest is kept
    python benches/bench_kernels.py --write --verify the verification of drafts only, on the CPU; the rest is kept
    python benches/bench_kernels.py --markdown       the pages' tables, from the JSON
    pytest benches/bench_kernels.py --benchmark-only the CPU part by pytest-benchmark

Writes benches/results/kernels.json. On the CPU the implementations take turns, and ratios are taken within each round.
On a GPU correctness is checked first, see `_kernels/gpu.py` and `_kernels/cuda.py`. What was not run is marked so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop
sys.path.insert(0, str(Path(__file__).resolve().parent))  # pytest imports this file by its path

import pytest
import torch
import transformers
from _kernels import cases, gpu
from _kernels import cuda as kernels_cuda
from _kernels import mix as kernels_mix
from _kernels import verify as kernels_verify
from _kernels.cases import CASES, GREEDY, TRUNCATED, Case, Members
from _kernels.mix import MIXTURES, Mixture
from _kernels.verify import ROUNDS_OF_DRAFTS, Round
from live_bytes import numpy_peak
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
WIDTHS = (32_000, 128_256, 151_936)
ROWS = (1, 8)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 15
OURS, PLAIN = "proxytune", "plain"
CANDIDATES, CHAIN = "plain, top-k first", "transformers"
Implementations = dict[str, Callable[[Members], Any]]


def implementations(case: Case, rows: int) -> Implementations:
    """What is compared on the CPU; transformers' chain returns tokens only."""
    out: Implementations = {OURS: cases.decision(case, rows, "cpu", "torch"), PLAIN: cases.plain(case)}
    if case is TRUNCATED:
        out[CANDIDATES] = cases.plain_candidates(case)
    if case.temperature is not None:
        out[CHAIN] = cases.transformers_chain(case)
    return out


# --- the CPU part ---------------------------------------------------------------------------------------------------


def measure_cpu(
    widths: Sequence[int] = WIDTHS,
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    rounds: int = ROUNDS,
    target_ms: float = 8.0,
) -> dict[str, Any]:
    """Time every case at every shape, and measure its memory; returns the JSON values.

    `rounds` is how often each implementation has its turn, `target_ms` about how long a turn takes.
    """
    cells = []
    for width in widths:
        for count in rows:
            for dtype in dtypes:
                logits = cases.members(count, width, dtype, "cpu")
                for case in (*CASES, GREEDY):
                    found = implementations(case, count)
                    cells.append(
                        {
                            "case": case.name,
                            "rows": count,
                            "width": width,
                            "dtype": str(dtype).removeprefix("torch."),
                            **_timed(found, logits, rounds, target_ms),
                            # In units of one float32 number per logit of the base.
                            "peak_extra": {
                                name: round(peak_bytes(f, logits) / (4 * count * width), 3) for name, f in found.items()
                            },
                        }
                    )
    return {
        "status": "run",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cells": cells,
    }


def measure_mix(
    mixtures: Sequence[Mixture] = MIXTURES, rounds: int = ROUNDS, target_ms: float = 8.0
) -> list[dict[str, Any]]:
    """Time the mixtures of embeddings on the CPU; arguments as in `measure_cpu`."""
    found: Implementations = {OURS: kernels_mix.ours("torch"), kernels_mix.EAGER: kernels_mix.eager}
    return [
        kernels_mix.shape(mixture) | _timed(found, kernels_mix.given(mixture, "cpu"), rounds, target_ms)
        for mixture in mixtures
    ]


def measure_verify(
    of: Sequence[Round] = ROUNDS_OF_DRAFTS, rounds: int = ROUNDS, target_ms: float = 8.0
) -> list[dict[str, Any]]:
    """Time the verification of drafts on the CPU, and measure its memory; arguments as in `measure_cpu`."""
    cells = []
    for what in of:
        found: Implementations = {
            OURS: kernels_verify.ours(what, "cpu", "torch"), kernels_verify.PLAIN: kernels_verify.plain(what)
        }  # fmt: skip
        logits = kernels_verify.given(what, "cpu")
        accepted = float(found[OURS](logits)[1].float().mean())
        # In units of one float32 number per logit of the base, at all positions.
        memory = 4 * what.rows * (what.drafts + 1) * what.width
        peak = {name: round(peak_bytes(f, logits) / memory, 3) for name, f in found.items()}
        timed = _timed(found, logits, rounds, target_ms)
        load = round(os.getloadavg()[0], 1)
        more = {"accepted": accepted, "rounds": rounds, "threads": torch.get_num_threads(), "load": load}
        cells.append(kernels_verify.shape(what) | more | timed | {"peak_extra": peak})
    return cells


def _timed(found: Implementations, logits: Members, rounds: int, target_ms: float) -> dict[str, Any]:
    """Median milliseconds, and the others' times relative to ours: median and quartiles over the rounds."""
    for f in found.values():
        f(logits)
    once = min(_seconds(found[OURS], logits, 1) for _ in range(3))
    repeats = max(1, min(50, round(target_ms / 1000 / once)))
    took: dict[str, list[float]] = {name: [] for name in found}
    with _no_collection():
        for turn in range(rounds):
            for name in sorted(found, reverse=bool(turn % 2)):  # no implementation always follows the same one
                took[name].append(_seconds(found[name], logits, repeats))
    ratios = {
        name: [theirs / ours for theirs, ours in zip(took[name], took[OURS], strict=True)]
        for name in found
        if name != OURS
    }
    return {
        "ms": {name: round(1000 * statistics.median(t), 4) for name, t in took.items()},
        "times_ours": {
            name: dict(zip(("q1", "median", "q3"), (round(q, 3) for q in _quartiles(r)), strict=True))
            for name, r in ratios.items()
        },
    }


def _seconds(f: Callable[[Members], Any], logits: Members, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        f(logits)
    return (time.perf_counter() - start) / repeats


def _quartiles(x: Sequence[float]) -> Sequence[float]:
    return statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else [x[0]] * 3


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_bytes(call: Callable[[Members], Any], logits: Members) -> int:
    """At most so many bytes a call holds at once, results included.

    The peak by torch's allocator and that by NumPy, scratch that is kept for later calls counted anew; they need not
    coincide, so their sum may be too large.
    """
    numpys = numpy_peak(lambda: call(logits))
    call(logits)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = call(logits)
    del out
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))  # the only public access to single allocations
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = peak = 0
    for event in memory:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak + numpys


# --- by pytest-benchmark --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, GREEDY], ids=lambda case: case.name)
@pytest.mark.parametrize("what", [OURS, PLAIN, CANDIDATES, CHAIN])
def test_decision(benchmark: Any, what: str, case: Case, dtype: torch.dtype, rows: int, width: int) -> None:
    """One decision on the CPU."""
    found = implementations(case, rows)
    if what not in found:
        pytest.skip("another decision")
    torch.set_num_threads(1)
    benchmark.group = f"{case.name}, B={rows}, V={width}, {dtype}"
    benchmark.pedantic(found[what], (cases.members(rows, width, dtype, "cpu"),), rounds=5, warmup_rounds=1)


# --- the pages' tables -----------------------------------------------------------------------------------------------


def kernels_table(record: dict[str, Any] | None = None) -> str:
    """The pages' tables of decisions, in Markdown; `record` defaults to the kept JSON."""
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if record is None else record
    return "\n\n".join(
        [_cpu_table(record["cpu"]), *_verify_table(record), *_mix_table(record), _gpu_table(record["gpu"])]
    )


def _mix_table(record: dict[str, Any]) -> list[str]:
    """Mixtures of embeddings, if they were measured."""
    if "mix" not in record["cpu"]:
        return []
    lines = ["| mixture of embeddings, bfloat16 | B | MB | CPU ms | plain torch |", "|---|--:|--:|--:|--:|"]
    on_gpu = {(c["rows"], c["width"], c["candidates"]): c for c in record["gpu"].get("mix", [])}
    if on_gpu:
        lines = [f"{lines[0]} GPU µs cold, warm | of the copy floor | eager |", f"{lines[1]}--:|--:|--:|"]
    for cell in record["cpu"]["mix"]:
        line = f"| D={cell['width']:,}, K={cell['candidates']} | {cell['rows']} | {cell['bytes'] / 1e6:.2f} | "
        line += f"{cell['ms'][OURS]:.2f} | {_marked(cell['times_ours'][kernels_mix.EAGER], 2)} |"
        if on_gpu:
            there = on_gpu[cell["rows"], cell["width"], cell["candidates"]]
            took = there["times"][OURS]
            line += f" {took['cold']:.1f}, {took['warm']:.1f} | {100 * there['floor_us'] / took['cold']:.0f} % | "
            line += f"{there['times_ours']['cold']:.1f}× |"
        lines.append(line)
    return ["\n".join(lines)]


def _verify_table(record: dict[str, Any]) -> list[str]:
    """Verification of drafts, if it was measured."""
    lines = [
        "| drafts verified, CPU, bfloat16 | V | B | K | ms | plain torch | memory: ours, plain |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in record["cpu"].get("verify", []):
        memory = f"{cell['peak_extra'][OURS]:.2f}, {cell['peak_extra'][kernels_verify.PLAIN]:.2f}"
        lines.append(
            f"| {cell['case']} | {cell['width']:,} | {cell['rows']} | {cell['drafts']} | {cell['ms'][OURS]:.2f} | "
            f"{_marked(cell['times_ours'][kernels_verify.PLAIN])} | {memory} |"
        )
    if len(lines) == 2:
        return []
    load = max(cell["load"] for cell in record["cpu"]["verify"])
    if load > max(cell["threads"] for cell in record["cpu"]["verify"]) + 1:
        lines += [
            "",
            f"Measured on a busy machine (load {load:.1f}): trust the ratios, not the milliseconds.",
        ]
    return ["\n".join(lines)]


def _cpu_table(part: dict[str, Any]) -> str:
    if part["status"] != "run":
        return f"On a CPU: not run ({part['reason']})."
    lines = [
        "| CPU | V | B | ms | plain torch | top-k first | transformers | memory: ours, plain |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in part["cells"]:
        if cell["dtype"] != "bfloat16" and not any(_faster(ratio) for ratio in cell["times_ours"].values()):
            continue
        ratios = (_marked(cell["times_ours"].get(name)) for name in (PLAIN, CANDIDATES, CHAIN))
        memory = f"{cell['peak_extra'][OURS]:.2f}, {cell['peak_extra'][PLAIN]:.2f}"
        case = cell["case"] + (", float32" if cell["dtype"] == "float32" else "")
        lines.append(
            f"| {case} | {cell['width']:,} | {cell['rows']} | {cell['ms'][OURS]:.2f} | "
            + " | ".join([*ratios, memory])
            + " |"
        )
    said = (
        f"CPU threads: {part['threads']}, torch {part['torch']}; medians and quartiles of {part['rounds']} rounds in "
        "turns. Logits in bfloat16, and in float32 where a column has plain code that is faster. Other columns: time "
        "relative to ours, in bold where it is less; memory: at most, in float32 rows `[B, V]`."
    )
    return "\n".join([*lines, "", said, "", losses(part["cells"])])


def losses(cells: Sequence[dict[str, Any]]) -> str:
    """In how many cells, of all widths and dtypes, the code one would write instead is faster, and by how much."""
    shown = {PLAIN: "plain torch", CANDIDATES: "plain torch with top-k first", CHAIN: "transformers"}
    parts = []
    count = total = 0
    for name, title in shown.items():
        timed = [cell for cell in cells if name in cell["times_ours"]]
        faster = [cell for cell in timed if _faster(cell["times_ours"][name])]
        count, total = count + len(faster), total + len(timed)
        if not timed:
            continue
        said = f"{title} in {len(faster)} of {len(timed)}"
        if faster:
            ratios = [cell["times_ours"][name]["median"] for cell in faster]
            where = {f"V = {cell['width'] / 1000:.0f}k, B = {cell['rows']}" for cell in faster}
            said += f" ({min(ratios):.2f}–{max(ratios):.2f}×{', all at ' + where.pop() if len(where) == 1 else ''})"
        parts.append(said)
    if not count:
        return f"Plain code is faster in none of {total} comparisons (all widths, float32 and bfloat16)."
    return (
        f"Plain code is faster in {count} of {total} comparisons (all widths, float32 and bfloat16): "
        + "; ".join(parts)
        + "."
    )


def all_losses(record: dict[str, Any]) -> str:
    """The same for `step`, `verify` and `mix`, from a whole record."""
    part = record["cpu"]
    said = [f"`step`: {losses(part['cells'])}"]
    for name, other in (("verify", kernels_verify.PLAIN), ("mix", kernels_mix.EAGER)):
        ratios = [cell["times_ours"][other] for cell in part.get(name, [])]
        faster = [ratio["median"] for ratio in ratios if _faster(ratio)]
        span = f" ({min(faster):.2f}–{max(faster):.2f}×)" if faster else ""
        said.append(f"`{name}`: plain torch is faster in {len(faster)} of {len(ratios)}{span}.")
    return "\n\n".join(said)


def _faster(ratio: dict[str, float]) -> bool:
    """Whether the other code takes less time than ours."""
    return ratio["median"] < 1


def _marked(ratio: dict[str, float] | None, digits: int = 1) -> str:
    if ratio and _faster(ratio):
        return f"**{_interval(ratio, 2)}**"
    return _interval(ratio, digits)


def _interval(ratio: dict[str, float] | None, digits: int = 1) -> str:
    if not ratio:
        return ""
    return f"{ratio['median']:.{digits}f}× [{ratio['q1']:.{digits}f}, {ratio['q3']:.{digits}f}]"


def _gpu_table(part: dict[str, Any]) -> str:
    if part["status"] != "run":
        return f"On a GPU: not run ({part['reason']})."
    others = (gpu.EAGER, gpu.EAGER_CANDIDATES, gpu.COMPILE, gpu.AUTOTUNE, *gpu.PEERS)
    lines = [
        f"| {part['device']} | V | B | µs cold, warm | of the copy floor | " + " | ".join(others) + " |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(others),
    ]
    for cell in part["cells"]:
        if (cell["rows"], cell["width"]) not in gpu.COMPILED:
            continue
        ours = cell["times"][gpu.OURS]
        name = cell["case"] + (", flat" if cell["rows_like"] == "flat" else "")
        shown = f"| {name} | {cell['width']:,} | {cell['rows']} |"
        if isinstance(ours, str):
            lines.append(f"{shown} {ours} | |" + " |" * len(others))
            continue
        ratios = (_ratio(cell, other) for other in others)
        lines.append(
            f"{shown} {ours['cold']:.1f}, {ours['warm']:.1f} | {100 * cell['share_of_floor']['cold']:.0f} % | "
            + " | ".join(ratios)
            + " |"
        )
    said = (
        f"torch {part['torch']}, Triton {part['triton']}; all under CUDA graphs. Other columns: time relative to ours, "
        f"L2-cold; the floor is reading the rows once at a copy's {part['copy_gb_per_s']:,.0f} GB/s."
    )
    return "\n".join([*lines, "", said])


def _ratio(cell: dict[str, Any], other: str) -> str:
    if other in cell["times_ours"]:
        return f"{cell['times_ours'][other]['cold']:.1f}×"
    return str(cell["times"].get(other, ""))


_PARTS = {"mix": "mixtures of embeddings", "verify": "drafts verified"}


def _end(record: dict[str, Any], keep: bool, now: str | None) -> None:
    """Print the tables, and keep the record; `now` says which rows were measured in this run, None for all."""
    if keep:
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if now is not None:
        print(f"Measured now: {now}. The other rows are as kept in {RESULTS.name}, of an earlier run.\n")
    print(kernels_table(record))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--gpu", action="store_true", help="only the GPU part; the CPU part is kept")
    parser.add_argument("--mix", action="store_true", help="only the mixtures, on the CPU; the rest is kept")
    parser.add_argument(
        "--verify", action="store_true", help="only the verification of drafts, on the CPU; the rest is kept"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables of the kept results")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for the GPU part")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch [1]")
    parser.add_argument("--host", action="store_true", help="only Python's time around launches, with no GPU at all")
    wanted = parser.parse_args(arguments)
    if wanted.host:
        print(json.dumps(importlib.import_module("_kernels.no_gpu").run(), indent=1))
    elif wanted.mix or wanted.verify:
        torch.set_num_threads(wanted.threads)
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        if wanted.mix:
            record["cpu"]["mix"] = measure_mix()
        if wanted.verify:
            record["cpu"]["verify"] = measure_verify()
        names = [name for name in ("mix", "verify") if getattr(wanted, name)]
        _end(record, wanted.write, " and ".join(f"{_PARTS[name]}, on the CPU" for name in names))
    elif not wanted.markdown:
        if wanted.gpu and not torch.cuda.is_available():
            raise SystemExit("bench_kernels --gpu: expected a CUDA device; got none. Leave --gpu out for the CPU part.")
        torch.set_num_threads(wanted.threads)
        # The GPU part first: it has a deadline.
        record = {"command": "python benches/bench_kernels.py --write", "gpu": kernels_cuda.run(wanted.deadline)}
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        now = None
        if record["gpu"]["status"] != "run" and kept.get("gpu", {}).get("status") == "run":
            record["gpu"], now = kept["gpu"], "all rows on the CPU"
        if not wanted.gpu:
            record["cpu"] = measure_cpu()
            record["cpu"]["mix"] = measure_mix()
            record["cpu"]["verify"] = measure_verify()
        else:
            record["cpu"] = kept.get("cpu", {"status": "not run", "reason": "only the GPU part was requested"})
            now = "all rows on the GPU"
        _end(record, wanted.write, now)
    else:
        print(kernels_table())


if __name__ == "__main__":
    main()
