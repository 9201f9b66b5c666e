"""Collapse: distinct answers and formats of simulated policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, covered, run, shuffled, text

from proxytune.diagnostics import distinct_answers, formats
from proxytune.diagnostics.collapse import format_of
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace


def policy(seed: int, *, prompts: int = 30, samples: int = 6) -> Trace:
    """Half of the prompts have one answer, the others four that are equally likely."""
    rng = np.random.default_rng(seed)
    kinds = np.where(rng.random((prompts, 1)) < 0.5, 1, 4)
    answers = rng.integers(0, kinds, size=(prompts, samples))
    return run([text(i, answer=str(one)) for i, row in enumerate(answers) for one in row])


def test_the_distinct_answer_curve_covers_the_truth() -> None:
    found = [distinct_answers(policy(seed), **FAST).curve for seed in range(40)]
    for k in (2, 4, 6):
        truth = 0.5 + 0.5 * 4 * (1 - 0.75**k)
        assert sum(truth in curve[k] for curve in found) >= 34, k
    assert [curve[1].value for curve in found] == pytest.approx([1.0] * 40)


def test_distinct_answers_in_closed_form() -> None:
    trace = run([text(i, answer=one) for i in range(5) for one in ("a", "a", "b", None)])
    found = distinct_answers(trace)
    assert [one.value for one in found.curve.values()] == pytest.approx([0.75, 4 / 3, 2.0])
    assert found.unanswered.value == 0.25
    assert found.says == (
        "4 samples of a prompt give 2 [0.956, 3.04] different answers; 25 % [12, 64.1] of the texts have none."
    )
    assert distinct_answers(policy(0), **FAST).says.endswith("] different answers.")
    facts = [{"weight": w} for w in (0.5, 0.2, 0.2, 0.1)]
    leaves = run([text(i, answer=a, facts=f) for i in range(5) for a, f in zip("aabc", facts, strict=True)])
    expected = 3 - 0.3**2 - 0.8**2 - 0.9**2
    assert distinct_answers(leaves, [2]).curve[2].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("The answer is 37.", "sentence"),
        ("37", "number"),
        ("...", "marks"),
        ("37<|end|>", "number"),
        ("So.\n</s><pad><pad>", "sentence"),
        ("22 + 4 = 26. 26 + 24 = 50. The answer is 37.", "equation > sentence"),
        ("22 + 4 = 26.\n26 + 24 = 50.\n50 − 13 = 37.\n\nSo it is 37!", "equation > sentence"),
        ("First, we add. Then 1.5 is left. x = 3.", "sentence > equation"),
        ("# Plan\n\n1. Do this. And that.\n2. Stop.\n- no", "heading > sentence > numbered > bullet"),
        ("<think>\nWell.\n</think>\n| a | b |\n|---|---|", "tag > sentence > table"),
        ("```python\nx = 1\n# no heading\n```\nDone.", "code > sentence"),
        ("答案是三。", "sentence"),
    ],
)
def test_a_format_is_a_layout(text: str, form: str) -> None:
    assert format_of(text) == form


def write(i: int, words: str, **facts: float) -> Any:
    return text(i, len(words), pieces=tuple(words), facts=facts)


def test_the_share_of_the_top_format_covers_the_truth() -> None:
    def share(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        likely = rng.beta(7, 3, size=(30, 1))
        plain = rng.random((30, 4)) < likely
        return formats(
            run([write(i, "a." if p else "1=1") for i, row in enumerate(plain) for p in row]), **FAST
        ).top_share

    assert covered(0.7, share, 100) >= 88


def test_the_histogram_of_formats() -> None:
    trace = run([write(i, words) for i in range(5) for words in ("So.", "1 + 1 = 2", "Well. Yes!", "1")])
    found = formats(trace)
    assert found.histogram == {"sentence": 0.5, "equation": 0.25, "number": 0.25}
    assert (found.top, found.top_share.value) == ("sentence", 0.5)
    leaves = run([write(i, words, weight=w) for i in range(5) for words, w in (("So.", 0.1), ("1", 0.9))])
    assert formats(leaves).histogram == pytest.approx({"number": 0.9, "sentence": 0.1})


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(1)
    assert_same(distinct_answers(trace, **FAST), distinct_answers(shuffled(trace), **FAST))
    trace = run([write(i, words) for i in range(6) for words in ("So.", "1 + 1 = 2", "1")[: 1 + i % 3]])
    assert_same(formats(trace, **FAST), formats(shuffled(trace), **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: distinct_answers(run([text(i) for i in range(5)])), "answers; got 5 texts without one"),
        (lambda: distinct_answers(policy(0), [7]), "a prompt has 6"),
        (
            lambda: distinct_answers(policy(0, samples=1)),
            "at least two samples of each prompt; got 30 of 30 prompts with one. Draw several samples",
        ),
        (lambda: distinct_answers(run(policy(0).texts, loop="ForkDecoding")), r"Write the tree's weights\(\) to facts"),
        (lambda: formats(policy(0)), "got 180 of 180 with token ids alone. Record with tokenizer="),
        (lambda: formats(run([write(0, "a")])), "at least 5 prompts"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
