"""Drift from the base, on texts whose KL is drawn from a known distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import FAST, assert_same, covered, run, shuffled, text

from proxytune.diagnostics import kl_drift
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace


def composed(texts: list[Any]) -> Trace:
    return Trace(sources=("combined", "base", "expert"), top=1, texts=tuple(texts))


def made(prompt: int, kl: Any, **fields: Any) -> Any:
    count = len(kl)
    tops = {"top_ids": np.zeros((count, 3, 1), np.int32), "top_logprobs": np.zeros((count, 3, 1), np.float32)}
    return text(prompt, kl=kl, **tops, **fields)


def policy(seed: int, *, prompts: int = 20, texts: int = 2) -> Trace:
    """KL is 0.2 nats in the first five tokens and 0.1 after them, times a factor of the text's own with mean 1."""
    rng = np.random.default_rng(seed)
    level = np.repeat([0.2, 0.1], [5, 25])
    factors = rng.gamma(3, 1 / 3, size=(prompts, 1)) * rng.gamma(6, 1 / 6, size=(prompts, texts))
    return composed(
        [made(i, factor * level[: rng.integers(10, 30)]) for i, row in enumerate(factors) for factor in row]
    )


def test_the_mean_covers_the_truth_where_texts_are_clusters() -> None:
    lengths = np.arange(10, 30)
    truth = float((0.2 * 5 + 0.1 * (lengths - 5)).sum() / lengths.sum())
    found = [kl_drift(policy(seed), bins=4, **FAST) for seed in range(40)]
    assert sum(truth in one.mean for one in found) >= 34
    assert sum(float((0.2 * 5 + 0.1 * (lengths - 5)).mean()) in one.per_text for one in found) >= 34
    assert sum(0.1 in one.places[-1].value for one in found) >= 34

    def of_texts(seed: int) -> Interval:
        return kl_drift(policy(seed, prompts=30, texts=1), over="texts", **FAST).mean

    assert covered(truth, of_texts, 40) >= 34


def test_drift_in_closed_form() -> None:
    texts = [made(i, [0.5, 0.1], base_rank=[0, 2]) for i in range(5)] + [made(0, [0.5, 0.1, 9.0], base_rank=[0, 2, 1])]
    found = kl_drift(composed(texts), bins=2)
    assert [(one.first, one.last, one.tokens) for one in found.places] == [(0, 0, 6), (1, 1, 6)]
    assert [one.value.value for one in found.places] == pytest.approx([0.5, 0.1])
    assert found.left_out == 1
    assert found.mean.value == pytest.approx((6 * 0.6 + 9) / 13)
    assert found.per_text.value == pytest.approx((6 * 0.6 + 9) / 6)
    assert found.steered.value == pytest.approx(7 / 13)
    assert (found.prompts, found.texts, found.tokens) == (5, 6, 13)
    assert kl_drift(composed([made(i, [0.0]) for i in range(5)])).mean == Interval(0, 0, 0)
    leaves = [made(i, [kl], facts={"weight": w}) for i in range(5) for kl, w in ((1.0, 0.9), (2.0, 0.1))]
    assert kl_drift(composed(leaves)).mean.value == pytest.approx(1.1)


def test_texts_of_one_prompt_can_be_drawn_again() -> None:
    trace = policy(0, prompts=1, texts=8)
    with pytest.raises(InputError, match="at least 5 prompts"):
        kl_drift(trace)
    found = kl_drift(trace, over="texts", **FAST)
    assert (found.prompts, found.texts) == (1, 8)
    assert found.mean.low < found.mean.high


def test_the_order_of_texts_does_not_matter() -> None:
    trace = policy(0)
    assert_same(kl_drift(trace, **FAST), kl_drift(shuffled(trace), **FAST))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: kl_drift(run([text(i) for i in range(9)])), "a composed model; got sources combined, base. A plain"),
        (lambda: kl_drift(policy(0, prompts=1), over="texts"), "texts of at least 5 texts, which intervals are over"),
        (lambda: kl_drift(policy(0), over="tokens"), "over: expected 'prompts' or 'texts'; got 'tokens'"),  # type: ignore[arg-type]
        (lambda: kl_drift(policy(0), given=True), "expected given texts"),
        (lambda: kl_drift(composed([made(i, [np.inf]) for i in range(9)])), "a finite kl at each token; got 9 tokens"),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
