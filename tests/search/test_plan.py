"""What a level is worth under a budget that it does not always keep."""

from __future__ import annotations

import numpy as np
import pytest

from proxytune.errors import BudgetError
from proxytune.search.calibration_run import CalibrationRun, Trial
from proxytune.search.plan import plan


def run_of(**levels: tuple[list[bool], list[int]]) -> CalibrationRun:
    return CalibrationRun(
        tuple(
            Trial(name, "sequential" if name.startswith("s") else "parallel", 1, np.array(right), np.array(tokens))
            for name, (right, tokens) in levels.items()
        )
    )


def test_what_exceeds_the_budget_counts_as_wrong() -> None:
    # p1 is right on 30 of 40 problems, on 6 of them for 120 tokens; s1 is right on 25, always for 90.
    run = run_of(
        p1=([True] * 30 + [False] * 10, [120] * 6 + [50] * 34),
        s1=([True] * 25 + [False] * 15, [90] * 40),
    )
    by_budget = {budget: plan(run, budget) for budget in (60, 100, 119, 120)}
    accuracy = {b: {level.name: level.accuracy.value for level in p.levels} for b, p in by_budget.items()}
    assert accuracy[100] == accuracy[119] == pytest.approx({"p1": 24 / 40, "s1": 25 / 40})
    assert accuracy[120] == pytest.approx({"p1": 30 / 40, "s1": 25 / 40})
    assert [by_budget[b].chosen.name for b in (60, 100, 119, 120)] == ["p1", "s1", "s1", "p1"]
    # Both forms are reported as they are under the budget, and so is the difference.
    assert by_budget[119].difference is not None
    assert by_budget[119].difference.value == pytest.approx(-1 / 40)


def test_a_level_is_not_gone_for_a_few_long_texts() -> None:
    # Four texts in forty are too long: a rule by the 95th percentile would leave the better level out altogether.
    run = run_of(p1=([True] * 36 + [False] * 4, [50] * 36 + [400] * 4), s1=([True] * 20 + [False] * 20, [90] * 40))
    assert plan(run, 100).chosen.name == "p1"
    assert plan(run, 100, quantile=0.95).chosen.name == "s1"


def test_what_mostly_exceeds_the_budget_does_not_fit() -> None:
    run = run_of(p1=([True] * 40, [50] * 19 + [400] * 21))
    with pytest.raises(BudgetError, match="expected at least 400 tokens.*on 50% of the calibration problems"):
        plan(run, 100)
    assert plan(run, 100, quantile=0.4).chosen.accuracy.value == pytest.approx(19 / 40)
