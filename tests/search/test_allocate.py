"""Allocation between parallel and sequential: against populations whose best policy is known, and against wrong use."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, InputError
from proxytune.search.allocate import allocate
from proxytune.search.calibration_run import CalibrationRun, PolicyForm, Trial
from proxytune.search.plan import plan
from proxytune.search.policy import attempt, run_policies
from proxytune.voting.vote import Sample, vote

# --- populations ------------------------------------------------------------------------------------------------------

COUNTS = (1, 2, 4, 8)
EXTRA = (0, 1, 2, 4)
NAMES = [f"vote-{n}" for n in COUNTS] + [f"wait-{n}" for n in EXTRA]
FORMS: list[PolicyForm] = ["parallel"] * 4 + ["sequential"] * 4
LEVELS = [*COUNTS, *EXTRA]
# Log-odds of each level on a problem of middling difficulty. "tie": the two forms are the same but for their cost.
WEAK, STRONG = (-0.6, -0.5, -0.4, -0.3), (-0.6, -0.1, 0.3, 0.6)
POPULATIONS = {
    "parallel wins": STRONG + WEAK,
    "sequential wins": WEAK + STRONG,
    "tie": STRONG + STRONG,
    "all alike": WEAK + WEAK,
    "overthinking": (-0.6, -0.3, -0.1, 0.0, -0.6, 0.3, -0.2, -0.9),
}
SPREAD = 1.5  # of the difficulty, in log-odds: problems that are right under one level are so under others


def probabilities(odds: Sequence[float], difficulty: np.ndarray) -> np.ndarray:
    """`[P, L]`."""
    return 1 / (1 + np.exp(-(np.asarray(odds)[None] - difficulty[:, None])))


def population_accuracy(odds: Sequence[float]) -> np.ndarray:
    """`[L]`, by quadrature over the difficulty."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    return w / w.sum() @ probabilities(odds, SPREAD * x)


def outcomes(odds: Sequence[float], problems: int, rng: np.random.Generator) -> np.ndarray:
    """`[P, L]`, bool."""
    return rng.random((problems, len(odds))) < probabilities(odds, SPREAD * rng.standard_normal(problems))


def run_of(right: np.ndarray, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> CalibrationRun:
    tokens = 20 + 30 * np.array([*COUNTS, *(1 + n for n in EXTRA)])[None] + rng.integers(0, 10, right.shape)
    trials = [Trial(*what, right[:, i], tokens[:, i]) for i, what in enumerate(zip(NAMES, FORMS, LEVELS, strict=True))]
    return CalibrationRun(tuple(trials), None if kinds is None else tuple(kinds))


REPETITIONS, PROBLEMS, FRESH = 400, 100, 200
ALL = 20 + 30 * 8 + 10  # tokens with which every level fits


def difference_to_best(
    odds: Sequence[float], choose: Callable[[CalibrationRun], str], *, among: Sequence[int] = range(8)
) -> tuple[float, float, float]:
    """Accuracy on fresh problems less that of the best fixed level; its standard error; the noise of a calibration.

    The noise is the standard error of a paired difference of two levels on a calibration run of this size: what nobody
    who sees only that run can tell apart.
    """
    rng = np.random.default_rng(0)
    among = list(among)
    best = among[int(population_accuracy(odds)[among].argmax())]
    found = []
    for _ in range(REPETITIONS):
        chosen = NAMES.index(choose(run_of(outcomes(odds, PROBLEMS, rng), rng)))
        fresh = outcomes(odds, FRESH, rng)
        found.append(fresh[:, chosen].mean() - fresh[:, best].mean())
    many = outcomes(odds, 100_000, rng).astype(float)
    noise = max(float(np.std(many[:, i] - many[:, best])) for i in among if i != best) / math.sqrt(PROBLEMS)
    return float(np.mean(found)), float(np.std(found)) / math.sqrt(REPETITIONS), noise


def planned(run: CalibrationRun, budget: int = ALL) -> str:
    return plan(run, budget, draws=1).chosen.name


@pytest.mark.parametrize("which", POPULATIONS)
def test_it_matches_the_best_fixed_level_within_noise(which: str) -> None:
    """400 calibration runs of 100 problems, each judged on 200 fresh ones."""
    lost, error, noise = difference_to_best(POPULATIONS[which], planned)
    assert error < noise / 5, "the test can tell"
    assert lost > -noise / 2 - 3 * error, (lost, error, noise)
    assert lost < 3 * error, "nobody beats the best level of the population"


def test_levels_that_do_not_fit_are_out_of_the_race() -> None:
    # Room for vote-4 and wait-2, not for the two best of each form.
    fitting = [i for i in range(8) if LEVELS[i] < (8 if i < 4 else 4)]
    choose = functools.partial(planned, budget=20 + 30 * 4 + 10)
    for which in ("parallel wins", "sequential wins"):
        lost, error, noise = difference_to_best(POPULATIONS[which], choose, among=fitting)
        assert lost > -noise / 2 - 3 * error


def test_one_form_always_is_not_within_noise() -> None:
    """The control: what the tests above would say of a policy that does not look."""
    for which, choose in (
        ("sequential wins", lambda run: "vote-8"),
        ("parallel wins", lambda run: "wait-4"),
        ("overthinking", lambda run: "wait-4"),
    ):
        lost, error, noise = difference_to_best(POPULATIONS[which], choose)
        assert lost < -2 * noise - 5 * error, (which, lost, error, noise)


def test_the_cheapest_of_what_cannot_be_told_apart_is_not_within_noise() -> None:
    """Why the rule is no rule of "not significantly worse": it gives away what a small run cannot show."""

    def cheapest_of_the_tied(run: CalibrationRun) -> str:
        found = plan(run, ALL, draws=200)
        return min((x for x in found.levels if 0 in x.behind), key=lambda x: x.tokens).name

    lost, error, noise = difference_to_best(POPULATIONS["parallel wins"], cheapest_of_the_tied)
    assert lost < -noise - 5 * error


def test_kinds_that_want_different_forms_get_them() -> None:
    rng = np.random.default_rng(1)
    odds = {"chain": POPULATIONS["parallel wins"], "countdown": POPULATIONS["sequential wins"]}
    truth = {kind: population_accuracy(o) for kind, o in odds.items()}
    best_fixed = max(np.mean([truth[kind][i] for kind in odds]) for i in range(8))
    by_kind, pooled = [], []
    for _ in range(REPETITIONS):
        right = np.concatenate([outcomes(o, PROBLEMS, rng) for o in odds.values()])
        run = run_of(right, rng, [kind for kind in odds for _ in range(PROBLEMS)])
        chosen = {kind: plan(run, ALL, kind, draws=1).chosen.name for kind in odds}
        by_kind.append(np.mean([truth[kind][NAMES.index(name)] for kind, name in chosen.items()]))
        name = plan(run, ALL, draws=1).chosen.name
        pooled.append(np.mean([truth[kind][NAMES.index(name)] for kind in odds]))
    error = np.std(by_kind) / math.sqrt(REPETITIONS)
    assert np.mean(by_kind) > best_fixed + 0.05 + 3 * error, "two forms do better than any one"
    assert np.mean(pooled) > best_fixed - math.sqrt(0.25 / PROBLEMS) / 2


# --- the plan ---------------------------------------------------------------------------------------------------------


def trial(name: str, right: Sequence[int], tokens: int | Sequence[int] = 10, form: PolicyForm = "parallel") -> Trial:
    cost = [tokens] * len(right) if isinstance(tokens, int) else tokens
    return Trial(name, form, 1, np.array(right, bool), np.array(cost))


def small(problems: int = 40) -> CalibrationRun:
    """Two of each form; 'b' and 'd' are the better ones."""
    half, most = [1, 0] * (problems // 2), [1, 1, 1, 0] * (problems // 4)
    return CalibrationRun(
        (
            trial("a", half, 10),
            trial("b", most, 30),
            trial("c", half, 15, "sequential"),
            trial("d", [*most[:-2], 0, 0], 25, "sequential"),
        )
    )


def test_both_forms_are_reported_with_all_figures() -> None:
    found = plan(small(), 100)
    assert (found.chosen.name, found.form, found.budget, found.problems) == ("b", "parallel", 100, 40)
    assert (found.basis, found.calibrated) == ("all kinds", True)
    assert [x.name for x in found.levels] == ["a", "b", "c", "d"]
    assert found.parallel is not None
    assert found.sequential is not None
    assert found.difference is not None
    assert (found.parallel.name, found.sequential.name) == ("b", "d")
    assert found.chosen.accuracy.value == pytest.approx(0.75)
    assert found.sequential.accuracy.value == pytest.approx(0.725)
    assert found.difference.value == pytest.approx(0.025)
    assert 0 in found.difference
    assert found.chosen.behind.low == found.chosen.behind.value == found.chosen.behind.high == 0
    assert 0 not in found.levels[0].behind
    assert [x.tokens for x in found.levels] == [10, 30, 15, 25]
    b, d, gap = (
        [100 * x.low, 100 * x.high] for x in (found.levels[1].accuracy, found.levels[3].accuracy, found.difference)
    )
    assert found.why == (
        f"parallel 'b', 30 tokens, right on 75.0 % [{b[0]:.1f}, {b[1]:.1f}] of 40 problems (all kinds); the best "
        f"of the other form: sequential 'd', 25 tokens, right on 72.5 % [{d[0]:.1f}, {d[1]:.1f}]; parallel less "
        f"sequential: +2.5 points [{gap[0]:+.1f}, {gap[1]:+.1f}], the data do not tell the forms apart"
    )


def test_intervals_are_those_of_resampled_problems() -> None:
    rng = np.random.default_rng(3)
    right = rng.random((60, 2)) < (0.5, 0.7)
    run = CalibrationRun((trial("a", right[:, 0]), trial("b", right[:, 1], form="sequential")))
    found = plan(run, 100, draws=20_000, level=0.9)
    # The bootstrap of a mean is a binomial, up to 1/60: the normal law is near enough for three decimals of it.
    for i, report in enumerate(found.levels):
        p = right[:, i].mean()
        half = 1.645 * math.sqrt(p * (1 - p) / 60)
        assert report.accuracy.low == pytest.approx(p - half, abs=1.5 / 60)
        assert report.accuracy.high == pytest.approx(p + half, abs=1.5 / 60)
    gap = right[:, 0].astype(float) - right[:, 1]
    half = 1.645 * gap.std() / math.sqrt(60)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(gap.mean())
    assert found.difference.low == pytest.approx(gap.mean() - half, abs=1.5 / 60)
    unpaired = 1.645 * math.sqrt(sum(right[:, i].var() for i in (0, 1)) / 60)
    assert abs(half - unpaired) > 1e-3, "the test would see it"


def test_the_choice_does_not_depend_on_the_resamples() -> None:
    rng = np.random.default_rng(2)
    run = run_of(outcomes(POPULATIONS["tie"], 60, rng), rng)
    chosen = {plan(run, ALL, draws=draws, seed=seed).chosen.name for draws in (1, 50) for seed in range(5)}
    assert len(chosen) == 1


def test_equal_accuracy_goes_to_the_fewer_tokens_then_the_name() -> None:
    right = [1, 0] * 20
    run = CalibrationRun((trial("c", right, 30), trial("b", right, 20, "sequential"), trial("a", right, 30)))
    assert plan(run, 100).chosen.name == "b"
    assert plan(run, 100, names=["c", "a"]).chosen.name == "a"


def test_a_tolerance_buys_tokens() -> None:
    # 75, 72.5 and 50 %.
    chosen = {t: plan(small(), 100, tolerance=t).chosen.name for t in (0.0, 0.02, 0.025, 0.2, 0.25)}
    assert chosen == {0.0: "b", 0.02: "b", 0.025: "d", 0.2: "d", 0.25: "a"}
    assert "the most accurate is parallel 'b'" in plan(small(), 100, tolerance=0.03).why


def test_what_fits_is_a_quantile_of_the_tokens() -> None:
    costs = [10] * 38 + [90, 100]
    run = CalibrationRun((trial("long", [1] * 40, costs), trial("short", [0] * 40, 9)))
    assert plan(run, 10).chosen.name == "long"
    assert plan(run, 10).chosen.high_tokens == 10
    assert plan(run, 99, quantile=1.0).chosen.name == "short"
    assert plan(run, 100, quantile=1.0).chosen.name == "long"
    assert "no level of the other form fits 10 tokens" in plan(run, 10).why
    with pytest.raises(BudgetError, match=r"expected at least 9 tokens, which 'short', the cheapest level.*got 8\. "):
        plan(run, 8)


def test_a_calibration_under_a_smaller_budget_is_told() -> None:
    run = replace(small(), budget=30)
    assert "measured under" not in plan(run, 30).why
    assert plan(run, 31).why.endswith("; measured under 30 tokens for each problem, fewer than there are now")


def test_a_kind_decides_by_itself_if_it_is_large_enough() -> None:
    # "x" wants 'p', the 60 others want 's', and so do all together.
    p, s = [1] * 20 + [0] * 60, [0] * 20 + [1] * 60
    run = CalibrationRun((trial("p", p), trial("s", s, form="sequential")), ("x",) * 20 + ("y",) * 60)
    assert [plan(run, 10, kind).chosen.name for kind in (None, "x", "y", "z")] == ["s", "p", "s", "s"]
    assert plan(run, 10, "x").basis == "kind 'x'"
    assert plan(run, 10, "z").basis == "all kinds, since kind 'z' has 0 of the 20 that it takes"
    few = plan(run, 10, "x", least=21)
    assert (few.chosen.name, few.problems) == ("s", 80)
    assert few.basis == "all kinds, since kind 'x' has 20 of the 21 that it takes"


def test_as_many_problems_as_it_takes_are_enough() -> None:
    run = CalibrationRun((trial("good", [1] * 5), replace(trial("bad", [0] * 5), level=8)), ("k",) * 5)
    for kind in (None, "k"):
        assert plan(run, 100, kind, least=5).chosen.name == "good"
        found = plan(run, 100, kind, least=6)
        assert (found.chosen.name, found.calibrated) == ("bad", False)


def test_too_few_problems_are_no_ground_for_a_choice() -> None:
    run = replace(small(16), trials=(*small(16).trials, replace(small(16).trials[0], name="a2", level=2)))
    found = plan(run, 100)
    assert (found.chosen.name, found.calibrated) == ("a2", False)
    assert found.why == (
        "16 calibration problems (all kinds) are too few to go by, it takes 20: the default, parallel, at the largest "
        "level that fits, 'a2'"
    )
    assert plan(run, 100, default="sequential").form == "sequential"
    assert plan(run, 100, least=16).calibrated
    only = plan(run, 100, names=["c"])
    assert only.why.endswith("and no parallel level fits 100 tokens: 'c'")


# --- the run as a file ------------------------------------------------------------------------------------------------

RUNS = st.integers(1, 6).flatmap(
    lambda n: st.builds(
        lambda columns, kinds, slack: CalibrationRun(
            tuple(
                Trial(f"p{i}", form, level, np.array(right), np.array(tokens))
                for i, (form, level, right, tokens) in enumerate(columns)
            ),
            kinds,
            None if slack is None else slack + max(max(tokens) for *_, tokens in columns),
        ),
        st.lists(
            st.tuples(
                st.sampled_from(["parallel", "sequential"]),
                st.integers(0, 64),
                st.lists(st.booleans(), min_size=n, max_size=n),
                st.lists(st.integers(1, 10**6), min_size=n, max_size=n),
            ),
            min_size=1,
            max_size=3,
        ),
        st.none() | st.lists(st.text(max_size=3), min_size=n, max_size=n).map(tuple),
        st.none() | st.integers(0, 5),
    )
)


@settings(max_examples=50, deadline=None)
@given(RUNS)
def test_a_run_comes_back_from_its_file(tmp_path_factory: Any, run: CalibrationRun) -> None:
    file = tmp_path_factory.mktemp("run") / "run.json"
    assert run.save(file) == file
    back = CalibrationRun.load(file)
    assert (back.kinds, back.budget, back.names) == (run.kinds, run.budget, run.names)
    for a, b in zip(back.trials, run.trials, strict=True):
        assert (a.form, a.level) == (b.form, b.level)
        assert a.right.dtype == bool
        assert a.tokens.dtype == np.int64
        np.testing.assert_array_equal(a.right, b.right)
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert [f.name for f in file.parent.iterdir()] == ["run.json"]


def changed(**more: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "budget": None,
        "kinds": None,
        "trials": [{"name": "a", "form": "parallel", "level": 1, "right": [True], "tokens": [5]}],
    } | more


def one(**more: Any) -> dict[str, Any]:
    return changed(trials=[changed()["trials"][0] | more])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "calibration run: expected a JSON object; got list."),
        (changed(format_version=2), "format_version: expected at most 1, the newest that this version of proxytune"),
        (changed(format_version="1"), "format_version: expected a whole number from 1 to 1; got '1'"),
        (changed(budgets=3), "expected only the keys format_version, budget, kinds, trials; got unknown 'budgets'"),
        (changed(trials=3), "key 'trials': expected objects with name, form, level, right, tokens; got 3"),
        (changed(trials=[]), "trials: expected one for each policy, at least one, all of different names; got none"),
        (changed(trials=[{"name": "a"}]), r"expected objects with .*; got \[\{'name': 'a'\}\]"),
        (changed(trials=changed()["trials"] * 2), "all of different names; got 'a' twice"),
        (one(rihgt=[True]), "trial 'a': expected only the keys .*; got unknown 'rihgt'"),
        (one(name=""), "name: expected a string, not empty; got ''"),
        (one(form="both"), r"form of 'a': expected 'parallel' or 'sequential'; got 'both'"),
        (one(level=-1), "level of 'a': expected a whole number of samples or extensions, at least 0; got -1"),
        (one(right=[]), "right of 'a': expected a boolean for each problem, at least one; got shape"),
        (one(right=[math.nan]), "right of 'a': .*nan"),
        (one(right=[2]), "right of 'a': expected a boolean"),
        (one(tokens=[5, 6]), "tokens of 'a': expected 1 whole numbers, one for each problem, at least 1; got shape"),
        (one(tokens=[0]), "tokens of 'a': .*at least 1; got"),
        (one(tokens=[math.nan]), "tokens of 'a': .*nan"),
        (one(tokens=[5.0]), "tokens of 'a': .*float64"),
        (one(right=[[True], [True, False]]), "right of 'a': expected a boolean"),
        (one(tokens=[[5], [5, 6]]), "tokens of 'a': expected 1 whole numbers"),
        (one(tokens=[1 << 63]), "tokens of 'a': expected 1 whole numbers"),
        (changed(kinds=["x", "y"]), "kinds: expected 1 strings, one for each problem, or None; got"),
        (changed(kinds="x"), "kinds: expected 1 strings"),
        (changed(kinds=[3]), "kinds: expected 1 strings"),
        (changed(budget=4), "budget: expected at least the 5 tokens that an attempt is said to have spent; got 4"),
        (changed(budget="9"), "budget: expected a whole number of tokens"),
    ],
)
def test_files_are_read_strictly(tmp_path: Path, data: Any, said: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        CalibrationRun.load(file)


def test_files_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="calibration run: expected a file; got no file at .*nowhere.json. Give the f"):
        CalibrationRun.load(tmp_path / "nowhere.json")
    (tmp_path / "cut.json").write_text('{"format_version": 1, ')
    with pytest.raises(InputError, match="cut.json: expected JSON; got"):
        CalibrationRun.load(tmp_path / "cut.json")
    with pytest.raises(InputError, match="calibration run: expected a file that can be read"):
        CalibrationRun.load(tmp_path)
    with pytest.raises(InputError, match="calibration run: expected a file that can be written; got .*no folder"):
        small().save(tmp_path / "no folder" / "run.json")


def test_problems_have_to_be_the_same() -> None:
    with pytest.raises(InputError, match="the same problems in each.*got 2 in 'a', 1 in 'b'"):
        CalibrationRun((trial("a", [1, 0]), trial("b", [1])))


# --- attempts ---------------------------------------------------------------------------------------------------------


@dataclass
class Fixed:
    """Answers what it is told, at a price; a sample at a time while it can pay."""

    name: str
    form: PolicyForm = "parallel"
    level: int = 1
    answers: tuple[Any, ...] = ("a",)
    prompt: int = 2
    price: int = 3

    def __call__(self, task: Any, ledger: TokenLedger) -> list[Sample]:
        ledger.charge(self.prompt, label="prompt")
        samples = []
        for answer in self.answers:
            if ledger.can_afford(self.price):
                ledger.charge(self.price)
                samples.append(Sample(answer))
        return samples or [Sample(None)]


def test_a_run_of_policies_measures_them() -> None:
    policies = [Fixed("p", answers=("a", "b", "b"), level=3), Fixed("s", "sequential", answers=(None,))]
    run = run_policies(policies, ["x", "y"], ["a", "b"], budget=20, kinds=["k", "l"])
    assert [t.right.tolist() for t in run.trials] == [[False, True], [False, False]]
    assert [t.tokens.tolist() for t in run.trials] == [[11, 11], [5, 5]]
    assert [(t.form, t.level) for t in run.trials] == [("parallel", 3), ("sequential", 1)]
    assert (run.kinds, run.budget) == (("k", "l"), 20)
    # Cut short by its budget, it says something else.
    assert run_policies(policies[:1], ["x"], ["a"], budget=6).trials[0].right.tolist() == [True]
    weighed = functools.partial(vote, how="confidence", window=1)
    with pytest.raises(InputError, match="confidences: expected a record of it in every sample"):
        run_policies(policies, ["x"], ["a"], budget=20, voting=weighed)


def test_a_verifier_may_stand_for_the_truths() -> None:
    asked = []

    def verifier(task: str, answer: Any) -> bool:
        asked.append((task, answer))
        return answer == task

    run = run_policies([Fixed("p"), Fixed("n", answers=(None,))], ["a", "b"], verifier, budget=20)
    assert [t.right.tolist() for t in run.trials] == [[True, False], [False, False]]
    assert asked == [("a", "a"), ("b", "a")], "not asked where there is no answer"

    def broken(task: str, answer: Any) -> bool:
        raise KeyError("unit")

    with pytest.raises(InputError, match=r"verifier: expected .*; got KeyError: 'unit' for 'a' to the task 'x'\. Ret"):
        run_policies([Fixed("p")], ["x"], broken, budget=20)


def test_allocate_spends_on_what_the_run_shows() -> None:
    policies = [Fixed("p", answers=("a", "b", "b"), level=3), Fixed("s", "sequential")]
    run = run_policies(policies, list(range(40)), ["b", "b", "a", "b"] * 10, budget=20)
    ledger = TokenLedger(50)
    found = allocate("task", policies, run, ledger)
    assert (found.plan.chosen.name, found.tally.winner, found.spent, found.left) == ("p", "b", 11, 39)
    assert [s.answer for s in found.samples] == ["a", "b", "b"]
    assert found.plan.budget == 50
    assert found.plan.sequential is not None
    assert (ledger.spent, ledger.left) == (11, 39)
    # With room for the cheaper one only, and from a subset of the run.
    assert allocate("task", policies, run, TokenLedger(10)).plan.chosen.name == "s"
    assert allocate("task", policies[1:], run, TokenLedger(50)).tally.winner == "a"
    nothing = [Fixed("p", answers=(None, None), level=3)]
    none = allocate("task", nothing, run, TokenLedger(50))
    assert (none.tally.winner, none.tally.counts, none.tally.note) == (None, {None: 2}, "no sample has an answer")


def named(*policies: Any) -> CalibrationRun:
    return CalibrationRun(tuple(Trial(p.name, p.form, p.level, np.ones(30, bool), np.full(30, 5)) for p in policies))


def test_wrong_policies_are_refused() -> None:
    p, ledger = Fixed("p"), TokenLedger(50)
    for policies, said in (
        ([], "policies: expected at least one, all of different names; got none"),
        ([p, Fixed("p")], "policies: expected at least one, all of different names; got 'p', 'p'"),
        ([Fixed("q")], "names: expected policies of the calibration run: 'p'; got 'q'. Calibrate them too"),
        (
            [Fixed("p", level=2)],
            "policy 'p': expected parallel at level 1, as it was calibrated; got parallel at level 2",
        ),
        ([Fixed("p", "sequential")], "policy 'p': expected parallel at level 1.*got sequential at level 1"),
    ):
        with pytest.raises(InputError, match=said):
            allocate("task", policies, named(p), ledger)
    with pytest.raises(InputError, match="ledger: expected a TokenLedger; got 20"):
        allocate("task", [p], named(p), 20)  # type: ignore[arg-type]
    for call in (lambda: allocate("task", p, named(p), ledger), lambda: run_policies(p, ["x"], ["a"], budget=20)):
        with pytest.raises(InputError, match=r"policies: expected a list; got p\. Pass a list, also of one"):
            call()
    assert ledger.spent == 0
    with pytest.raises(BudgetError, match="expected at least 5 tokens, which 'p', the cheapest level.*got 4"):
        allocate("task", [p], named(p), TokenLedger(4))
    ledger = TokenLedger(5)
    ledger.charge(5)
    with pytest.raises(BudgetError, match="ledger: expected tokens to spend; got 0 left, 5 spent and 0 reserved of 5"):
        allocate("task", [p], named(p), ledger)


class Odd:
    """Does not keep to the rules, in a way of one's choice."""

    name, form, level = "odd", "parallel", 1

    def __init__(self, does: Callable[[TokenLedger], Any]) -> None:
        self.does = does

    def __call__(self, task: Any, ledger: TokenLedger) -> Any:
        return self.does(ledger)


def charged(ledger: TokenLedger, tokens: int, value: Any) -> Any:
    ledger.charge(tokens)
    return value


@pytest.mark.parametrize(
    ("does", "error", "said"),
    [
        (lambda x: x.charge(21), BudgetError, "policy 'odd': expected an attempt within the 20 tokens that are left"),
        (
            lambda x: charged(x, 3, []),
            InputError,
            r"policy 'odd': expected a sequence of samples, at least one; got \[",
        ),
        (lambda x: charged(x, 3, None), InputError, "policy 'odd': expected a sequence of samples.*got None"),
        (lambda x: charged(x, 3, "a"), InputError, "policy 'odd': expected a sequence of samples.*got 'a'"),
        (lambda x: [Sample("a")], InputError, "every token charged.*got 0 tokens charged for 1 samples"),
        (
            lambda x: (x.reserve(4), charged(x, 1, [Sample("a")]))[1],
            InputError,
            "got 1 tokens charged.*4 left reserved",
        ),
    ],
)
def test_policies_have_to_keep_to_the_rules(does: Any, error: type[Exception], said: str) -> None:
    ledger = TokenLedger(20)
    with pytest.raises(error, match=said):
        attempt(Odd(does), "task", ledger)
    assert ledger.spent <= 20


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 60),
    st.integers(0, 30),
)
def test_the_ledger_is_never_exceeded(prices: list[tuple[int, int, int]], budget: int, before: int) -> None:
    policies = [Fixed(f"p{i}", level=i, answers=("a",) * n, prompt=a, price=b) for i, (a, b, n) in enumerate(prices)]
    run = named(*policies)
    ledger = TokenLedger(budget)
    if ledger.can_afford(before):
        ledger.charge(before)
    start = ledger.spent
    try:
        found = allocate("task", policies, run, ledger)
        assert found.spent == ledger.spent - start >= 1
        assert found.left == ledger.left
    except (BudgetError, InputError):  # it could pay for nothing at all, or not for its prompt
        pass
    assert ledger.spent + ledger.left == budget
    assert ledger.held == 0


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"budget": 0}, "budget: expected a whole number of tokens, at least 1; got 0"),
        ({"tolerance": 1.0}, r"tolerance: expected a number in \[0, 1\); got 1.0"),
        ({"tolerance": math.nan}, r"tolerance: expected a number in \[0, 1\); got nan"),
        ({"quantile": 0.0}, r"quantile: expected a number in \(0, 1\]; got 0.0"),
        ({"least": 0}, "least: expected a whole number of problems, at least 1; got 0"),
        ({"default": "both"}, r"default: expected 'parallel' or 'sequential'; got 'both'"),
        ({"draws": 0}, "draws: expected a whole number of resamples, at least 1; got 0"),
        ({"level": 2}, r"level: expected a number in \(0, 1\]; got 2"),
        ({"names": []}, "names: expected policies of the calibration run: 'a', 'b', 'c', 'd'; got none"),
        ({"names": ["a", "x"]}, "names: expected policies.*got 'x'"),
    ],
)
def test_wrong_settings_of_a_plan(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(small(), **{"budget": 100, **kwargs})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (([], ["x"], ["a"]), "policies, tasks: expected at least one of each; got 0 and 1"),
        (([Fixed("p")], [], []), "policies, tasks: expected at least one of each; got 1 and 0"),
        (([Fixed("p")], ["x"], []), "truths: expected the right answer of each of the 1 tasks.*got 0, 0 of them None"),
        (([Fixed("p")], ["x"], [None]), "truths: .*got 1, 1 of them None"),
        (([Fixed("p")], "xy", ["a", "b"]), "tasks: expected a list; got the text 'xy'"),
        (([Fixed("p")], ["x", "y"], "ab"), "truths: expected a list; got the text 'ab'"),
        (([Fixed("p")], ["x", "y"], [4, 5.0]), "truths: expected answers of .* type, str, .* 'a'; got int, such as 4"),
        (([Fixed("p", answers=(4,))], ["x"], ["4"]), "truths: expected .* type, int, which can equal 4; got str, such"),
    ],
)
def test_wrong_use_of_a_run(args: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_policies(*args, budget=20)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policies": ["p", "p"]}, "trials: expected one for each policy.*got 'p' twice"),
        ({"policies": [""]}, "name: expected a string, not empty"),
        ({"kinds": ["k"]}, "kinds: expected 2 strings, one for each problem"),
        ({"kinds": "kk"}, "kinds: expected a list; got the text 'kk'"),
        ({"kinds": [1, 2]}, "kinds: expected 2 strings"),
        ({"budget": 0}, "budget: expected a whole number of tokens, at least 1; got 0"),
    ],
)
def test_what_a_run_cannot_record_is_told_before_an_attempt(wrong: dict[str, Any], said: str) -> None:
    attempts = []

    @dataclass
    class Counted(Fixed):
        def __call__(self, task: Any, ledger: TokenLedger) -> list[Sample]:
            attempts.append(task)
            return super().__call__(task, ledger)

    settings = {"policies": ["p"], "kinds": ["k", "k"], "budget": 20} | wrong
    policies = [Counted(name) for name in settings.pop("policies")]
    with pytest.raises(InputError, match=said):
        run_policies(policies, ["x", "y"], ["a", "a"], **settings)
    assert not attempts


def test_allocation_needs_no_torch() -> None:
    code = "import proxytune.search.allocate, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
