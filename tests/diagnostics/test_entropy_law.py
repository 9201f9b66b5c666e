"""The law of reward and entropy, on checkpoints that follow it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, run, shuffled, text

from proxytune.diagnostics import entropy_law
from proxytune.errors import InputError
from proxytune.trace import Trace

A, B = 0.3, 1.1
ENTROPIES = (0.9, 0.7, 0.45, 0.25, 0.1)


def training(seed: int, *, scatter: float = 0.0, prompts: int = 20, samples: int = 8) -> list[Trace]:
    """Checkpoints on prompts that are easy or hard for all of them; `scatter` is their distance from the law."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(-0.2, 0.2, size=(prompts, 1))
    runs = []
    for entropy in ENTROPIES:
        reward = B - A * math.exp(entropy) + rng.normal(0, scatter)
        right = rng.random((prompts, samples)) < np.clip(reward + hardness, 0, 1)
        tokens = rng.gamma(8, entropy / 8, size=(prompts, samples, 6))
        runs.append(
            run(
                [
                    text(i, entropy=tokens[i, j], grade=float(right[i, j]))
                    for i in range(prompts)
                    for j in range(samples)
                ]
            )
        )
    return runs


@pytest.mark.parametrize("scatter", [0.0, 0.05])
def test_the_law_covers_the_truth(scatter: float) -> None:
    found = [entropy_law(training(seed, scatter=scatter, samples=4), **FAST) for seed in range(40)]
    assert sum(A in one.a for one in found) >= 35
    assert sum(B in one.b for one in found) >= 35
    assert sum(B - A in one.ceiling for one in found) >= 35


def exact(prompts: int = 6) -> list[Trace]:
    """R falls by 0.25 for each unit of e^H, exactly."""
    return [
        run([text(i, entropy=[math.log(x)] * 3, grade=float(j < right)) for i in range(prompts) for j in range(4)])
        for x, right in ((1.5, 3), (2.5, 2), (3.5, 1), (4.5, 0))
    ]


def test_the_law_in_closed_form() -> None:
    found = entropy_law(exact())
    assert (found.a.value, found.b.value, found.ceiling.value) == pytest.approx((0.25, 1.125, 0.875))
    assert found.rmse == pytest.approx(0, abs=1e-6)
    assert (found.a.low, found.a.high) == pytest.approx((0.25, 0.25), abs=1e-6)
    assert (found.prompts, found.texts, found.tokens) == (6, 96, 288)
    assert found.points[1] == pytest.approx((math.log(2.5), 0.5))
    assert "traded for reward, with a ceiling of 0.875" in found.says


def test_what_is_not_told_is_said() -> None:
    rng = np.random.default_rng(0)
    runs = [
        run([text(i, entropy=[h] * 3, grade=float(rng.random() < 0.5)) for i in range(6)]) for h in (0.2, 0.4, 0.6, 0.8)
    ]
    assert "is not told" in entropy_law(runs, **FAST).says


def test_the_order_of_texts_does_not_matter() -> None:
    runs = training(0, prompts=6, samples=2)
    assert_same(entropy_law(runs, **FAST), entropy_law([shuffled(one) for one in runs], **FAST))
    back = entropy_law(runs[::-1], **FAST)
    assert back.a.value == pytest.approx(entropy_law(runs, **FAST).a.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: entropy_law(exact()[:3]), "entropy_law: expected runs of at least 4 checkpoints; got 3. Record more"),
        (lambda: entropy_law(exact(4)), "prompts that all have: expected texts of at least 5 prompts.* got 4"),
        (lambda: entropy_law(exact()[:1] * 4), "checkpoints of different entropy; got 0.4055 nats in all"),
        (
            lambda: entropy_law([run(one.texts, temperature=t) for one, t in zip(exact(), (1, 1, 2, 3), strict=True)]),
            r"checkpoints, run at one temperature; got about\['temperature'\] of 1, 2, 3",
        ),
        (lambda: entropy_law([*exact()[1:], run([text(i) for i in range(6)])]), "a grade for each text"),
        (lambda: entropy_law([*exact()[1:], "x"]), r"checkpoints\[3\]: expected a proxytune.trace.Trace"),  # type: ignore[list-item]
        (lambda: entropy_law([*exact()[1:], run(exact()[0].texts, loop="ForkDecoding")]), "Draw independent samples"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
