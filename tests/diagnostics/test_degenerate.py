"""Degenerate texts: each kind by its definition, and none among sound texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, covered, run, shuffled, text

from proxytune.diagnostics import degenerate
from proxytune.diagnostics.degenerate import copied_share, faults_of, looped_share
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval

SOUND = np.arange(100, 140)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([7], 0.0),
        ([1, 2, 3] * 4, 1.0),
        ([7] * 12, 1.0),
        ([7] * 11, 0.0),  # fewer than twelve tokens
        ([9, 8, 7, *[1, 2, 3] * 4, 5], 0.75),
        ([*range(50), *[1, 2, 3, 4, 5, 6] * 2], 0.0),  # twice is no loop
        ([*range(200, 220), *list(range(64)) * 3], 192 / 212),
        ([*list(range(65)) * 3], 0.0),  # a longer block
        ([*[1, 2, 3] * 4, 1, 2], 1.0),  # cut off in the fifth
        (list(range(1000)), 0.0),
    ],
)
def test_loops(tokens: list[int], share: float) -> None:
    assert looped_share(np.array(tokens, np.int32)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "prompt", "share"),
    [
        (range(10), range(5, 30), 0.0),  # five in a row
        (range(20), range(8), 8 / 20),
        (range(20), range(30), 1.0),
        ([*range(8), 99, *range(8)], range(9), 16 / 17),
        ([7, *range(9), 7], range(9), 9 / 11),
        (range(7), range(7), 0.0),
        (range(9), [], 0.0),
    ],
)
def test_copies(tokens: Any, prompt: Any, share: float) -> None:
    assert copied_share(np.array([*tokens], np.int32), np.array([*prompt], np.int32)) == pytest.approx(share)


def one(prompt: int, tokens: Any, **fields: Any) -> Any:
    return text(prompt, tokens=tokens, **fields)


def test_skipped_computation_is_an_answer_far_shorter_than_its_siblings() -> None:
    def faults(*lengths: int, answer: str | None = "a") -> list[bool]:
        texts = [one(0, SOUND[:n], answer=answer) for n in lengths]
        return ["skipping" in found for found in faults_of(run(texts))]

    assert faults(40, 40, 40, 9) == [False, False, False, True]
    assert faults(40, 40, 40, 10) == [False] * 4
    assert faults(40, 40, 9) == [False] * 3, "two siblings are too few"
    assert faults(5, 5, 5, 5) == [False] * 4
    assert faults(40, 40, 40, 9, answer=None) == [False] * 4


def test_faults_are_in_the_order_of_the_texts() -> None:
    texts = [
        one(0, SOUND, facts={"group": "0"}),
        one(0, [5] * 30, facts={"group": "0"}),
        text(0, 0),
        replace(one(0, SOUND, facts={"group": "0"}), prompt_ids=SOUND.astype(np.int32)),
        one(0, [5] * 30, given=True),
    ]
    assert faults_of(run(texts)) == ((), ("repeating",), (), ("copying",), ())
    found = degenerate(run([*texts, *(one(i, SOUND) for i in range(1, 6))]))
    assert found.faults[:5] == ((), ("repeating",), (), ("copying",), ())
    assert found.sound == (0, 5, 6, 7, 8, 9)
    assert found.share.value == pytest.approx(2 / 8)
    assert {fault: one.value for fault, one in found.shares.items()} == {"repeating": 0.125, "copying": 0.125}
    assert "25 % [" in found.says
    assert "(12.5 % repeating, 12.5 % copying)" in found.says


def test_the_share_covers_the_truth() -> None:
    """One text in five loops, in clusters: some prompts invite it."""

    def share(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        loops = rng.random((25, 3)) < rng.beta(1, 4, size=(25, 1))
        texts = [one(i, [1, 2] * 8 if looped else SOUND) for i, row in enumerate(loops) for looped in row]
        return degenerate(run(texts), **FAST).shares["repeating"]

    assert covered(0.2, share, 40) >= 34


def test_random_texts_are_sound_and_leaves_count_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    found = degenerate(run([one(i, rng.integers(0, 50, 300), answer="a") for i in range(5) for _ in range(4)]))
    assert found.share == Interval(0, 0, pytest.approx(1 - 0.025 ** (1 / 5)))
    assert set(found.shares) == {"repeating", "copying", "skipping"}
    leaves = [one(i, tokens, facts={"weight": w}) for i in range(5) for tokens, w in ((SOUND, 0.9), ([1] * 20, 0.1))]
    assert degenerate(run(leaves)).share.value == pytest.approx(0.1)


def test_the_order_of_texts_does_not_matter() -> None:
    trace = run([one(i % 6, [1] * 20 if i % 4 == 0 else SOUND) for i in range(18)])
    other = degenerate(shuffled(trace), **FAST)
    assert_same((degenerate(trace, **FAST).share, degenerate(trace, **FAST).shares), (other.share, other.shares))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: degenerate(run([one(0, SOUND)])), "at least 5 prompts"),
        (lambda: degenerate(run([one(0, SOUND)]), repeated=0), r"share: expected a number in \(0, 1\); got 0"),
        (lambda: faults_of("run.npz"), "trace: expected a proxytune.trace.Trace"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
