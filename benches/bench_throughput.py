"""Measure what a steered token costs compared with a tuned model's, for every method, and keep the results.

::

    python benches/bench_throughput.py --write          measure the CPU part and keep it
    python benches/bench_throughput.py --write --quick  the set of `proxytune bench`, in minutes
    python benches/bench_throughput.py --write --gpu    the GPU part only, under ten minutes; fails without a GPU
    python benches/bench_throughput.py --write --gpu --long   the same with the protocol's own lengths
    python benches/bench_throughput.py --markdown       the README's tables, from the JSON
    pytest benches/bench_throughput.py --benchmark-only each method on the lab's family, by pytest-benchmark

Writes benches/results/throughput.json after each family; `proxytune.throughput.run` defines the measurements. On the
CPU: the lab's family with its own acceptance, and random members in the ratio of 13B + 7B + 7B and 32B + 1.5B + 1.5B.
On a GPU: random members of these shapes and of 8B + 1B + 1B, in bfloat16. Acceptance in random members is planted and
labelled so. What was not run is marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from proxytune.throughput.byte_floors import published_floors
from proxytune.throughput.counters import FirstToken
from proxytune.throughput.methods import RATES, methods_for
from proxytune.throughput.report import cell_name, interval, markdown, summary
from proxytune.throughput.run import cpu_plans, gpu_plans, measure
from proxytune.throughput.shapes import PUBLISHED
from proxytune.throughput.subjects import Cell, Subject, lab_subject

RESULTS = Path(__file__).resolve().parent / "results" / "throughput.json"
DEADLINE = 420.0
"""Seconds after which a GPU run starts no further family."""
CELL = Cell(8, 16)


def kept() -> dict[str, Any]:
    """The kept JSON; parts that are missing are marked as not run."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    reason = "no CUDA device" if not torch.cuda.is_available() else "not requested"
    return {
        "command": "python benches/bench_throughput.py --write",
        "cpu": found.get("cpu", {"status": "not run", "reason": "not requested"}),
        "gpu": found.get("gpu", {"status": "not run", "reason": reason}),
        "floors": [published_floors(trio, RATES) for trio in PUBLISHED],
    }


def write(part: str, found: dict[str, Any]) -> None:
    """Replace one part of the JSON."""
    record = kept() | {part: found}
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def cost_table(record: dict[str, Any]) -> str:
    """What a token costs, in one table for each device."""
    found = {words: record[part] for part, words in (("cpu", "On a CPU"), ("gpu", "On a GPU"))}
    return "\n\n".join(
        summary(part) if part["status"] == "run" else f"{words}: not run ({part['reason']})."
        for words, part in found.items()
    )


def throughput_table(record: dict[str, Any]) -> str:
    """Both parts as Markdown."""
    blocks = []
    for part, words in (("cpu", "On a CPU"), ("gpu", "On a GPU")):
        found = record[part]
        blocks.append(markdown(found) if found["status"] == "run" else f"{words}: not run ({found['reason']}).")
    return "\n\n".join([*blocks, floors_table(record["floors"])])


def speculation_table(record: dict[str, Any]) -> str:
    """Speculation beside the loop without drafts, for one text and for batches, and the floors."""
    families = record["cpu"]["families"]
    firsts = [family["cells"][0] for family in families]
    names = ["fused loop", *dict.fromkeys(n for cell in firsts for n in cell["methods"] if n.startswith("speculation"))]
    lines = [
        "| time per token, tuned alone = 1 | "
        + " | ".join(f"{family['name']}, {cell_name(cell)}" for family, cell in zip(families, firsts, strict=True))
        + " |",
        "|---|" + "--:|" * len(families),
        *(
            f"| {name} | {' | '.join(_with_acceptance(cell['methods'].get(name)) for cell in firsts)} |"
            for name in names
        ),
    ]
    batches = [
        "| speculation (0.7 planted) against the fused loop | " + " | ".join(f["name"] for f in families) + " |",
        "|---|" + "--:|" * len(families),
    ]
    for rows in (1, 8, 32):
        cells = [
            next(
                cell
                for cell in family["cells"]
                if (cell["rows"], cell["setting"], cell["prompt"]) == (rows, "greedy", 8)
            )
            for family in families
        ]
        batches.append(f"| batch {rows} | {' | '.join(_against_fused(cell) for cell in cells)} |")
    return "\n\n".join(["\n".join(lines), "\n".join(batches), floors_table(record["floors"])])


def _with_acceptance(found: dict[str, Any] | None) -> str:
    if found is None or found["status"] != "run":
        return ""
    accepted = found.get("acceptance")
    return interval(found["over_tuned"]) + ("" if accepted is None else f", {accepted:.2f} accepted")


def _against_fused(cell: dict[str, Any]) -> str:
    """Time per token, and the share of accepted drafts."""
    methods = cell["methods"]
    found = methods.get("speculation") or methods["speculation, 0.7 planted"]
    time = found["ms_per_token"] / methods["fused loop"]["ms_per_token"]
    accepted = found.get("acceptance")
    return f"{time:.2f} ×, " + ("nothing drafted" if accepted is None else f"{accepted:.2f} accepted")


def floors_table(floors: Sequence[dict[str, Any]]) -> str:
    """Floors of the published shapes by bytes alone."""
    rates = [one["acceptance"] for one in floors[0]["speculation"]]
    heads = ["three passes per token", *(f"speculation, {rate:g} accepted" for rate in rates if rate)]
    lines = [
        "| bytes per token, tuned = 1 (draft length) | " + " | ".join(heads) + " |",
        "|---|" + "--:|" * len(heads),
    ]
    for one in floors:
        ratios = [f"{of['ratio']:.2f} ({of['drafted']})" for of in one["speculation"] if of["acceptance"]]
        lines.append(f"| {one['name']} | " + " | ".join([f"{one['step']:.2f}", *ratios]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--quick", action="store_true", help="the CPU set of `proxytune bench`")
    parser.add_argument("--gpu", action="store_true", help="the GPU part only")
    parser.add_argument("--long", action="store_true", help="the protocol's own lengths on a GPU")
    parser.add_argument("--markdown", action="store_true", help="print the kept tables, measure nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    wanted = parser.parse_args(arguments)
    if wanted.markdown:
        print(throughput_table(kept()))
        return
    if wanted.gpu and not torch.cuda.is_available():
        raise SystemExit("bench_throughput --gpu: expected a CUDA device; got none. Leave --gpu out for the CPU part.")
    torch.set_num_threads(wanted.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    part = "gpu" if wanted.gpu else "cpu"
    flags = " ".join(f"--{name}" for name in ("write", "quick", "gpu", "long") if getattr(wanted, name))
    command = f"python benches/bench_throughput.py {flags}".strip()
    if wanted.gpu:
        plans, deadline = gpu_plans("full" if wanted.long else "quick"), float("inf") if wanted.long else DEADLINE
    else:
        plans, deadline = cpu_plans("quick" if wanted.quick else "full"), float("inf")
    found = measure(
        plans,
        gpu=wanted.gpu,
        deadline=deadline,
        report=lambda text, done, total: print(f"{done:.1f} of {total} rounds: {text}", file=sys.stderr, flush=True),
        keep=lambda so_far: write(part, so_far | {"command": command}) if wanted.write else None,
    )
    print(f"Measured now: the {part.upper()} part. The other is as kept in {RESULTS.name}.", file=sys.stderr)
    print(throughput_table(kept() | {part: found}))


# --- pytest-benchmark ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.set_num_threads(1)
    return lab_subject()


NAMES = (
    "base alone", "tuned alone", "expert alone", "naive loop", "processor door", "composite door", "fused loop",
    "fused, overlap", "speculation",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_throughput(benchmark: Any, subject: Subject, name: str) -> None:
    (method,) = (method for method in methods_for(subject) if method.name == name)
    if reason := method.missing(subject):
        pytest.skip(reason)
    ids, config = subject.prompts(CELL), CELL.config
    benchmark.group = f"throughput, {CELL.name}"
    ran = benchmark.pedantic(
        lambda run: run(ids, config, FirstToken(subject.device)),
        setup=lambda: ((method.prepare(subject),), {}),
        rounds=5,
        warmup_rounds=1,
    )
    assert ran.sequences.shape == (1, CELL.prompt + CELL.new)


if __name__ == "__main__":
    main()
