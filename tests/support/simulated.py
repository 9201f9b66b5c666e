"""Traces of runs whose truth is known, made fast: only what a diagnosis reads is given."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from proxytune.diagnostics import Finding
from proxytune.stats.bootstrap import Interval
from proxytune.trace import FIELDS, SIGNALS, UNKNOWN, Trace, TracedText

FAST: Any = {"draws": 300, "seed": 0}
"""Settings for tests: few resamples."""


@functools.cache
def _blank(count: int, top: int) -> dict[str, Any]:
    made = {
        name: np.zeros((count, *((2, top) if dimensions == 3 else ())), dtype)
        for name, (dtype, dimensions) in FIELDS.items()
    }
    return made | {name: np.full(count, UNKNOWN, np.int8) for name in SIGNALS}


def text(prompt: int, count: int = 1, *, top: int = 1, **fields: Any) -> TracedText:
    """A text of `count` zeros after prompt number `prompt`; arrays are cast as a trace wants them."""
    for name, value in fields.items():
        if name in FIELDS:
            fields[name] = np.asarray(value, FIELDS[name][0])
            count = len(fields[name])
    # Thousands are made: one of each form is checked, the others are copies with other contents.
    form = (count, top, tuple(fields))
    if form not in _CHECKED:
        _CHECKED[form] = TracedText(prompt_ids=np.zeros(1, np.int32), **_blank(count, top) | fields)
    made = object.__new__(TracedText)
    vars(made).update(vars(_CHECKED[form]), prompt_ids=np.array([prompt], np.int32), **fields)
    return made


_CHECKED: dict[tuple[int, int, tuple[str, ...]], TracedText] = {}


def run(texts: Sequence[TracedText], **about: Any) -> Trace:
    """A trace of a plain model."""
    top = texts[0].top_ids.shape[2] if texts else 1
    return Trace(sources=("combined", "base"), top=top, texts=tuple(texts), about=about)


def shuffled(trace: Trace, seed: int = 1) -> Trace:
    """The same texts in another order."""
    texts = list(trace.texts)
    random.Random(seed).shuffle(texts)
    return replace(trace, texts=tuple(texts))


def covered(truth: float, interval: Callable[[int], Interval], seeds: int) -> int:
    """How many of the intervals made with `seeds` seeds hold the truth."""
    return sum(truth in interval(seed) for seed in range(seeds))


def assert_same(a: Any, b: Any) -> None:
    """Two findings agree, up to rounding of sums."""
    assert type(a) is type(b)
    if isinstance(a, (Finding, Interval)) or hasattr(a, "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(tuple(a.values()), tuple(b.values()))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    else:
        assert a == b
