"""Calibration of simulated policies whose confidence is known to be right, or too high."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, run, shuffled, text

from proxytune.diagnostics import calibration
from proxytune.errors import InputError
from proxytune.stats.calibration import auroc
from proxytune.trace import Trace


def policy(seed: int, *, over: float = 0.0, prompts: int = 20, samples: int = 4) -> Trace:
    """Stated confidences are uniform on [0.2, 0.8]; right are as many, less `over`."""
    rng = np.random.default_rng(seed)
    stated = rng.uniform(0.2, 0.8, size=(prompts, samples))
    right = rng.random((prompts, samples)) < stated - over
    return run([
        text(i, grade=float(right[i, j]), logprobs=[np.log(stated[i, j])], facts={"confidence": float(stated[i, j])})
        for i in range(prompts) for j in range(samples)
    ])  # fmt: skip


@pytest.mark.parametrize("over", [0.0, 0.15])
def test_scores_cover_the_truth(over: float) -> None:
    found = [calibration(policy(seed, over=over), "stated", bins=5, **FAST) for seed in range(40)]
    # right with probability q = c − over: E[(c − right)²] = E[q(1 − q)] + over²
    c = np.linspace(0.2, 0.8, 100_001)
    q = c - over
    truth = float((q * (1 - q)).mean() + over**2)
    assert sum(truth in one.brier for one in found) >= 35
    assert sum(over in one.ece for one in found) >= 35
    ranked = float((q[:, None][::500] * (1 - q)[None, ::500] * (c[:, None][::500] > c[None, ::500])).mean())
    assert sum(ranked / (q.mean() * (1 - q.mean())) in one.pooled["stated"] for one in found) >= 35
    assert sum(ranked / (q.mean() * (1 - q.mean())) in one.auroc["stated"] for one in found) >= 35
    assert sum(over in one.gap for one in found) >= 35
    too_sure = sum("is surer than it is right" in one.says for one in found)
    assert (too_sure >= 25) if over else (too_sure <= 5)


def test_the_reliability_diagram_in_closed_form() -> None:
    texts = [
        text(i, grade=grade, logprobs=[np.log(p)] * 2) for i in range(6) for p, grade in ((0.25, 0.0), (0.75, 1.0))
    ]
    found = calibration(run(texts), bins=2)
    assert [(one.confidence, one.texts) for one in found.points] == [
        (pytest.approx(0.25), 6),
        (pytest.approx(0.75), 6),
    ]
    assert [one.accuracy.value for one in found.points if one.accuracy] == [0.0, 1.0]
    assert found.brier.value == pytest.approx(0.0625)
    assert found.ece.value == pytest.approx(0.25)
    assert found.auroc["likelihood"].value == 1.0
    assert found.says.startswith(
        "By likelihood (exp of the mean token log-probability, not the probability of the answer) the policy is on the "
        "whole as sure as it is right: the mean likelihood less the share of right texts is "
    )
    assert "Within prompts the AUROC of likelihood is 1 [" in found.says


def test_each_confidence_is_what_it_says() -> None:
    """Rights are surer by each; `deepconf` needs likely tokens that are no sure thing."""
    texts = []
    for i in range(6):
        for j, answer in enumerate(("a", "a", "a", "b")):
            right = float(answer == "a")
            tops = np.tile(np.log([[0.9, 0.05], [0.6, 0.3]][j == 3]), (2, 2, 1)).astype(np.float32)
            fields: dict[str, Any] = {"top": 2, "entropy": [0.1, 1.0 - 0.5 * right], "top_logprobs": tops}
            texts.append(
                text(i, grade=right, answer=answer, logprobs=[-1.0, right - 2], facts={"confidence": right}, **fields)
            )
    found = calibration(run(texts), "agreement")
    assert found.missing == {}
    assert {name: one.value for name, one in found.auroc.items()} == dict.fromkeys(
        ("likelihood", "agreement", "stated", "entropy", "deepconf"), 1.0
    )
    assert [one.confidence for one in found.points] == pytest.approx([0.0, 2 / 3])


def test_what_a_trace_does_not_have_is_said() -> None:
    found = calibration(policy(0), draws=50)
    assert "answers, and at least two texts" in found.missing["agreement"]
    assert set(found.auroc) == {"likelihood", "stated", "entropy", "deepconf"}
    tops = np.full((1, 2, 2), -np.inf, np.float32)
    bare = run([text(i, grade=float(i % 2), logprobs=[-0.5], top_logprobs=tops, top=2) for i in range(8)])
    found = calibration(bare, draws=50)
    assert "finite" in found.missing["deepconf"]
    assert "answers to the same problem" in found.missing["likelihood"], "one text of each prompt: no pairs"
    assert found.pooled["likelihood"].value == 0.5


def test_within_prompts_is_not_over_all() -> None:
    """Easy prompts have surer texts; within a prompt the confidence says nothing."""
    noise = np.random.default_rng(0).random((8, 8)) / 1000
    texts = [
        text(i, grade=float(j < i), logprobs=[np.log(0.1 + 0.1 * i) + noise[i, j]]) for i in range(8) for j in range(8)
    ]
    found = calibration(run(texts), draws=100)
    assert found.pooled["likelihood"].low > 0.6
    assert 0.5 in found.auroc["likelihood"]
    right = [text.grade == 1 for text in texts]
    scores = [float(text.logprobs[0]) for text in texts]
    assert found.pooled["likelihood"].value == pytest.approx(auroc(scores, right))
    assert found.auroc["likelihood"].value == pytest.approx(auroc(scores, right, np.repeat(np.arange(8), 8)))


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(0, prompts=8)
    assert_same(calibration(trace, draws=50), calibration(shuffled(trace), draws=50))


def test_all_right_has_no_auroc() -> None:
    found = calibration(run([text(i, grade=1.0) for i in range(6)]), draws=50)
    assert (found.brier.value, found.ece.value, found.auroc) == (0.0, 0.0, {})
    assert "6 right of 6" in found.missing["likelihood"]
    assert found.says.endswith("Too few prompts have right and wrong texts for an AUROC.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: calibration(policy(0), "agreement"),
            "calibration: the confidence 'agreement': expected answers, and at",
        ),
        (
            lambda: calibration(policy(0), "entropy"),
            "by: expected 'likelihood', 'agreement' or 'stated'; got 'entropy'",
        ),  # type: ignore[arg-type]
        (lambda: calibration(run([text(i) for i in range(9)])), "a grade for each text"),
        (lambda: calibration(run([text(i, grade=1.0, logprobs=[np.nan]) for i in range(9)])), "a finite logprobs at"),
        (lambda: calibration(policy(0), bins=0), "bins: expected"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
