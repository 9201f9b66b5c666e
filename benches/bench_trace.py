"""What recording a run costs: the same generation with and without, in turns, on the scaled families.

::

    python benches/bench_trace.py           measure, and print the table
    python benches/bench_trace.py --write   and keep it in results/trace.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

import proxytune
from proxytune import FusedDecoding
from proxytune.throughput.measure import ratio
from proxytune.throughput.shapes import SCALED
from proxytune.throughput.subjects import Cell, Subject, random_subject

RESULTS = Path(__file__).resolve().parent / "results" / "trace.json"
CELL = Cell(8, 40)
AIM = 1.05
"""The most that a recorded step may take, relative to the same step without."""


def compare(subject: Subject, loop: Any, rounds: int, cell: Cell = CELL) -> dict[str, Any]:
    """Seconds of a generation with and without recording, the two in turns."""
    model, ids = subject.steered, subject.prompts(cell)
    settings = {"generation_config": cell.config, "custom_generate": loop, "attention_mask": torch.ones_like(ids)}
    took: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for recorded in (False, True) if turn % 2 else (True, False):
            begin = time.perf_counter()
            if recorded:
                with proxytune.record(model):
                    model.generate(ids, **settings)
            else:
                model.generate(ids, **settings)
            if turn:  # the first one warms up
                took[recorded].append(time.perf_counter() - begin)
    ms = 1e3 * float(np.median(took[False])) / cell.new
    return {**ratio(took[True], took[False]), "ms_per_token": round(ms, 3)}


def trace_table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| a recorded generation, without recording = 1 | `generate()` | `FusedDecoding` |", "|---|--:|--:|"]
    for name, cells in record["families"].items():
        told = [f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in (cells["generate"], cells["fused"])]
        lines.append(f"| {name} | {' | '.join(told)} |")
    of = record["machine"]
    return "\n".join(lines) + (
        f"\n\nRandom Llamas scaled down, 40 tokens after 8, batch 1, greedy, {record['rounds']} rounds in turns; CPU "
        f"threads: 1, torch {of['torch']}, load {of['load']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--rounds", type=int, default=25, help="pairs of generations [25]")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    load = round(os.getloadavg()[0], 1)
    families = {}
    for trio in SCALED:
        subject = random_subject(trio)
        families[subject.name] = {
            name: compare(subject, loop, wanted.rounds)
            for name, loop in (("generate", None), ("fused", FusedDecoding(seed=0)))
        }
    record = {
        "command": "python benches/bench_trace.py --write",
        "rounds": wanted.rounds,
        "machine": {"torch": torch.__version__, "load": load},
        "families": families,
    }
    if wanted.write:
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(trace_table(record))


if __name__ == "__main__":
    main()
