"""Confidences of tokens, groups and traces, and the filter, against closed forms and slow references."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.voting import CONFIDENCES

from proxytune.errors import InputError
from proxytune.voting.confidence import group_confidence, keep_top, self_certainty, token_confidence, trace_scores

INF = math.inf


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: token_confidence(np.zeros((3, 4))), r"log_probs: expected \[T, N\].*k=20; got shape \[3, 4\]"),
        (lambda: token_confidence(np.full((1, 2), -INF), k=2), "log-probabilities in nats: finite, at most 0"),
        (lambda: token_confidence([[-1.0, np.finfo(np.float32).min]], k=2), "no mask .*; got values from -3.4"),
        (lambda: self_certainty(np.array([[-1.0, np.finfo(np.float16).min]])), "no mask"),
        (lambda: self_certainty(np.array([[0.5, 0.5]])), "log-probabilities in nats"),
        (lambda: self_certainty(np.empty((0, 4))), "not empty"),
        (lambda: group_confidence([]), "confidences: expected a sequence of numbers, not empty"),
        (lambda: group_confidence(["a"]), "confidences: expected a sequence of numbers"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
