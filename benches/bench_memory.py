"""How much memory a composition takes, compared with what its members take alone.

    python benches/bench_memory.py --write      measure (a minute) and keep benches/results/memory.json
    python benches/bench_memory.py              measure and print

Random Llamas of about 100, 19 and 19 million parameters in bfloat16 on the CPU, with prompts of 512 tokens: weights,
caches and activations at the moment of a `generate()` at which most are alive. Storages are counted where operators
make them (`live_bytes`), so the figures are exact and repeat; what a kernel takes and gives back inside one operator is
not seen. A figure is the peak of the composition over the sum of the three members' own peaks.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from live_bytes import counted, numpy_peak
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor
from proxytune.models.scoring import score

RESULTS = Path(__file__).parent / "results" / "memory.json"
ROLES = ("base", "expert", "antiexpert")
# hidden size, layers
BASE, SMALL = (768, 8), (256, 4)
VOCABULARY, PROMPT, NEW_TOKENS = 32_000, 512, 3
BATCHES = (1, 8)
CHUNKS: tuple[int | None, ...] = (None, 128)
"""Tokens of a prompt that are read at once: all, or so many."""
WAYS = ("model", "model, FusedDecoding", "processor")
SCORED = (512, 2048, 8192)
"""Tokens of a text that is scored, by members of a few layers: what counts there is the vocabulary."""


def llama(seed: int, hidden: int, layers: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A random Llama in bfloat16 with the proportions of a real one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def weights(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak(model: Any, ids: torch.Tensor, **run: Any) -> int:
    """The most bytes that a greedy `generate()` makes at once; the model's weights are not among them."""
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    with counted() as live:
        model.generate(ids, **how, **run)
    return live.peak


def measure(
    base: tuple[int, int] = BASE,
    small: tuple[int, int] = SMALL,
    *,
    vocabulary: int = VOCABULARY,
    prompt: int = PROMPT,
    batches: Sequence[int] = BATCHES,
    chunks: Sequence[int | None] = CHUNKS,
    scored: Sequence[int] = SCORED,
) -> dict[str, Any]:
    """The record: bytes of each member alone and of the composition, for each batch, chunk size and way to steer."""
    shapes = zip(ROLES, (base, small, small), strict=True)
    members = {role: llama(seed, *shape, vocabulary) for seed, (role, shape) in enumerate(shapes, 1)}
    every = sum(map(weights, members.values()))
    model = proxytune.wrap(**members, alpha=0.5, check_vocabulary=False)
    processor = ProxyTuningLogitsProcessor(members["expert"], members["antiexpert"], 0.5, check_vocabulary=False)
    cells = []
    for rows in batches:
        ids = torch.randint(3, vocabulary, (rows, prompt))
        alone = {role: weights(member) + peak(member, ids) for role, member in members.items()}
        for way in WAYS:
            for chunk in chunks:
                with ExitStack() as attached:
                    if way == "processor":
                        attached.enter_context(processor.attach(members["base"]))
                    run: dict[str, Any] = {"prefill_chunk_size": chunk}
                    if way == "model, FusedDecoding":
                        run["custom_generate"] = FusedDecoding(seed=0)
                    together = every + peak(members["base"] if way == "processor" else model, ids, **run)
                cells.append(
                    {
                        "batch": rows,
                        "way": way,
                        "chunk": chunk,
                        "bytes": together,
                        "alone": alone,
                        "share": round(together / sum(alone.values()), 4),
                    }
                )
    return {
        "command": "python benches/bench_memory.py --write",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "CPU",
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "parameters": {role: sum(p.numel() for p in member.parameters()) for role, member in members.items()},
        "vocabulary": vocabulary,
        "prompt": prompt,
        "new tokens": NEW_TOKENS,
        "cells": cells,
        "scoring": measure_scoring(vocabulary, scored),
    }


def measure_scoring(vocabulary: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Peak bytes of scoring one text, by `score` and by a forward pass with labels, beside the whole logits' bytes."""
    members = {role: llama(seed, 128, 1, vocabulary) for seed, role in enumerate(ROLES, 1)}
    for member in members.values():
        member.config.max_position_embeddings = max(lengths)
    model = proxytune.wrap(**members, alpha=0.5, check_vocabulary=False)
    cells = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (1, length))
        with counted() as scored:
            score(model, ids)
        numpys = numpy_peak(lambda ids=ids: score(model, ids))  # at most, if both peaks coincide
        with counted() as labelled:
            model(ids, labels=ids, use_cache=False)
        # Members in bfloat16 and their combination in float32.
        whole = length * vocabulary * (2 * len(members) + 4)
        cells.append({"tokens": length, "score": scored.peak + numpys, "labels": labelled.peak, "whole logits": whole})
    return cells


def scoring_block(record: dict[str, Any]) -> str:
    """The pages' table of scoring, from what `--write` keeps."""
    lines = [
        "| peak memory in MiB, by tokens of the text | "
        + " | ".join(f"{c['tokens']:,}" for c in record["scoring"])
        + " |"
    ]
    lines.append("|---|" + "--:|" * len(record["scoring"]))
    for name, title in (
        ("score", "`scoring.score`"),
        ("labels", "`model(ids, labels=ids)`, in parts by itself"),
        ("whole logits", "all positions' logits at once (computed)"),
    ):
        lines.append(f"| {title} | " + " | ".join(f"{c[name] / 2**20:,.0f}" for c in record["scoring"]) + " |")
    said = (
        f"Three Llamas of one layer with a vocabulary of {record['vocabulary']:,} in {record['dtype']} on the "
        f"{record['device']}; weights are not counted."
    )
    return "\n".join([*lines, "", said])


def memory_block(record: dict[str, Any]) -> str:
    """The pages' table, from what `--write` keeps."""
    batches = list(dict.fromkeys(cell["batch"] for cell in record["cells"]))
    lines = [
        "| peak memory, of the sum of the three alone | prompt read | "
        + " | ".join(f"{batch} prompt{'s' if batch > 1 else ''}" for batch in batches)
        + " |",
        "|---|---|" + "--:|" * len(batches),
    ]
    shares = {(cell["way"], cell["chunk"], cell["batch"]): cell["share"] for cell in record["cells"]}
    for way, chunk in dict.fromkeys((way, chunk) for way, chunk, _ in shares):
        read = "at once" if chunk is None else f"in chunks of {chunk}"
        cells = " | ".join(f"{shares[way, chunk, batch]:.2f}" for batch in batches)
        lines.append(f"| {way} | {read} | {cells} |")
    millions = ", ".join(f"{record['parameters'][role] / 1e6:.0f}" for role in ROLES)
    said = (
        f"Random Llamas of {millions} million parameters (base, expert, antiexpert) in {record['dtype']} on the "
        f"{record['device']}, prompts of {record['prompt']} tokens; weights, caches and activations together. Below 1 "
        "because only one member's activations are alive at a time."
    )
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the blocks that are combined at once grow with the threads
    record = measure()
    print(memory_block(record))
    print(scoring_block(record))
    if arguments.write:
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
