"""Votes, against closed forms and properties."""

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.voting import CONFIDENCES, SURE, samples_of

from proxytune.errors import InputError
from proxytune.voting.vote import Sample, borda_points, sample_scores, vote

NAN, INF = math.nan, math.inf
ANSWERS = st.sampled_from(["a", "b", "c", None])
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


def close(tally: Any, other: Any) -> None:
    assert tally.winner == other.winner
    assert tally.counts == other.counts
    assert tally.shares == pytest.approx(other.shares)


@given(st.lists(ANSWERS, min_size=1, max_size=12))
def test_the_majority_is_the_vote_with_equal_weights(answers: list[str | None]) -> None:
    counts = Counter(answers)
    best = max((n for a, n in counts.items() if a is not None), default=0)
    for weight in (1.0, 0.3):
        tally = vote(samples_of(*answers, weight=weight))
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
    assert vote([Sample("z", weight=3), Sample("z", weight=1), *samples_of("a", "a", weight=2)]).winner == "z"
    assert vote(samples_of("z", "a")).winner == "a"
    assert vote(samples_of(2, "1")).winner == 2, "by type first"
    for pair in ((1, 1.0), (1.0, 1)):
        assert type(vote(samples_of(*pair)).winner) is float, "equal answers are one class, whoever comes first"


def test_confidence_and_its_filter() -> None:
    samples = [
        *samples_of("wrong", "wrong", "wrong", confidences=np.array([5.0, 1.0, 5.0])),
        *samples_of("right", "right", confidences=np.array([4.0, 3.5, 4.0])),
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
        tally = vote(samples_of("a", "a", "b", confidences=np.full(3, nothing), weight=0.1), "confidence")
        assert (tally.winner, tally.note) == ("a", "every score is 0: majority")
        assert tally.share == pytest.approx(2 / 3)


def test_a_stopped_sample_does_not_vote() -> None:
    samples = [*samples_of("a", "a", "a", stopped=True), *samples_of("b")]
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Sample(["a"]), r"answer: expected a hashable value .* got \['a'\] of type list"),
        (lambda: Sample(("a", ["b"])), "answer: expected a hashable value"),
        (lambda: Sample(torch.tensor(1)), r"answer: expected a hashable value .* got tensor\(1\) of type Tensor"),
        (lambda: Sample(torch.tensor([1, 2])), "answer: expected a hashable value"),
        (lambda: Sample(NAN), "answer: expected a hashable value that equals itself.*got nan"),
        (lambda: Sample("a", weight=-1.0), "weight: expected a finite number ≥ 0; got -1"),
        (lambda: Sample("a", weight=NAN), "weight: expected a finite number ≥ 0; got nan"),
        (lambda: Sample("a", np.array([])), "confidences: expected a sequence of numbers, not empty"),
        (lambda: Sample("a", np.array([1.0, INF])), "confidences: expected finite numbers; got inf at index 1"),
        (lambda: Sample("a", np.ones((2, 2))), r"confidences: expected a sequence.*got shape \[2, 2\]"),
        (lambda: Sample("a", margins=np.array([1.5])), r"margins: expected p₁ − p₂ in \[0, 1\]"),
        (lambda: Sample("a", self_certainty=INF), "self_certainty: expected a finite number; got inf"),
        (lambda: vote([]), "samples: expected at least one that was not stopped; got none. Draw some."),
        (lambda: vote(samples_of("a", weight=0.0)), "votes: expected weights with a finite sum > 0"),
        (lambda: vote(samples_of("a"), "confidence"), "confidences: expected a record of it in every sample; got None"),
        (lambda: vote(samples_of("a"), "borda"), "self_certainty: expected a record"),
        (lambda: vote(samples_of("a"), "margin"), "margins: expected a record"),
        (lambda: vote(SURE, "best"), "how: expected 'majority', 'confidence', .*; got 'best'"),
        (lambda: vote(SURE, "confidence", score="median"), "score: expected 'mean', 'lowest_group', .*; got 'median'"),
        (lambda: vote(SURE, "deepconf", eta=0), r"eta: expected a number in \(0, 100\]; got 0"),
        (lambda: vote(SURE, "deepconf", eta=101), "eta: expected a number"),
        (lambda: vote(SURE, "deepconf", threshold=NAN), "threshold: expected a finite number of nats; got nan"),
        (lambda: vote(SURE, "confidence", window=0), "window: expected a whole number of tokens, or a share"),
        (lambda: vote(SURE, "confidence", window=1.5), "window: expected a whole number"),
        (lambda: vote(SURE, "borda", power=-1), "power: expected a finite number ≥ 0; got -1"),
        (lambda: vote(list("ab")), "samples: expected a list of Sample objects; got 'a'. Wrap each answer"),  # type: ignore[arg-type]
        (lambda: vote("a"), "samples: expected a list of Sample objects; got 'a'"),  # type: ignore[arg-type]
        (lambda: vote([Sample("a", np.array([-1.0]))], "confidence"), "votes: expected scores of at least 0; got -1"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


def test_votes_need_no_torch() -> None:
    code = "import proxytune.stats.calibration, proxytune.voting.stopping, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
