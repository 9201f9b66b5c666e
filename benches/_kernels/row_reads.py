"""How often a truncated draw reads its row, counted in Triton's interpreter: every element that a kernel loads.

    TRITON_INTERPRET=1 python -m _kernels.row_reads 32000 128256   # in benches/; prints JSON

"row" is what is read of the logits, "workspaces" all else, both over the width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from proxytune import ops
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "flat, p .5": ("flat", {"top_p": 0.5}),
    "flat, p .9": ("flat", {"top_p": 0.9}),
    "flat, p .99": ("flat", {"top_p": 0.99}),
    "constant, p .9": ("constant", {"top_p": 0.9}),
    "constant, k 50, p .9": ("constant", {"top_k": 50, "top_p": 0.9}),
    "flat, k 5,000, p .9, min-p": ("flat", {"top_k": 5000, "top_p": 0.9, "min_p": 1e-3}),
    "Zipf, p .9": ("Zipf", {"top_p": 0.9}),
    "Zipf, T 2, min-p": ("Zipf", {"temperature": 2.0, "min_p": 1e-3}),
    "like a language model's, p .9": ("peaked", {"top_p": 0.9}),
    "like a language model's, k 50, p .9": ("peaked", {"top_k": 50, "top_p": 0.9}),
}
"""Row and settings by name."""


def row_like(kind: str, width: int) -> torch.Tensor:
    """A row of logits `[1, width]`, float32: "flat" is normal with a standard deviation of 2, "Zipf" −log rank."""
    random = torch.Generator().manual_seed(width)
    noise = torch.randn(1, width, generator=random)
    if kind == "flat":
        return 2 * noise
    if kind == "constant":
        return torch.zeros(1, width)
    rank = noise.argsort(1).float() + 1
    if kind == "Zipf":
        return -rank.log()
    return 15 - 2.2 * rank.log() + 0.3 * torch.randn(1, width, generator=random)


@contextmanager
def counting(row: torch.Tensor) -> Iterator[dict[str, int]]:
    """Count the elements loaded of `row`, and of everything else, while this is open."""
    counts = {"row": 0, "workspaces": 0}
    builder = type(interpreter.interpreter_builder)
    load = builder.create_masked_load
    first, last = row.data_ptr(), row.data_ptr() + row.numel() * row.element_size()

    def counted(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        there = ptrs.data[mask.data]
        own = int(((there >= first) & (there < last)).sum())
        counts["row"] += own
        # What all lanes read of one place is read once.
        counts["workspaces"] += np.unique(there).size if own == 0 else there.size - own
        return load(self, ptrs, mask, *rest)

    builder.create_masked_load = counted
    try:
        yield counts
    finally:
        builder.create_masked_load = load


def row_reads(name: str, width: int) -> dict[str, float]:
    """Elements loaded by one draw, over the width."""
    kind, settings = CASES[name]
    row = row_like(kind, width)
    sampling, noise = SamplingParams.of(1, **settings), Noise.of(1, seed=1, position=7)
    with counting(row) as counts:
        ops.step([row], sampling=sampling, noise=noise, impl="triton")
    return {what: round(n / width, 3) for what, n in counts.items()}


def main() -> None:
    found = {width: {name: row_reads(name, int(width)) for name in CASES} for width in sys.argv[1:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
