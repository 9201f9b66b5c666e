"""Success against budget, on searches that follow the fitted curve, and on one that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulated import assert_same, run, shuffled, text

from proxytune.diagnostics import search_scaling
from proxytune.errors import InputError
from proxytune.trace import Trace

BUDGETS = np.array([64, 128, 256, 512, 1024, 2048])


def search(seed: int, ceiling: float, lost: float, exponent: float, *, prompts: int = 40) -> Trace:
    """A prompt is solved from some budget on, or never: budgets are as correlated as they are in a search."""
    rng = np.random.default_rng(seed)
    success = ceiling - lost * (BUDGETS / 64) ** -exponent
    luck = rng.random((prompts, 1))
    solved = np.where(rng.random((prompts, len(BUDGETS))) < 0.8, luck, rng.random((prompts, len(BUDGETS)))) < success
    return run([
        text(i, grade=float(one), facts={"budget": int(budget)})
        for i, row in enumerate(solved) for one, budget in zip(row, BUDGETS, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize(("ceiling", "lost", "exponent"), [(0.8, 0.6, 0.7), (0.9, 0.3, 2.0), (1.0, 0.9, 0.25)])
def test_the_fit_covers_the_truth(ceiling: float, lost: float, exponent: float) -> None:
    found = [search_scaling(search(seed, ceiling, lost, exponent), draws=200) for seed in range(30)]

    def gain(at: float) -> float:
        return float(lost * (at**-exponent - (2 * at) ** -exponent))

    assert sum(gain(32) in one.doubling for one in found) >= 25
    assert sum(gain(1) in one.doubling_at_start for one in found) >= 25
    assert sum(ceiling in one.ceiling for one in found) >= 25
    assert sum(ceiling - lost in one.measured[64.0] for one in found) >= 25


def exact(*success: int, prompts: int = 10, budgets: Any = BUDGETS) -> Trace:
    return run([
        text(i, grade=float(i < n), facts={"budget": float(b)})
        for n, b in zip(success, budgets, strict=False) for i in range(prompts)
    ])  # fmt: skip


def test_the_fit_in_closed_form() -> None:
    found = search_scaling(exact(0, 50, 75, 88, 94, 97, prompts=100), draws=200)
    assert found.exponent == pytest.approx(1.0, rel=0.08)
    assert found.ceiling.value == pytest.approx(1.0, abs=0.01)
    assert found.doubling.value == pytest.approx(1 / 64, abs=3e-3)
    assert found.rmse < 0.01
    assert found.diminishing
    assert found.measured[128.0].value == 0.5
    assert found.fitted[128.0] == pytest.approx(0.5, abs=0.02)
    assert "Doubling the largest budget, 2048, would add 1." in found.says
    assert (found.prompts, found.texts) == (100, 600)


def test_extremes() -> None:
    for success in (0, 10):
        found = search_scaling(exact(*[success] * 4), draws=100)
        assert found.ceiling.value == success / 10
        assert (found.doubling.value, found.doubling.low, found.doubling.high) == (0, 0, 0)
        assert not found.diminishing
    falling = search_scaling(exact(9, 6, 3, 1), draws=100)
    assert falling.doubling.value == 0.0
    steady = search_scaling(exact(1, 2, 3, 4, 5, 6), draws=200)
    assert steady.doubling.value > 0.05
    assert "that returns diminish is not told" in steady.says


def test_prompts_without_all_budgets_are_left_out() -> None:
    texts = [*exact(1, 2, 3, 4), text(99, grade=1.0, facts={"budget": 64})]
    assert search_scaling(run(texts), draws=50).prompts == 10


def test_the_order_of_texts_does_not_matter() -> None:
    trace = search(0, 0.8, 0.6, 0.7, prompts=10)
    assert_same(search_scaling(trace, draws=50), search_scaling(shuffled(trace), draws=50))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: search_scaling(exact(1, 2, 3)), "4 to 50 budgets, each given to all prompts; got 3, from 64 to 256"),
        (lambda: search_scaling(exact(*range(51), budgets=range(1, 52))), "got 51, from 1 to 51"),
        (lambda: search_scaling(exact(1, 2, 3, 4, prompts=4)), "at least 5 prompts"),
        (lambda: search_scaling(run([text(i, grade=1.0) for i in range(5)])), r"facts\['budget'\] of each text.*None"),
        (lambda: search_scaling(run([text(i) for i in range(5)])), "a grade for each text"),
        (
            lambda: search_scaling(run([text(i, grade=1.0, facts={"budget": 1 + i % 4}) for i in range(8)])),
            "prompts with all budgets: expected texts of at least 5 prompts.* got 0",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
