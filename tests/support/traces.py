"""Traces with random contents, for what reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxytune.trace import SIGNALS, UNKNOWN, Trace, TracedText

SOURCES = ("combined", "base", "expert", "antiexpert")


def text_of(count: int = 5, *, seed: int = 0, sources: int = 4, top: int = 3, **fields: Any) -> TracedText:
    """A text of `count` tokens; `fields` replace what is random."""
    random = np.random.default_rng(seed)

    def floats() -> Any:
        return random.random(count).astype(np.float32)

    made: dict[str, Any] = {
        "prompt_ids": np.arange(3, dtype=np.int32),
        "tokens": random.integers(0, 99, count).astype(np.int32),
        "logprobs": -floats(),
        "entropy": floats(),
        "kl": floats(),
        "shift": floats() - np.float32(0.5),
        "base_rank": random.integers(0, 3, count).astype(np.int32),
        **{name: np.full(count, UNKNOWN, np.int8) for name in SIGNALS},
        "top_ids": random.integers(0, 99, (count, sources, top)).astype(np.int32),
        "top_logprobs": -np.sort(random.random((count, sources, top)).astype(np.float32)),
    }
    return TracedText(**made | fields)


def trace_of(*texts: TracedText, **about: Any) -> Trace:
    """A trace of texts made by `text_of`."""
    return Trace(sources=SOURCES, top=3, texts=texts, about=about)
