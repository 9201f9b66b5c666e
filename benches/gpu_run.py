"""Everything that a GPU has to show, in one command and a few minutes.

::

    python benches/gpu_run.py --minutes 9 --out DIR     run what DIR does not have yet
    python benches/gpu_run.py --out DIR --dry-run       every part at toy sizes, on a CPU in Triton's interpreter
    python benches/gpu_run.py --out DIR --write         move the figures of DIR into benches/results

Parts run in order of value, each in a process of its own until its deadline, and write DIR/<part>.json as a whole after
each result; DIR/run.json has all of them. A part that was run with the code as it is now is not run again. Without a
GPU each part says so. A dry run goes the same way, in one process; only the sizes, the capture of a graph, its clock
and the compiler differ (`_kernels.cuda.CpuBench`, `proxytune.throughput.subjects.Subject.dry`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
if __name__ == "__main__" and "--part" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the run that started it says what there is to say

import torch

from proxytune.json_files import exchange

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 20.0
"""Seconds under which no part is started."""
START = 25.0
"""Seconds that a process may take to start and to end."""
LARGEST = 5_000_000
"""Bytes of a trace that is kept."""
Keep = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Run:
    """How a part is to run: seconds it has, where other files go, and whether at toy sizes on a CPU."""

    seconds: float
    out: Path
    dry: bool
    keep: Keep

    @property
    def device(self) -> str:
        """Where tensors are."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Part:
    """A part: its function, which returns JSON values, and its seconds of nine minutes."""

    seconds: float
    run: Callable[[Run], dict[str, Any]]


def correctness(how: Run) -> dict[str, Any]:
    """Every decision against float64 and torch, then the kernels' tests that are marked for a GPU."""
    from _kernels import cuda, gpu

    began = time.monotonic()
    bench = cuda.CpuBench() if how.dry else cuda.CudaBench()
    found: dict[str, Any] = {"decisions": 0}
    for cell in gpu.cells((1100,), (1,))[:3] if how.dry else gpu.cells():
        gpu.check(bench, [cell])
        found["decisions"] += 1
        how.keep(found)
    del bench  # its memory is for the tests
    return pytest_run(how, ["tests/ops"], how.seconds - (time.monotonic() - began), found)


def graphs(how: Run) -> dict[str, Any]:
    """The other tests that are marked for a GPU: CUDA graphs of whole steps, streams, loops."""
    return pytest_run(how, ["tests/models/members", "tests/methods", "tests/generation"], how.seconds, {})


def pytest_run(how: Run, where: list[str], seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """Run the tests that are marked for a GPU in some folders, for so long; `found` with what pytest said."""
    assert all((ROOT / folder).is_dir() for folder in where)
    # A dry run has no such tests. Once it runs a file that starts quickly.
    which = ["-m", "", "--noconftest", "tests/stats/test_coverage.py"] if found else ["--version"]
    which = which if how.dry else where
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *which]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace").strip().splitlines()
        return found | {"tests": ["not run to the end: deadline", *said[-40:]]}
    found = found | {"tests": (done.stdout + done.stderr).strip().splitlines()[-40:]}
    how.keep(found)
    if done.returncode:
        raise SystemExit("\n".join(["tests failed", *found["tests"]]))
    return found


def kernels(how: Run) -> dict[str, Any]:
    """The bench of the kernels, under CUDA graphs."""
    from _kernels import cuda

    return cuda.run(how.seconds, how.keep, dry=how.dry)


def races(how: Run) -> dict[str, Any]:
    """Decisions repeated a thousand times: equal in all bits."""
    from _kernels import cases, cuda, gpu

    bench = cuda.CpuBench() if how.dry else cuda.CudaBench()
    rows, width = ((1,), 2100) if how.dry else ((1, 64), 128_256)
    flat = [gpu.Cell(cases.FLAT, count, width, "flat") for count in rows]  # these are sorted, by many programs
    all_cells = [*gpu.cells((width,), rows)[: 1 if how.dry else None], *flat]
    found = cuda.races(bench, all_cells, 3 if how.dry else 1000, lambda cells: how.keep({"cells": cells}))
    if any(cell["differ"] for cell in found):
        raise SystemExit(f"repetitions differ: {[cell for cell in found if cell['differ']]}")
    return {"cells": found}


def toy() -> Any:
    """Shapes for a dry run, wide enough that planted tokens stand far from the others."""
    from proxytune.throughput.shapes import Shape, Trio

    return Trio("toy", Shape(128, 1, 4, 2, 64, 97), Shape(96, 1, 4, 4, 64, 90))


def throughput(number: int, *, real: bool = False, graphs: bool = False) -> Callable[[Run], dict[str, Any]]:
    """The methods on a family of random members: a tenth of a published shape, or that itself."""

    def run(how: Run) -> dict[str, Any]:
        from proxytune.throughput.methods import COMPOSITE, FUSED, GRAPHS, NAIVE, TUNED
        from proxytune.throughput.run import Plan, measure
        from proxytune.throughput.shapes import PUBLISHED, TENTHS
        from proxytune.throughput.subjects import Cell, Subject, random_subject

        trio = (PUBLISHED if real else TENTHS)[number]
        cells = (Cell(8, 24), Cell(8, 16, 8, "sampled"))
        # Compiling takes the time of the other methods.
        only: tuple[str, ...] | None = (TUNED, NAIVE, COMPOSITE, FUSED, GRAPHS) if graphs else None
        if how.dry:
            for shape in (trio.base, trio.small):
                shape.build(dtype=torch.bfloat16, device="meta")
            trio, cells = toy(), (Cell(8, 3 if graphs else 2),)
            if number or real:  # the others do the same with all toys
                only = (COMPOSITE, GRAPHS) if graphs else (FUSED,)
                cells = cells if graphs else (Cell(8, 1),)

        def build() -> Subject:
            dtype = torch.float32 if how.dry else torch.bfloat16  # slow on some CPUs
            subject = random_subject(trio, dtype=dtype, device=how.device)
            subject.dry = how.dry
            return subject

        plan = Plan(
            build, cells, 1 if how.dry else 3, how.seconds, rates=() if only else (0.7, 0.9), graphs=graphs, only=only
        )
        return measure([plan], gpu=not how.dry, keep=how.keep)

    return run


def lora_pair(how: Run) -> dict[str, Any]:
    """Expert and antiexpert as one model, with a LoRA and without, in one pass."""
    import copy

    import bench_lora_pair as bench
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    smaller = {"num_hidden_layers": 1, "hidden_size": 144, "intermediate_size": 64, "vocab_size": 4096}
    smaller = smaller if how.dry else {}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**(bench.SHAPE | smaller))).to(how.device, torch.bfloat16).eval()
    config = peft.LoraConfig(r=8, target_modules=bench.TARGETS["q_proj, v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(plain), config).eval()

    def clock() -> float:
        if not how.dry:
            torch.cuda.synchronize()
        return time.perf_counter()

    batches, rounds = ((1,), 1) if how.dry else (bench.BATCHES, 20)
    found: list[dict[str, Any]] = []
    for batch in batches:
        found.append(bench.cell(plain, tuned, batch, rounds, clock))
        how.keep({"cells": found})
    return {"cells": found}


def trace(how: Run) -> dict[str, Any]:
    """A profile of a fused step and of a speculative round, as Chrome traces of at most 5 MB."""
    from torch.profiler import ProfilerActivity, profile

    from proxytune import FusedDecoding, SpeculativeDecoding
    from proxytune.throughput.shapes import TENTHS
    from proxytune.throughput.subjects import Cell, random_subject

    subject = random_subject(toy() if how.dry else TENTHS[0], device=how.device)
    loops = {"fused step": (FusedDecoding(seed=0), 2), "speculative round": (SpeculativeDecoding(seed=0), 4)}
    found: dict[str, Any] = {}
    for name, (loop, new) in loops.items():
        cell = Cell(8, new)
        ids = subject.prompts(cell)

        def once(ids: torch.Tensor = ids, cell: Cell = cell, loop: Any = loop) -> None:
            subject.steered.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=cell.config, custom_generate=loop
            )

        once()
        with profile(activities=[ProfilerActivity.CPU, *([] if how.dry else [ProfilerActivity.CUDA])]) as seen:
            once()
        file = how.out / f"trace of a {name}.json"
        seen.export_chrome_trace(str(file))
        size = file.stat().st_size
        if size > (0 if how.dry else LARGEST):  # a dry run compresses, too
            file = packed(file)
        found[name] = {"tokens": new, "bytes": size, "file": file.name if file.exists() else "left out: too large"}
        how.keep(found)
    return found


def packed(file: Path) -> Path:
    """A file compressed, as trace viewers take it, in its place; neither if that is too large as well."""
    into = file.with_name(file.name + ".gz")
    into.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    if into.stat().st_size > LARGEST:
        into.unlink()
    return into


PARTS: dict[str, Part] = {
    "correctness": Part(90.0, correctness),
    "kernels": Part(120.0, kernels),
    "races": Part(20.0, races),
    "throughput, 13 + 7 + 7, a tenth": Part(45.0, throughput(0)),
    "throughput, 32 + 1.5 + 1.5, a tenth": Part(45.0, throughput(1)),
    "throughput, 8 + 1 + 1, a tenth": Part(35.0, throughput(2)),
    "LoRA pair": Part(15.0, lora_pair),
    "trace": Part(20.0, trace),
    "throughput, 8 + 1 + 1, a tenth, compiled": Part(75.0, throughput(2, graphs=True)),
    "graphs": Part(40.0, graphs),
    "throughput, 8 + 1 + 1": Part(35.0, throughput(2, real=True)),
}
"""In order of value."""


@functools.cache
def code() -> str:
    """A hash of the code that is measured."""
    of = hashlib.sha256()
    for file in sorted(x for folder in ("kernels", "proxytune", "benches") for x in (ROOT / folder).rglob("*.py")):
        of.update(file.read_bytes())
    return of.hexdigest()[:16]


def run_part(name: str, seconds: float, out: Path, dry: bool) -> None:
    """Run a part in this process; it writes its file whenever it has something."""
    file = file_of(out, name)
    began = time.monotonic()

    def write(status: str, found: dict[str, Any]) -> None:
        said = {"status": status, "code": code(), "seconds": round(time.monotonic() - began, 1), "found": found}
        if dry:
            said["dry run"] = True
        exchange(file, said, "results of a GPU run")

    last: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        nonlocal last
        last = found
        write("partly run", found)

    try:
        write("run", PARTS[name].run(Run(seconds, out, dry, keep)))
    except (Exception, SystemExit) as error:  # noqa: BLE001, the other parts are independent of it
        write("failed", last | {"reason": f"{type(error).__name__}: {error}"})


def file_of(out: Path, name: str) -> Path:
    return out / f"{name.replace(', ', ' ').replace(' ', '_')}.json"


def kept(out: Path) -> dict[str, Any]:
    """What the folder has, by part, in the order of value."""
    files = {name: file_of(out, name) for name in PARTS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def run_all(seconds: float, out: Path, *, dry: bool = False, clock: Callable[[], float] = time.monotonic) -> list[str]:
    """Run the parts that the folder does not have, and merge; the names of those that it has."""
    began, now = clock(), code()
    before: list[str] = []
    share = seconds / (9 * 60)
    for name, part in PARTS.items():
        found = kept(out).get(name, {})
        if found.get("status") == "run" and found.get("code") == now and found.get("dry run", False) == dry:
            before.append(name)
            continue
        left = seconds - (clock() - began)
        if not dry and not torch.cuda.is_available():
            exchange(file_of(out, name), {"status": "not run", "reason": "no CUDA device"}, "results of a GPU run")
        elif left < RESERVE:
            if not found:
                exchange(file_of(out, name), {"status": "not run", "reason": "no time left"}, "results of a GPU run")
        else:
            given = min(part.seconds * share, left - RESERVE / 2)
            asked = ["--part", name, "--seconds", f"{given:.0f}", "--out", str(out), *(["--dry-run"] if dry else [])]
            if dry:
                main(asked)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):  # what it has written by then is kept
                    command = [sys.executable, __file__, *asked]
                    subprocess.run(command, cwd=ROOT, timeout=min(given + START, left))
            if name not in kept(out):
                exchange(
                    file_of(out, name),
                    {"status": "failed", "reason": "it ended without a result"},
                    "results of a GPU run",
                )
        print(line(name, kept(out)[name]), file=sys.stderr, flush=True)
    exchange(out / "run.json", {"code": now, "parts": kept(out)}, "results of a GPU run")
    return before


def line(name: str, found: dict[str, Any], before: bool = False) -> str:
    """A row of the table; `before` for a part that was kept from an earlier run."""
    reason = found.get("reason") or found.get("found", {}).get("reason", "")
    said = found["status"] + (f": {str(reason).splitlines()[0]}" if reason else "") + ", kept from before" * before
    return f"| {name} | {said} | {found.get('seconds', '')} |"


def table(parts: dict[str, Any], before: Collection[str] = ()) -> str:
    """What was run, what was kept from before, and what was not run."""
    rows = [line(name, parts.get(name, {"status": "not run"}), name in before) for name in PARTS]
    return "\n".join(["| part | | seconds |", "|---|---|--:|", *rows])


def write_results(parts: dict[str, Any]) -> None:
    """Move the figures into benches/results: the kernels' and the throughput's parts on a GPU."""
    if any(found.get("dry run") for found in parts.values()):
        raise SystemExit("--write: expected figures of a GPU; got those of a dry run. Run it without --dry-run first.")
    ran = {name: found["found"] for name, found in parts.items() if found["status"] in ("run", "partly run")}
    families = {name: found for name, found in ran.items() if name.startswith("throughput")}
    if "kernels" not in ran and not families:
        got = "; ".join(f"{name}: {found['status']}" for name, found in parts.items()) or "no results at all"
        raise SystemExit(
            f"--write: expected a folder with figures of a GPU, of the kernels or of throughput; got {got}. Run it on "
            "a machine with a GPU, without --write."
        )
    import bench_kernels
    import bench_throughput

    if "kernels" in ran:
        record = json.loads(bench_kernels.RESULTS.read_text(encoding="utf-8"))
        exchange(bench_kernels.RESULTS, record | {"gpu": ran["kernels"]}, "results of a GPU run")
    if families:
        each = list(families.values())
        whole = each[0] | {"families": [family for found in each for family in found["families"]]}
        bench_throughput.write("gpu", whole)
    names = [name for name in ("kernels", *families) if name in ran]
    print(f"Written into {bench_kernels.RESULTS.parent}: {'; '.join(names)}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together [9]")
    parser.add_argument("--dry-run", action="store_true", help="at toy sizes, on a CPU")
    parser.add_argument(
        "--write", action="store_true", help="run nothing, keep the folder's figures in benches/results"
    )
    names = "; ".join(PARTS)
    parser.add_argument("--part", choices=PARTS, metavar="NAME", help=f"this part alone, in this process: {names}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for --part [60]")
    wanted = parser.parse_args(arguments)
    wanted.out = wanted.out.resolve()  # parts run in the checkout
    wanted.out.mkdir(parents=True, exist_ok=True)
    if wanted.part:
        run_part(wanted.part, wanted.seconds, wanted.out, wanted.dry_run)
    elif wanted.write:
        write_results(kept(wanted.out))
    else:
        try:
            before = run_all(60 * wanted.minutes, wanted.out, dry=wanted.dry_run)
        except KeyboardInterrupt:
            done = sum(found.get("status") == "run" for found in kept(wanted.out).values())
            print(f"\nInterrupted: {wanted.out} has {done} of {len(PARTS)} parts. The same command runs the others.")
            raise SystemExit(130) from None
        print(table(kept(wanted.out), before))


if __name__ == "__main__":
    main()
