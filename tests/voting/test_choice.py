"""Which vote follows from samples with known answers."""

from typing import Any

import numpy as np
import pytest
from support.voting import SURE, samples_of

from proxytune.errors import InputError
from proxytune.voting.choice import choose_vote
from proxytune.voting.vote import Sample


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
    nothing = choose_vote([samples_of(None, None)], ["yes"])
    assert (nothing.how, nothing.unanswered) == ("majority", 2)
    problems, truths = calibration(1.0)
    problems[0].append(Sample("yes", stopped=True))  # without a record: it is left out
    assert choose_vote(problems, truths, draws=50).right == 100
    assert choose_vote(problems, truths, "majority").how == "majority"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: choose_vote([SURE], []),
            "truths: expected .* one right answer .* for each; got 1 problems and 0 truths",
        ),
        (lambda: choose_vote([SURE], [None]), "1 of them None"),
        (lambda: choose_vote(SURE, ["a"] * len(SURE)), "the samples of problem 0: expected a list of Sample objects"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
