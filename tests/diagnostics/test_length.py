"""Accuracy against length, on texts whose accuracy is a known function of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, run, shuffled, text

from proxytune.diagnostics import length_effect
from proxytune.diagnostics.length import LengthEffect
from proxytune.errors import InputError
from proxytune.trace import Trace


def policy(
    seed: int,
    curve: Callable[[Any], Any],
    *,
    prompts: int = 40,
    samples: int = 8,
    longer: float = 0.3,
    ease: float = 0.2,
) -> Trace:
    """Accuracy is a curve of log₂ of the length, plus how easy the prompt is; hard prompts have longer texts."""
    rng = np.random.default_rng(seed)
    eases = rng.uniform(-ease, ease, size=(prompts, 1))
    places = rng.uniform(5, 10, size=(prompts, samples)) - longer * 5 * eases
    right = rng.random((prompts, samples)) < curve(places) + eases
    return run([
        text(i, 1, grade=float(right[i, j]), facts={"budget": 2.0 ** places[i, j]})
        for i in range(prompts) for j in range(samples)
    ])  # fmt: skip


def hump(place: Any) -> Any:
    return 0.75 - 0.05 * (place - 7) ** 2


def falling(place: Any) -> Any:
    return 0.75 - 0.1 * (place - 5)


def found(seed: int, curve: Callable[[Any], Any], **settings: Any) -> LengthEffect:
    return length_effect(policy(seed, curve, **settings), by="budget", **FAST)


def test_the_turning_length_covers_the_truth() -> None:
    all_found = [found(seed, hump) for seed in range(40)]
    told = [one.beyond for one in all_found if one.beyond]
    assert len(told) >= 36
    assert sum(2.0**7 in one for one in told) >= 0.88 * len(told)
    assert sum(one.falls and one.beyond is not None for one in all_found) == len(told)


def test_slopes_cover_the_truth_though_hard_prompts_have_long_texts() -> None:
    """Falling by 10 points with each doubling, or flat: within prompts it is seen, over all texts it is not."""
    slopes = [found(seed, falling, prompts=20) for seed in range(40)]
    assert sum(-0.1 in one.at_end for one in slopes) >= 34
    assert sum(-0.1 in one.overall for one in slopes) >= 34
    flat = [found(seed, lambda place: 0.5, longer=2.0, ease=0.45, prompts=20) for seed in range(40)]
    assert sum(0.0 in one.at_end for one in flat) >= 34
    assert sum(0.0 in one.overall for one in flat) >= 34
    assert sum(one.falls for one in flat) <= 4
    confounded = found(0, lambda place: 0.5, longer=2.0, ease=0.45, prompts=80).bins
    assert confounded[0].accuracy is not None
    assert confounded[-1].accuracy is not None
    assert confounded[0].accuracy.low > confounded[-1].accuracy.high


def test_sentences_say_what_is_told() -> None:
    assert "Accuracy falls beyond 1" in found(1, hump, prompts=80).says
    steps = run([text(i, 2**j, grade=float(k >= j)) for i in range(6) for j in range(5) for k in range(4)])
    all_along = length_effect(steps)
    assert "Accuracy falls with length all along: doubling long texts adds −25 points [" in all_along.says
    assert all_along.beyond is not None
    assert all_along.beyond.value == pytest.approx(1)
    assert "from what length on is not told" in found(0, falling, prompts=80).says
    rising = found(0, lambda place: 0.3 + 0.08 * (place - 5), prompts=80)
    assert "still rises" in rising.says
    assert rising.beyond is None
    assert "is not told: doubling long texts adds" in found(0, lambda place: 0.5, prompts=10).says


def test_no_doubling_adds_more_than_all() -> None:
    """Lengths of 4 to 6 tokens: a line through them says anything of twice as many."""
    rng = np.random.default_rng(0)
    few = length_effect(
        run([text(i, 4 + j % 3, grade=float(rng.random() < 0.5)) for i in range(6) for j in range(4)]), **FAST
    )
    assert few.says.startswith("There are too few lengths to tell whether accuracy falls with length")
    for one in (few.overall, few.at_start, few.at_end):
        assert -1 <= one.low <= one.value <= one.high <= 1
    assert (few.at_end.low, few.at_end.high) == (-1, 1)


def test_bins_in_closed_form() -> None:
    texts = [
        text(i, count, answer=answer, grade=float(answer == "a"))
        for i in range(6)
        for count, answer in ((1, "a"), (2, "a"), (8, "a"), (9, "b"))
    ]
    bins = length_effect(run(texts), bins=2).bins
    assert [(one.shortest, one.longest, one.texts) for one in bins] == [(1, 2, 12), (8, 9, 12)]
    assert [one.accuracy.value for one in bins if one.accuracy] == [1.0, 0.5]
    assert [one.disagreement.value for one in bins if one.disagreement] == [0.0, 1.0]
    alone = length_effect(run([text(i, 1 + j, grade=j % 2) for i in range(6) for j in range(4)]), bins=4)
    assert [one.disagreement for one in alone.bins] == [None] * 4


def test_lengths_are_tokens_unless_a_fact_is_named() -> None:
    texts = [text(i, 2**j, grade=float(j == 2), facts={"thinking": 3.0 * 2**j}) for i in range(6) for j in range(5)]
    one, three = length_effect(run(texts)), length_effect(run(texts), by="thinking")
    assert one.beyond is None or math.isfinite(one.beyond.value)
    assert one.at_end.value == pytest.approx(three.at_end.value)
    assert three.bins[0].shortest == 3


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(0, hump, prompts=10)
    assert_same(length_effect(trace, by="budget", **FAST), length_effect(shuffled(trace), by="budget", **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: length_effect(run([text(i, 3, grade=1.0) for i in range(9)])), "0 of 9 prompts with different ones"),
        (
            lambda: length_effect(run([text(i, 1 + j, grade=1.0) for i in range(9) for j in range(2)])),
            "three lengths or more in all; got 9 of 9 prompts with different ones, 2 lengths",
        ),
        (
            lambda: length_effect(run([text(i, 20 + j, grade=1.0) for i in range(9) for j in range(9)])),
            "at least 1.5 times as long as short ones .*; got 20 and 28. Texts of about one length",
        ),
        (lambda: length_effect(run([text(i) for i in range(9)])), "a grade for each text"),
        (
            lambda: length_effect(run([text(i, grade=1.0, facts={"budget": 0}) for i in range(9)]), by="budget"),
            r"facts\['budget'\] of each text, a number above 0; got 0 in 9 of 9 texts",
        ),
        (lambda: length_effect(policy(0, hump), bins=0, by="budget"), "bins: expected"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
