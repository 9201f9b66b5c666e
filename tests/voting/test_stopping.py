"""Early stops: the online filter against the offline one, consensus, adaptive consistency in exact fractions."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.voting import CONFIDENCES, SURE, samples_of

from proxytune.errors import InputError
from proxytune.voting.confidence import group_confidence, threshold_of, trace_scores
from proxytune.voting.stopping import ConfidenceTracker, OnlineFilter, consensus, leader_probability, settled
from proxytune.voting.vote import Sample, vote

NAN = math.nan


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
    assert consensus(vote(samples_of(*"a" * 19, "b")))
    assert not consensus(vote(samples_of(*"a" * 18, "b")))
    assert not consensus(vote(samples_of(*"a" * 18, None))), "no answer is doubt"
    assert not consensus(vote(samples_of(None, None)))


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
    assert settled(vote(samples_of(*"aaaa")).counts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: OnlineFilter(warmup=0), "warmup: expected a whole number of traces, at least 1; got 0"),
        (lambda: OnlineFilter(window=0.5), "window: expected a whole number of tokens, at least 1; got 0.5"),
        (
            lambda: OnlineFilter(window=4).keep_going(ConfidenceTracker(5)),
            "tracker: expected windows of 4 tokens; got 5",
        ),
        (lambda: OnlineFilter(window=4).keep_going([1.0, NAN]), "confidence: expected a finite number; got nan"),
        (lambda: leader_probability(-1, 0), "leader: expected a whole number of votes"),
        (lambda: leader_probability(1.5, 0), "leader: expected a whole number of votes.*consensus"),
        (lambda: settled({"a": 1.0}), "leader: expected a whole number of votes"),
        (lambda: consensus(vote(SURE), 1.5), r"least: expected a number in \(0, 1\]"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
