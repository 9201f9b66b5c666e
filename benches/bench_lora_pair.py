"""What does a step of expert and antiexpert cost that are one model, with a LoRA and without?

    python benches/bench_lora_pair.py FOLDER --write    measure a model and keep benches/results/lora.json
    python benches/bench_lora_pair.py                   a random Llama of SmolLM2-135M's shape; print only

One decode step of B rows for both, after a prompt of 64 tokens:

- floor: one pass of 2B rows of the model without an adapter;
- pair: the members' own pass, LoRA (r = 8) on the rows of the expert alone;
- two passes: of the model with the adapter, not merged, and of the model without;
- mixed batch: PEFT's `adapter_names=`, in one pass of 2B rows.

The variants take turns in a random order, in rounds. Times are those of the process on the CPU, with one thread, so
that other work on the machine counts little. A ratio is that of the medians to the first variant, with a 95 % interval
by resampling rounds. Memory is that of the weights. The bytes of published shapes are computed, not measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_overlap import ratio
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from proxytune.costs.model_size import pass_bytes
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.member import Member
from proxytune.models.members.shared_pass import MemberPass, run_group
from proxytune.throughput.shapes import PUBLISHED

RESULTS = Path(__file__).parent / "results" / "lora.json"
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TARGETS: dict[str, Any] = {"q_proj, v_proj": ["q_proj", "v_proj"], "all linear layers": "all-linear"}
BATCHES, ROUNDS, PROMPT, CONTEXT = (1, 8), 40, 64, 264
AIMS = {"pair / floor": 1.08, "memory / two copies": 0.55}


def opened(place: str | None) -> Any:
    if place is None:
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


Clock = Callable[[], float]


def measured(
    ways: dict[str, Callable[[], Any]], rounds: int, after: Callable[[], None], clock: Clock = time.process_time
) -> dict[str, Any]:
    """Milliseconds of each variant by a clock of seconds, its ratios to the first and to two passes."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        order = list(ways)
        random.Random(number).shuffle(order)
        for name in order:
            start = clock()
            ways[name]()
            if number:  # the first round warms up
                taken[name].append(clock() - start)
        after()
    first, two = taken["floor"], taken["two passes"]
    return {
        name: {
            "ms": round(1000 * statistics.median(times), 2),
            "of floor": [round(x, 3) for x in ratio(times, first)],
            "of two passes": [round(x, 3) for x in ratio(times, two)],
        }
        for name, times in taken.items()
    }


def cell(plain: Any, tuned: Any, batch: int, rounds: int, clock: Clock = time.process_time) -> dict[str, Any]:
    """All variants at one batch size."""
    alone, expert = Member(plain, "plain"), Member(tuned, "expert")
    antiexpert = Member(tuned.get_base_model(), "antiexpert", adapter=False)
    generator = torch.Generator().manual_seed(0)
    prompt, token = (torch.randint(3, 4000, (batch, n), generator=generator).to(plain.device) for n in (PROMPT, 1))
    twice = torch.cat([token, token])
    caches: dict[str, Any] = {}

    def read(name: str, member: Member, ids: torch.Tensor) -> None:
        caches[name] = empty_cache(member.config)
        member.forward(ids, cache=caches[name], logits_to_keep=1)

    def one(member: Member, name: str, ids: torch.Tensor) -> Any:
        return member.forward(ids, cache=caches[name], logits_to_keep=1)

    def pair() -> Any:
        members = ((expert, "expert"), (antiexpert, "antiexpert"))
        return run_group([MemberPass(m, caches[n], token, None, None, None) for m, n in members], 1)

    def mixed() -> Any:
        names = ["default"] * batch + ["__base__"] * batch
        return tuned(input_ids=twice, **{CACHE: caches["mixed"]}, use_cache=True, logits_to_keep=1, adapter_names=names)

    ways = {
        "floor": lambda: one(alone, "floor", twice),
        "pair": pair,
        "two passes": lambda: (one(expert, "expert alone", token), one(antiexpert, "antiexpert alone", token)),
        "mixed batch": mixed,
    }

    def undo() -> None:
        for cache in caches.values():
            cache.crop(-1)

    with torch.no_grad():
        for name in ("floor", "mixed"):
            read(name, alone, torch.cat([prompt, prompt]))
        for name, member in (("expert", expert), ("antiexpert", antiexpert)):
            read(name, member, prompt)
            read(f"{name} alone", member, prompt)
        results = {name: way() for name, way in ways.items()}
        found = [torch.cat(list(results[name])) for name in ("pair", "two passes")]
        apart = float((found[0] - found[1]).abs().max() / found[1].abs().max())
        undo()
        return {"batch": batch, "apart": apart, "ways": measured(ways, rounds, undo, clock)}


def memory(plain: Any, tuned: Any) -> dict[str, float]:
    """Megabytes of weights: two copies, one with the adapter merged; and one copy with the adapter."""
    two = 2 * sum(p.numel() * p.element_size() for p in plain.parameters())
    one = sum(p.numel() * p.element_size() for p in tuned.parameters())
    return {"two copies": round(two / 1e6, 1), "one": round(one / 1e6, 1), "ratio": round(one / two, 4)}


def published() -> list[dict[str, Any]]:
    """Bytes of a step of published shapes, relative to the base's: companions apart, and as one model with a LoRA."""
    out = []
    for trio in PUBLISHED:
        base, small = (shape.build(dtype=torch.bfloat16, device="meta") for shape in (trio.base, trio.small))
        alone, apart = pass_bytes(base).at(context=CONTEXT), pass_bytes(small).at(context=CONTEXT)
        config = peft.LoraConfig(r=8, target_modules="all-linear")
        tuned = peft.get_peft_model(small, config, autocast_adapter_dtype=False)
        pair = pass_bytes(tuned, tuned.get_base_model()).at(context=CONTEXT)
        out.append({"name": trio.name, "apart": round(1 + 2 * apart / alone, 3), "pair": round(1 + pair / alone, 3)})
    return out


def lora_table(record: dict[str, Any]) -> str:
    """The README's block."""
    lines = [
        "| LoRA on | B | floor, ms | pair | two passes | PEFT's mixed batch | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for family in record["families"]:
        for one in family["cells"]:
            ways = one["ways"]
            shown = [ways[name]["of floor"] for name in ("pair", "two passes", "mixed batch")]
            lines.append(
                f"| {family['targets']} | {one['batch']} | {ways['floor']['ms']:,.1f} | "
                + " | ".join(f"{middle:.2f}× [{low:.2f}, {high:.2f}]" for middle, low, high in shown)
                + f" | {family['memory']['ratio']:.2f}× |"
            )
    shapes = "; ".join(f"{one['name']} {one['apart']:.2f} → {one['pair']:.2f}" for one in record["published"])
    caption = (
        "Times relative to one pass of 2B rows without an adapter, 95 % intervals; memory of the weights relative to "
        f"two copies. {record['model']}, r = 8, CPU threads: {record['threads']}, torch {record['torch']}; load of the "
        f"machine: {record['load before']:g}. Bytes per token relative to the base alone, computed, two companions → "
        f"one with a LoRA: {shapes}."
    )
    return "\n".join([*lines, "", caption])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", help="a Llama in a folder, e.g. SmolLM2-135M [random weights of its shape]"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)
    load, plain, families = os.getloadavg()[0], opened(wanted.folder), []
    for name, targets in TARGETS.items():
        config = peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
        tuned = peft.get_peft_model(copy.deepcopy(plain), config).eval()
        cells = [cell(plain, tuned, batch, wanted.rounds) for batch in BATCHES]
        families.append({"targets": name, "memory": memory(plain, tuned), "cells": cells})
    record = {
        "command": "python benches/bench_lora_pair.py FOLDER --write",
        "model": "SmolLM2-135M in float32" if wanted.folder else "A random Llama of SmolLM2-135M's shape in float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "load before": round(load, 2),
        "aims": AIMS,
        "families": families,
        "published": published(),
    }
    if wanted.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(lora_table(record))


if __name__ == "__main__":
    main()
