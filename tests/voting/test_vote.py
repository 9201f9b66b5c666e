"""Votes, filters, stops and what they stand on, against closed forms, slow references and properties."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proxytune.errors import InputError
from proxytune.stats.bootstrap import interval
from proxytune.stats.calibration import auroc, brier, ece
from proxytune.stats.importance import kool_log_weights, weighted_mean
from proxytune.voting.choice import choose_vote
from proxytune.voting.confidence import (
    group_confidence,
    keep_top,
    self_certainty,
    threshold_of,
    token_confidence,
    trace_scores,
)
from proxytune.voting.stopping import ConfidenceTracker, OnlineFilter, consensus, leader_probability, settled
from proxytune.voting.vote import Sample, borda_points, sample_scores, vote

NAN, INF = math.nan, math.inf
ANSWERS = st.sampled_from(["a", "b", "c", None])
# Quarters: sums are exact, so ties are ties however they are scaled.
CONFIDENCES = st.lists(st.integers(0, 120).map(lambda n: n / 4), min_size=1, max_size=12)
# Every record, so that each way to vote has what it needs.
SAMPLES = st.lists(
    st.builds(
        Sample,
        ANSWERS,
        CONFIDENCES.map(np.array),
        st.floats(0.1, 10),
        st.floats(0, 5),
        st.lists(st.floats(0.01, 1), min_size=1, max_size=3).map(np.array),
    ),
    min_size=1,
    max_size=8,
)
WAYS: list[dict[str, Any]] = [
    {"how": "majority"},
    {"how": "confidence", "score": "mean"},
    {"how": "deepconf", "eta": 40, "window": 3},
    {"how": "borda"},
    {"how": "margin"},
]


def of(*answers: Any, **kwargs: Any) -> list[Sample]:
    return [Sample(answer, **kwargs) for answer in answers]


def close(tally: Any, other: Any) -> None:
    assert tally.winner == other.winner
    assert tally.counts == other.counts
    assert tally.shares == pytest.approx(other.shares)


# --- confidence ------------------------------------------------------------------------------------------------------


def test_token_confidence_of_uniform_and_of_sure_rows() -> None:
    rows = np.log(np.full((3, 50), 1 / 50))
    np.testing.assert_allclose(token_confidence(rows), math.log(50))
    sure = np.log(np.array([[0.7, 0.2, 0.05, 0.05]]))
    np.testing.assert_allclose(token_confidence(sure, k=2), -(math.log(0.7) + math.log(0.2)) / 2)


def test_self_certainty_is_the_divergence_from_uniform() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(16), size=5)
    want = np.mean([np.sum(1 / 16 * np.log((1 / 16) / row)) for row in p])
    assert self_certainty(np.log(p)) == pytest.approx(want)
    assert self_certainty(np.log(np.full((2, 8), 1 / 8))) == pytest.approx(0, abs=1e-12)


@given(CONFIDENCES, st.integers(1, 15))
def test_groups_are_means_of_windows(values: list[float], window: int) -> None:
    width = min(window, len(values))
    want = [np.mean(values[i : i + width]) for i in range(len(values) - width + 1)]
    np.testing.assert_allclose(group_confidence(values, window), want, atol=1e-9)


def test_trace_scores_in_closed_form() -> None:
    values = np.arange(1.0, 24.0)  # windows of 4: means 2.5, 3.5, … 21.5, twenty of them
    scores = trace_scores(values, 4)
    assert scores.mean == 12
    assert scores.lowest_group == 2.5
    assert scores.bottom_groups == 3.0  # of 2.5 and 3.5
    assert scores.tail == 21.5
    # A trace that is shorter than a window is one group; a share of the length is rounded.
    assert trace_scores(values).lowest_group == 12
    assert trace_scores(values, 0.17).lowest_group == 2.5


@given(st.lists(st.floats(0, 30), min_size=1, max_size=30), st.floats(0.5, 100), st.floats(0.5, 100))
def test_a_larger_eta_keeps_what_a_smaller_one_does(scores: list[float], eta: float, other: float) -> None:
    small, large = keep_top(scores, min(eta, other)), keep_top(scores, max(eta, other))
    assert small.any()
    assert (large | ~small).all()
    assert small[np.argmax(scores)]
    assert keep_top(scores, 100).all()
    assert (small == (np.array(scores) >= np.percentile(scores, 100 - min(eta, other)))).all()


def test_the_filter_s_shares() -> None:
    scores = np.arange(16.0)
    assert keep_top(scores, 10).sum() == 2  # what reaches 13.5
    assert keep_top(scores, 90).sum() == 14
    assert keep_top(np.arange(101.0), 10).sum() == 11
    assert keep_top([3.0] * 5, 10).all(), "ties are kept"


# --- votes -----------------------------------------------------------------------------------------------------------


@given(st.lists(ANSWERS, min_size=1, max_size=12))
def test_the_majority_is_the_vote_with_equal_weights(answers: list[str | None]) -> None:
    counts = Counter(answers)
    best = max((n for a, n in counts.items() if a is not None), default=0)
    for weight in (1.0, 0.3):
        tally = vote(of(*answers, weight=weight))
        assert tally.counts == counts
        assert tally.shares == pytest.approx({a: n / len(answers) for a, n in counts.items()})
        assert tally.answered == (best > 0)
        # Among equals, the first in the alphabet.
        assert tally.winner == min((a for a, n in counts.items() if a is not None and n == best), default=None)
        assert tally.share == pytest.approx(best / len(answers))


@settings(max_examples=60)
@pytest.mark.parametrize("way", WAYS)
@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(way: dict[str, Any], samples: list[Sample], random: Any) -> None:
    want = vote(samples, **way)
    random.shuffle(samples)
    got = vote(samples, **way)
    assert (got.winner, got.counts, got.filtered) == (want.winner, want.counts, want.filtered)
    assert got.shares == want.shares, "bit for bit"
    assert list(got.shares) == list(want.shares)


@settings(max_examples=60)
@pytest.mark.parametrize("way", WAYS)
@given(SAMPLES, st.integers(-20, 20))
def test_only_the_ratio_of_weights_matters(way: dict[str, Any], samples: list[Sample], power: int) -> None:
    scaled = [  # by a power of two: exact, so that ties stay ties
        Sample(s.answer, s.confidences, s.weight * 2.0**power, s.self_certainty, s.margins) for s in samples
    ]
    close(vote(scaled, **way), vote(samples, **way))
    assert math.fsum(vote(samples, **way).shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("way", WAYS)
@given(SAMPLES)
def test_no_answer_is_counted_and_never_wins(way: dict[str, Any], samples: list[Sample]) -> None:
    tally = vote(samples, **way)
    assert (tally.winner is None) == all(s.answer is None for s in samples)
    assert sum(tally.counts.values()) + tally.filtered == len(samples)
    if tally.winner is None:
        assert tally.note in ("no sample has an answer", "every score is 0: majority")


def test_weights_of_a_tree_decide() -> None:
    tally = vote([Sample("a", weight=0.2), Sample("a", weight=0.2), Sample("b", weight=0.5), Sample(None, weight=0.1)])
    assert tally.winner == "b"
    assert tally.share == pytest.approx(0.5)
    assert list(tally.shares) == ["b", "a", None]
    assert tally.totals["a"] == pytest.approx(0.4)
    assert tally.counts == {"a": 2, "b": 1, None: 1}


def test_ties_go_by_count_then_heaviest_then_alphabet() -> None:
    assert vote([Sample("z", weight=1), Sample("z", weight=1), Sample("a", weight=2)]).winner == "z"
    assert vote([Sample("z", weight=3), Sample("z", weight=1), *of("a", "a", weight=2)]).winner == "z"
    assert vote(of("z", "a")).winner == "a"
    assert vote(of(2, "1")).winner == 2, "by type first"
    for pair in ((1, 1.0), (1.0, 1)):
        assert type(vote(of(*pair)).winner) is float, "equal answers are one class, whoever comes first"


def test_confidence_and_its_filter() -> None:
    samples = [
        *of("wrong", "wrong", "wrong", confidences=np.array([5.0, 1.0, 5.0])),
        *of("right", "right", confidences=np.array([4.0, 3.5, 4.0])),
    ]
    assert vote(samples).winner == "wrong"
    by_lowest = vote(samples, "confidence", window=1)
    assert by_lowest.shares == pytest.approx({"right": 7 / 10, "wrong": 3 / 10})
    assert vote(samples, "confidence", score="mean", window=1).winner == "wrong"
    strict = vote(samples, "deepconf", eta=30, window=1)
    assert (strict.winner, strict.share, strict.filtered) == ("right", 1.0, 3)
    assert vote(samples, "deepconf", threshold=3.6, window=1, score="mean").filtered == 0
    assert vote(samples, "deepconf", threshold=3.0, window=1).counts == {"right": 2}


def test_a_filter_that_leaves_no_answer_falls_back_to_the_majority() -> None:
    sure, unsure = np.full(4, 9.0), np.full(4, 1.0)
    samples = [Sample(None, sure), Sample("a", unsure), Sample("b", unsure), Sample("b", unsure)]
    tally = vote(samples, "deepconf", eta=10)
    assert (tally.winner, tally.filtered) == ("b", 0)
    assert tally.note == "no sample that was kept has an answer: majority of all"


def test_scores_that_are_all_0_weigh_nothing() -> None:
    for nothing in (0.0, 5e-324):
        tally = vote(of("a", "a", "b", confidences=np.full(3, nothing), weight=0.1), "confidence")
        assert (tally.winner, tally.note) == ("a", "every score is 0: majority")
        assert tally.share == pytest.approx(2 / 3)


def test_a_stopped_sample_does_not_vote() -> None:
    samples = [*of("a", "a", "a", stopped=True), *of("b")]
    tally = vote(samples)
    assert (tally.winner, tally.counts, tally.stopped) == ("b", {"b": 1}, 3)
    with pytest.raises(InputError, match="at least one that was not stopped; got 3, all of them stopped"):
        vote(samples[:3])


def test_borda_points() -> None:
    np.testing.assert_allclose(borda_points([0.1, 0.9, 0.5], power=1), [1, 3, 2])
    np.testing.assert_allclose(borda_points([0.1, 0.9, 0.5]), [1, math.sqrt(3), math.sqrt(2)])
    np.testing.assert_allclose(borda_points([7, 7, 1, 9], power=2), [6.5, 6.5, 1, 16])
    np.testing.assert_allclose(borda_points([3, 1, 2], power=0), 1)
    samples = [Sample(a, self_certainty=c) for a, c in (("a", 1.0), ("a", 1.5), ("b", 9.0))]
    assert vote(samples, "borda", power=0).winner == vote(samples, "borda").winner == "a"
    assert vote(samples, "borda", power=2).winner == "b"
    assert vote(samples, "borda", power=1).shares == pytest.approx({"a": 0.5, "b": 0.5})


def test_margins_are_means_over_the_answer_summed_per_answer() -> None:
    samples = [
        Sample("a", margins=np.array([0.2, 0.4])),
        Sample("a", margins=np.array([0.1])),
        Sample("b", margins=np.array([0.9, 0.5, 0.7])),
        Sample(None),
    ]
    tally = vote(samples, "margin")
    assert tally.totals == pytest.approx({"a": 0.4, "b": 0.7, None: 0})
    np.testing.assert_allclose(sample_scores(samples, "margin"), [0.3, 0.1, 0.7, 0])


# --- trees -----------------------------------------------------------------------------------------------------------


def test_kool_weights_in_closed_form() -> None:
    log_p = np.log([0.5, 0.25, 0.01])
    want = np.exp(log_p) / (1 - np.exp(-np.exp(log_p + 1.5)))
    np.testing.assert_allclose(np.exp(kool_log_weights(log_p, -1.5)), want, rtol=1e-12)
    np.testing.assert_allclose(kool_log_weights(log_p, -INF), log_p)  # all were drawn
    # Far below κ a weight is exp(κ), far above it is p; nothing overflows or underflows.
    np.testing.assert_allclose(kool_log_weights([-5000.0, -40.0, -1e-3], -2.0)[:2], -2.0, atol=1e-15)
    np.testing.assert_allclose(kool_log_weights([-0.5, -3000.0], -9000.0), [-0.5, -3000.0])
    np.testing.assert_allclose(kool_log_weights([-0.5, -0.6], [-1.0, -INF])[1], -0.6)


@given(st.floats(-60, 0), st.floats(-60, 5))
def test_kool_weights_are_continuous_and_at_least_both_limits(log_p: float, kappa: float) -> None:
    got = float(kool_log_weights([log_p], kappa)[0])
    assert max(log_p, kappa) - 1e-12 <= got <= np.logaddexp(log_p, kappa) + 1e-12
    assert abs(float(kool_log_weights([log_p], kappa + 1e-9)[0]) - got) < 1e-8 + 1e-9


def test_the_estimate_without_normalising_is_unbiased() -> None:
    """Gumbel-top-2 of five, many times: the mean of Σ w f is Σ p f; equal votes would be far off."""
    rng = np.random.default_rng(0)
    p, f = np.array([0.5, 0.2, 0.15, 0.1, 0.05]), np.array([1.0, 0, 1, 0, 0])
    estimates, normalised, equal = [], [], []
    for _ in range(6000):
        g = np.log(p) + rng.gumbel(size=5)
        order = np.argsort(-g)
        top, kappa = order[:2], g[order[2]]
        logs = kool_log_weights(np.log(p)[top], kappa)
        estimates.append(weighted_mean(f[top], logs, normalised=False))
        normalised.append(weighted_mean(f[top], logs))
        equal.append(f[top].mean())
    error = 5 * np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(f @ p, abs=error)
    assert abs(np.mean(equal) - f @ p) > 2 * error
    assert abs(np.mean(normalised) - f @ p) < abs(np.mean(equal) - f @ p) / 2
    assert np.std(normalised) < np.std(estimates)
    assert weighted_mean([1.0, 0.0], [-2000.0, -2001.0]) == pytest.approx(1 / (1 + math.exp(-1)))


# --- stopping --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(CONFIDENCES, min_size=4, max_size=9), st.integers(1, 6), st.sampled_from([10, 50, 90]))
def test_online_stops_exactly_what_the_filter_would_drop(traces: list[list[float]], window: int, eta: float) -> None:
    online = OnlineFilter(eta, window=window, warmup=4)
    for i, trace in enumerate(traces[:4], 1):
        assert online.keep_going([0.0] * 20), "nothing stops during the warm-up"
        assert online.update(trace_scores(trace, window)) == (i == 4)
    scores = np.array([trace_scores(trace, window).lowest_group for trace in traces])
    assert online.threshold == threshold_of(scores[:4], eta)
    for trace, score in zip(traces, scores, strict=True):
        tracker, stopped_at = online.track(), None
        for t, confidence in enumerate(trace, 1):
            tracker.push(confidence)
            assert online.keep_going(tracker) == online.keep_going(trace[:t])
            if not online.keep_going(tracker) and stopped_at is None:
                stopped_at = t
        kept = score >= online.threshold
        assert online.votes(trace_scores(trace, window)) == kept
        # A trace shorter than a window is judged at its end; all others where they fall below, and not before.
        assert (stopped_at is None) == (kept or len(trace) < window)
        if stopped_at is not None:
            assert stopped_at >= window
            before = [] if stopped_at == window else group_confidence(trace[: stopped_at - 1], window)
            assert all(group >= online.threshold for group in before)
    samples = [Sample(i % 2, np.array(trace)) for i, trace in enumerate(traces)]
    offline = vote(samples, "deepconf", threshold=online.threshold, window=window) if (scores > 0).any() else None
    if offline is not None and not offline.note and (scores >= online.threshold).any():
        assert sum(offline.counts.values()) == (scores >= online.threshold).sum()


def test_a_tracker_keeps_no_more_than_a_window() -> None:
    tracker = ConfidenceTracker(8)
    assert [tracker.push(1.0) for _ in range(7)] == [None] * 7
    for _ in range(1000):
        tracker.push(1.0)
    assert (tracker.group, tracker.lowest, tracker.length) == (1.0, 1.0, 1007)
    assert len(tracker._sums) == 9


def test_a_trace_that_fell_below_stays_stopped() -> None:
    online = OnlineFilter(100, window=2, warmup=1)
    online.update(trace_scores([4.0, 4.0], 2))
    tracker = online.track()
    going = []
    for confidence in (5.0, 4.0, 3.0, 9.0, 9.0):  # windows of 4.5, 3.5, 6, 9
        tracker.push(confidence)
        going.append(online.keep_going(tracker))
    assert going == [True, True, False, False, False]


def test_later_traces_do_not_move_the_threshold() -> None:
    online = OnlineFilter(50, window=1, warmup=2)
    for value in (2.0, 4.0, 100.0):
        online.update(trace_scores([value]))
    assert online.threshold == 3.0


def test_consensus() -> None:
    assert consensus(vote(of(*"a" * 19, "b")))
    assert not consensus(vote(of(*"a" * 18, "b")))
    assert not consensus(vote(of(*"a" * 18, None))), "no answer is doubt"
    assert not consensus(vote(of(None, None)))


def beta_tail(v1: int, v2: int) -> Fraction:
    """The integral of the Beta(v1+1, v2+1) density over [½, 1], by expanding (1−x)^v2: exact, and another way."""
    norm = Fraction(math.factorial(v1 + v2 + 1), math.factorial(v1) * math.factorial(v2))
    total = Fraction(0)
    for j in range(v2 + 1):
        power = v1 + j + 1
        total += (-1) ** j * math.comb(v2, j) * (1 - Fraction(1, 2**power)) / power
    return norm * total


def test_the_beta_tail_is_exact() -> None:
    for v1, v2 in itertools.product(range(13), repeat=2):
        assert leader_probability(v1, v2) == float(beta_tail(v1, v2))
    assert leader_probability(5, 5) == 0.5
    assert leader_probability(4, 0) == 1 - 2**-5
    assert leader_probability(100_00, 0) == 1.0


def test_the_beta_tail_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for v1, v2 in [(0, 0), (3, 1), (7, 2), (40, 25), (300, 280), (5000, 4900), (10, 60), (0, 300)]:
        assert leader_probability(v1, v2) == pytest.approx(stats.beta.sf(0.5, v1 + 1, v2 + 1), rel=1e-9)


def test_adaptive_consistency_stops_where_the_paper_s_rule_does() -> None:
    assert not settled({"a": 3})  # 1 − 2⁻⁴ = 0.9375
    assert settled({"a": 4})
    assert settled({"b": 1, "a": 7})  # 0.980
    assert not settled({"a": 5, "b": 1})  # 0.9375
    assert settled({"a": 4, None: 4}), "no answer is no rival"
    assert not settled({None: 9})
    assert not settled({})
    assert settled(vote(of(*"aaaa")).counts)


# --- reliability -----------------------------------------------------------------------------------------------------


def slow_auroc(scores: Sequence[float], right: Sequence[bool], groups: Sequence[int]) -> float:
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, t, g in zip(scores, right, groups, strict=True)
        for b, u, h in zip(scores, right, groups, strict=True)
        if t and not u and g == h
    ]
    return sum(pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=2, max_size=25))
def test_auroc_counts_pairs(rows: list[tuple[int, bool, int]]) -> None:
    scores, right, groups = zip(*rows, strict=True)
    assume(any(len({t for _, t, g in rows if g == h}) == 2 for h in range(3)))
    assert auroc(scores, right) == pytest.approx(slow_auroc(scores, right, [0] * len(rows)))
    assert auroc(scores, right, groups) == pytest.approx(slow_auroc(scores, right, groups))
    flipped = [-s for s in scores]
    assert auroc(flipped, right, groups) == pytest.approx(1 - auroc(scores, right, groups))


def test_brier_and_ece_in_closed_form() -> None:
    assert brier([1, 0, 0.5], [True, False, True]) == pytest.approx(0.25 / 3)
    p = np.repeat([0.1, 0.9], 10)
    right = np.array([1] + [0] * 9 + [1] * 9 + [0])
    assert ece(p, right) == pytest.approx(0, abs=1e-12)
    assert ece(p, 1 - right) == pytest.approx(0.8)
    assert ece([0.7] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.2), "equal probabilities are one bin"
    assert ece([0.2, 0.4], [0, 1], bins=1) == pytest.approx(0.2)
    assert ece([0.2, 0.4], [0, 1], bins=2) == pytest.approx(0.4)
    # The middle of three equal ones is in the lower half: not with 0.9, of which it would take the edge.
    assert ece([0.5, 0.5, 0.5, 0.9], [1, 1, 1, 0], bins=2) == pytest.approx((1.5 + 0.9) / 4)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_ece_does_not_depend_on_the_order(rows: list[tuple[float, bool]], random: Any) -> None:
    before = ece(*zip(*rows, strict=True), bins=4)
    random.shuffle(rows)
    assert ece(*zip(*rows, strict=True), bins=4) == pytest.approx(before)


def test_intervals_cover() -> None:
    """A 90 % interval of a known AUROC, on 40 data sets; by problem where samples of one problem stand together."""
    rng, covered = np.random.default_rng(1), 0
    for seed in range(40):
        right = rng.random(200) < 0.5
        scores = rng.normal(size=200) + right  # AUROC Φ(1/√2) = 0.7602
        found = interval(auroc, scores, right, level=0.9, draws=150, seed=seed)
        assert found.low <= found.value <= found.high
        covered += 0.7602 in found
    assert 30 <= covered <= 40
    problem = np.repeat(np.arange(20), 10)
    one = np.repeat(rng.random(20) < 0.5, 10)  # a problem is all right or all wrong: 20 data points, not 200
    by_problem = interval(brier, np.full(200, 0.3), one, problem)
    by_sample = interval(brier, np.full(200, 0.3), one)
    assert by_problem.high - by_problem.low > 2 * (by_sample.high - by_sample.low)
    assert interval(brier, np.full(200, 0.3), one, problem) == by_problem


def calibration(
    signal: float, problems: int = 20, rng: int = 0, difficulty: float = 0.0
) -> tuple[list[list[Sample]], list[str]]:
    """Ten samples of each problem, half of them right; confidence = difficulty + signal + noise."""
    random, out = np.random.default_rng(rng), []
    for i in range(problems):
        easy = i % 2
        rights = random.random(10) < (0.9 if easy else 0.1) if difficulty else np.arange(10) < 5
        out.append(
            [
                Sample("yes" if r else "no", random.normal(5 + signal * r + difficulty * easy, 1, size=4).clip(0))
                for r in rights
            ]
        )
    return out, ["yes"] * problems


def test_a_vote_is_chosen_where_confidence_tells_right_from_wrong() -> None:
    choice = choose_vote(*calibration(1.0), draws=200)
    assert (choice.how, choice.score, choice.right, choice.wrong) == ("deepconf", "lowest_group", 100, 100)
    assert choice.auroc.low > 0.5
    assert "it tells right from wrong" in choice.why


@pytest.mark.parametrize(
    ("signal", "why"), [(0.0, "it cannot tell right from wrong"), (-1.0, "right answers score lower than wrong ones")]
)
def test_the_majority_is_the_fallback(signal: float, why: str) -> None:
    choice = choose_vote(*calibration(signal), draws=200)
    assert choice.how == "majority"
    assert why in choice.why


def test_a_confidence_that_only_knows_which_problems_are_hard_is_no_signal() -> None:
    choice = choose_vote(*calibration(0.0, problems=60, difficulty=3.0), "confidence", draws=200)
    assert choice.pooled > 0.8
    assert choice.how == "majority"
    assert 0.5 in choice.auroc


def test_too_few_to_tell() -> None:
    choice = choose_vote(*calibration(1.0, problems=3))
    assert (choice.how, choice.auroc) == ("majority", None)
    assert "15 right and 15 wrong answers in 3 problems that have both; it takes 20 of each in 5" in choice.why
    nothing = choose_vote([of(None, None)], ["yes"])
    assert (nothing.how, nothing.unanswered) == ("majority", 2)
    problems, truths = calibration(1.0)
    problems[0].append(Sample("yes", stopped=True))  # without a record: it is left out
    assert choose_vote(problems, truths, draws=50).right == 100
    assert choose_vote(problems, truths, "majority").how == "majority"


# --- wrong use -------------------------------------------------------------------------------------------------------

SURE = [Sample("a", np.array([1.0]), self_certainty=1.0, margins=np.array([0.5]))]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Sample(["a"]), r"answer: expected a hashable value .* got \['a'\] of type list"),
        (lambda: Sample(("a", ["b"])), "answer: expected a hashable value"),
        (lambda: Sample(NAN), "answer: expected a hashable value that equals itself.*got nan"),
        (lambda: Sample("a", weight=-1.0), "weight: expected at least 0; got -1"),
        (lambda: Sample("a", weight=NAN), "weight: expected finite numbers; got nan at 0"),
        (lambda: Sample("a", np.array([])), "confidences: expected a sequence of numbers, not empty"),
        (lambda: Sample("a", np.array([1.0, INF])), "confidences: expected finite numbers; got inf at 1"),
        (lambda: Sample("a", np.ones((2, 2))), r"confidences: expected a sequence.*got shape \[2, 2\]"),
        (lambda: Sample("a", margins=np.array([1.5])), r"margins: expected p₁ − p₂ in \[0, 1\]"),
        (lambda: Sample("a", self_certainty=INF), "self_certainty: expected finite numbers"),
        (lambda: vote([]), "samples: expected at least one that was not stopped; got none"),
        (lambda: vote(of("a", weight=0.0)), "votes: expected weights with a finite sum > 0"),
        (lambda: vote(of("a"), "confidence"), "confidences: expected a record of it in every sample; got None"),
        (lambda: vote(of("a"), "borda"), "self_certainty: expected a record"),
        (lambda: vote(of("a"), "margin"), "margins: expected a record"),
        (lambda: vote(SURE, "best"), "how: expected majority | confidence"),
        (lambda: vote(SURE, "confidence", score="median"), "score: expected mean | lowest_group"),
        (lambda: vote(SURE, "deepconf", eta=0), r"eta: expected a number in \(0, 100\]; got 0"),
        (lambda: vote(SURE, "deepconf", eta=101), "eta: expected a number"),
        (lambda: vote(SURE, "deepconf", threshold=NAN), "threshold: expected finite numbers"),
        (lambda: vote(SURE, "confidence", window=0), "window: expected a whole number of tokens, or a share"),
        (lambda: vote(SURE, "confidence", window=1.5), "window: expected a whole number"),
        (lambda: vote(SURE, "borda", power=-1), "power: expected at least 0"),
        (lambda: vote([Sample("a", np.array([-1.0]))], "confidence"), "votes: expected scores of at least 0; got -1"),
        (lambda: token_confidence(np.zeros((3, 4))), r"log_probs: expected \[T, N\].*k=20; got shape \[3, 4\]"),
        (lambda: token_confidence(np.full((1, 2), -INF), k=2), "log-probabilities in nats: finite, at most 0"),
        (lambda: self_certainty(np.array([[0.5, 0.5]])), "log-probabilities in nats"),
        (lambda: self_certainty(np.empty((0, 4))), "not empty"),
        (lambda: group_confidence([]), "confidences: expected a sequence of numbers, not empty"),
        (lambda: group_confidence(["a"]), "confidences: expected a sequence of numbers"),
        (lambda: OnlineFilter(warmup=0), "warmup: expected a whole number of traces, at least 1; got 0"),
        (lambda: OnlineFilter(window=0.5), "window: expected a whole number of tokens, at least 1; got 0.5"),
        (
            lambda: OnlineFilter(window=4).keep_going(ConfidenceTracker(5)),
            "tracker: expected windows of 4 tokens; got 5",
        ),
        (lambda: OnlineFilter(window=4).keep_going([1.0, NAN]), "confidence: expected finite numbers; got nan"),
        (lambda: leader_probability(-1, 0), "leader: expected a whole number of votes"),
        (lambda: leader_probability(1.5, 0), "leader: expected a whole number of votes.*consensus"),
        (lambda: settled({"a": 1.0}), "leader: expected a whole number of votes"),
        (lambda: consensus(vote(SURE), 1.5), r"least: expected a number in \(0, 1\]"),
        (lambda: kool_log_weights([0.5], 0.0), "log_p: expected at most 0; got 0.5"),
        (lambda: kool_log_weights([-INF], 0.0), "log_p: expected finite numbers"),
        (lambda: kool_log_weights([-1.0], NAN), "kappa: expected one number or 1, finite or −inf; got nan"),
        (lambda: weighted_mean([1.0], [0.0, 0.0]), "log_weights: expected 1, one per value; got 2"),
        (lambda: weighted_mean([1.0], [800.0], normalised=False), "weights that a float can hold"),
        (lambda: auroc([1.0, 2.0], [True, True]), "right: expected right and wrong answers; got 2 right of 2"),
        (lambda: auroc([1.0, 2.0], [True, False], [0, 1]), "right and wrong answers to the same problem"),
        (lambda: auroc([1.0], [True, False]), "right: expected 1 booleans, one per score"),
        (lambda: auroc([NAN], [True]), "scores: expected finite numbers"),
        (lambda: auroc([1.0, 2.0], [True, False], [0]), "groups: expected 2, one per score"),
        (lambda: brier([1.5], [True]), r"probabilities: expected values in \[0, 1\]"),
        (lambda: ece([], []), "probabilities: expected a sequence of numbers, not empty"),
        (lambda: ece([0.5], [True], bins=0), "bins: expected a whole number"),
        (lambda: interval(auroc, [1, 2, 3], [True, False, False], [0, 0, 1], draws=9, level=2), "level: expected"),
        (
            lambda: choose_vote([SURE], []),
            "truths: expected .* one right answer .* for each; got 1 problems and 0 truths",
        ),
        (lambda: choose_vote([SURE], [None]), "1 of them None"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


def test_votes_need_no_torch() -> None:
    code = "import proxytune.stats.calibration, proxytune.voting.stopping, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
