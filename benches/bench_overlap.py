"""Does it help on a CPU to run the members of a step at the same time, or to stack them?

    python benches/bench_overlap.py --write     measure (about 4 minutes) and keep benches/results/overlap.json
    python benches/bench_overlap.py             measure and print

Random Llamas in the ratios of published families, scaled down to fit, and the lab's shapes. One decode step after a
prompt of 32 tokens:

- in turn: base, expert, antiexpert, with all threads each (what the product does), or with one thread each;
- split: the base in one Python thread and the companions in another, the intra-op threads divided between them;
- shared: the same, with all threads for both.

And the companions' weight matrices alone: two products one after the other, or stacked into one batched product over
`[2, out, in]`, as a single forward pass of both would compute it.

All variants of a cell take turns in a random order, in rounds. A ratio is that of the medians to the first variant, its
interval by resampling rounds. Other work on the machine moves such figures, so the load is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from proxytune.models.members.cache_name import CACHE

RESULTS = Path(__file__).parent / "results" / "overlap.json"
# layers, hidden, intermediate, heads, key-value heads, vocabulary
Shape = tuple[int, int, int, int, int, int]
FAMILIES: dict[str, tuple[Shape, Shape]] = {
    "13B + 7B + 7B": ((10, 832, 2240, 13, 13, 8000), (8, 672, 1792, 12, 12, 8000)),
    "32B + 1.5B + 1.5B": ((16, 768, 4096, 12, 4, 16000), (7, 224, 1344, 4, 2, 16000)),
    "lab": ((4, 128, 352, 4, 4, 512), (2, 64, 128, 4, 4, 512)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES, ROUNDS, STEPS, PROMPT = (1, 8), 9, 3, 32


def model(shape: Shape, dtype: torch.dtype) -> LlamaForCausalLM:
    layers, hidden, inner, heads, shared, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        tie_word_embeddings=hidden < 500,  # like the small models of published families
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def ratio(times: Sequence[float], first: Sequence[float], draws: int = 1000) -> tuple[float, float, float]:
    """The ratio of two medians over paired rounds, with a 95 % interval."""
    generator, count = random.Random(0), len(times)
    found = []
    for _ in range(draws):
        rounds = [generator.randrange(count) for _ in range(count)]
        found.append(statistics.median(times[i] for i in rounds) / statistics.median(first[i] for i in rounds))
    found.sort()
    middle = statistics.median(times) / statistics.median(first)
    return middle, found[int(0.025 * draws)], found[int(0.975 * draws)]


def measured(
    ways: dict[str, Callable[[], None]], steps: int, after: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Milliseconds per step of each variant, and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        order = list(ways)
        random.Random(number).shuffle(order)
        for name in order:
            ways[name]()
            start = time.perf_counter()
            for _ in range(steps):
                ways[name]()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / steps)
            after()
    first = next(iter(times.values()))
    return {
        name: {
            "ms": round(1000 * statistics.median(taken), 3),
            "ratio": [round(x, 3) for x in ratio(taken, first)],
        }
        for name, taken in times.items()
    }


def threads_cell(family: str, dtype: str, batch: int, pool: ThreadPoolExecutor, threads: int) -> dict[str, Any]:
    base, small = FAMILIES[family]
    members = [model(shape, DTYPES[dtype]) for shape in (base, small, small)]
    caches = [DynamicCache(config=m.config) for m in members]
    ids = torch.randint(3, 500, (batch, 1))
    steps = STEPS * (4 if family == "lab" else 1)

    def forward(which: Sequence[int], count: int, tokens: torch.Tensor = ids) -> None:
        torch.set_num_threads(count)  # of the thread that calls it
        with torch.inference_mode():
            for i in which:
                members[i](input_ids=tokens, **{CACHE: caches[i]}, use_cache=True)

    def together(of_base: int, of_companions: int) -> None:
        companions = pool.submit(forward, (1, 2), of_companions)
        forward((0,), of_base)
        companions.result()

    def undo() -> None:
        for cache in caches:
            cache.crop(-(steps + 1))

    forward((0, 1, 2), threads, torch.randint(3, 500, (batch, PROMPT)))
    ways = {
        f"in turn, {threads} threads": lambda: forward((0, 1, 2), threads),
        "in turn, 1 thread": lambda: forward((0, 1, 2), 1),
        "split": lambda: together(max(1, threads // 2), max(1, threads // 2)),
        "shared": lambda: together(threads, threads),
    }
    found = measured(ways, steps, undo)
    torch.set_num_threads(threads)
    parameters = [round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for m in members]
    return {"family": family, "dtype": dtype, "batch": batch, "millions": parameters, "ways": found}


def stacking_cell(family: str, dtype: str, batch: int) -> dict[str, Any]:
    layers, hidden, inner, heads, shared, vocabulary = FAMILIES[family][1]
    head = hidden // heads
    shapes = [(hidden, hidden), (shared * head, hidden), (shared * head, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    stacked = [torch.randn(2, *shape).to(DTYPES[dtype]) for shape in shapes * layers + [(vocabulary, hidden)]]
    inputs = {n: torch.randn(2, batch, n).to(DTYPES[dtype]) for n in {w.shape[2] for w in stacked}}

    def after_each_other() -> None:
        for one in (0, 1):
            for weight in stacked:
                linear(inputs[weight.shape[2]][one], weight[one])

    def batched() -> None:
        for weight in stacked:
            torch.bmm(inputs[weight.shape[2]], weight.transpose(1, 2))

    with torch.inference_mode():
        found = measured({"after each other": after_each_other, "stacked": batched}, STEPS)
    return {"family": family, "dtype": dtype, "batch": batch, "ways": found}


def overlap_table(record: dict[str, Any]) -> str:
    """The README's block."""
    lines = [
        "| CPU, one step | B | in turn, ms | one thread | split | shared | stacked matrices |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell, pair in zip(record["threads_cells"], record["stacking_cells"], strict=True):
        first, *others = cell["ways"].values()
        shown = [way["ratio"] for way in others] + [pair["ways"]["stacked"]["ratio"]]
        lines.append(
            f"| {cell['family']}, {cell['dtype']} | {cell['batch']} | {first['ms']:,.1f} | "
            + " | ".join(f"{middle:.2f}× [{low:.2f}, {high:.2f}]" for middle, low, high in shown)
            + " |"
        )
    sizes = {c["family"]: c["millions"] for c in record["threads_cells"]}
    caption = (
        "Times relative to the members in turn with all threads (stacked: to one product after the other), 95 % "
        "intervals. "
        f"Random Llamas scaled down ({'; '.join(f'{f}: ' + ', '.join(map(str, m)) for f, m in sizes.items())} million "
        f"parameters), CPU threads: {record['threads']}, torch {record['torch']}; load of the machine: "
        f"{record['load before']:g}."
    )
    return "\n".join([*lines, "", caption])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": "python benches/bench_overlap.py --write",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "load before": round(load, 2),
        "threads_cells": [],
        "stacking_cells": [],
    }
    with ThreadPoolExecutor(1) as pool:
        for family in FAMILIES:
            for dtype in DTYPES if family != "lab" else ("float32",):
                for batch in BATCHES:
                    for name, cell in (
                        ("threads_cells", threads_cell(family, dtype, batch, pool, threads)),
                        ("stacking_cells", stacking_cell(family, dtype, batch)),
                    ):
                        record[name].append(cell)
                        print(family, dtype, batch, json.dumps(cell["ways"]), flush=True)
    record["load after"] = round(os.getloadavg()[0], 2)
    if wanted.write:
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
