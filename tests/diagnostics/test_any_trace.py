"""Whatever the trace, a diagnosis is a finding with sound figures, or an error that says what is missing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.simulated import run, text

from proxytune import diagnostics
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace

ONE = ["calibration", "coverage", "degenerate", "distinct_answers", "entropy_profile", "formats", "kl_drift"]
ONE += ["length_effect", "on_policy_signature", "search_scaling", "spread"]
TWO = ["crossing", "fork_change"]
LAW = ["entropy_law"]


def anything(seed: int) -> Trace:
    """Few or many prompts, samples and tokens; graded or not, with answers or not, all alike or not."""
    rng = np.random.default_rng(seed)
    prompts, most, longest = rng.choice([1, 5, 6, 12]), rng.choice([1, 2, 5]), rng.choice([1, 3, 40])
    graded, answered, worded, budgeted, given = rng.random(5) < [0.8, 0.7, 0.7, 0.5, 0.3]
    extreme = rng.choice([0.0, 1.0, 1e-30, 30.0])
    texts = []
    for i in range(prompts):
        for j in range(rng.integers(1, most + 1) if rng.random() < 0.3 else most):
            count = int(rng.integers(1, longest + 1))
            fields: dict[str, Any] = {
                "entropy": rng.random(count) * extreme,
                "logprobs": -rng.random(count) * extreme,
                "tokens": rng.integers(0, rng.choice([1, 50]), count),
                "fork": rng.integers(-1, 2, count),
                "given": bool(given and j % 2),
            }
            if graded:
                fields["grade"] = float(rng.choice([0.0, 0.5, 1.0]))
            if answered:
                fields["answer"] = str(rng.choice(["", "a", "b"])) if rng.random() < 0.9 else None
            if worded:
                fields["pieces"] = tuple(str(rng.choice(["a", ".", "\n", "1", "="])) for _ in range(count))
            fields["facts"] = {"budget": int(2**j)} if budgeted else {}
            texts.append(text(i, **fields))
    return run(texts)


def test_all_diagnoses_are_here() -> None:
    assert sorted([*ONE, *TWO, *LAW, "Finding", "losses", "ordered"]) == sorted(diagnostics.__all__)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("calibration", '"stated"'),
        ("degenerate", "at least 30 %"),
        ("entropy_law", "R = −a·e^H"),
        ("formats", "number (digits without letters)"),
        ("length_effect", "within"),
        ("losses", "over-thinking"),
        ("search_scaling", 'facts["budget"]'),
        ("spread", "advantage"),
    ],
)
def test_help_of_a_function_says_what_it_finds(name: str, words: str) -> None:
    """`help()` cannot reach a module that a function of the same name hides."""
    said = " ".join((getattr(diagnostics, name).__doc__ or "").split())
    assert words in said.replace("*within*", "within")
    assert "see the module" not in said
    assert "Args:" in said


def intervals(value: Any) -> Iterator[Interval]:
    if isinstance(value, Interval):
        yield value
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from intervals(getattr(value, name))
    elif isinstance(value, dict):
        yield from intervals(tuple(value.values()))
    elif isinstance(value, tuple):
        for one in value:
            yield from intervals(one)


@functools.cache
def findings(seed: int) -> list[diagnostics.Finding]:
    trace, other = anything(seed), anything(seed + 1000)
    calls = [(name, (trace,)) for name in ONE] + [(name, (trace, other)) for name in TWO]
    calls += [(name, ([trace, other, anything(seed + 2000), anything(seed + 3000)],)) for name in LAW]
    made: list[diagnostics.Finding] = []
    for name, args in calls:
        refusal = ""
        try:
            made.append(getattr(diagnostics, name)(*args, draws=60))
        except InputError as failure:
            refusal = str(failure)
        assert not refusal or ("expected" in refusal and "nan" not in refusal), (name, refusal)
    return made


@pytest.mark.parametrize("seed", range(30))
def test_figures_are_sound_or_refused(seed: int) -> None:
    for found in findings(seed):
        assert found.prompts >= 5
        assert found.tokens >= found.texts >= found.prompts
        assert found.says.endswith(".")
        assert "nan" not in found.says
        held = list(intervals(found))
        assert held
        for one in held:
            assert type(one.value) is type(one.low) is type(one.high) is float
            assert one.low <= one.value <= one.high
            assert math.isfinite(one.value)


def test_most_of_them_were_made() -> None:
    made = {type(found).__name__ for seed in range(30) for found in findings(seed)}
    assert len(made) >= 11
