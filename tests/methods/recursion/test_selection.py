"""Which trajectory is chosen: by log-probability, vote, or a verifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.recursion import SEED, How, continued, model_of, prompts, run

from proxytune import RecursionDecoding
from proxytune.errors import InputError
from proxytune.methods.recursion.selection import select_one


@pytest.fixture(scope="module")
def found() -> tuple[torch.Tensor, Any]:
    ids = prompts(3)
    return ids, run(model_of(), RecursionDecoding(sigma=0.4, trajectories=5, seed=SEED, select=None), ids)


def chosen_by(ids: torch.Tensor, **settings: Any) -> Any:
    return run(model_of(), RecursionDecoding(sigma=0.4, trajectories=5, seed=SEED, **settings), ids)


def test_select_by_logprob(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    out = chosen_by(ids)
    texts = every.trajectories.sequences
    for b in range(3):
        hows = [How(sigma=0.4, row=b, trajectory=i) for i in range(5)]
        written = texts[b, :, 8:].tolist()
        means = [continued(model_of(), ids[b].tolist(), hows[i], ids=written[i]).mean for i in range(5)]
        assert int(out.chosen[b]) == int(np.argmax(means))
        assert torch.equal(out.sequences[b], texts[b, int(np.argmax(means))])
    assert torch.equal(out.scores, every.trajectories.mean_logprobs)


@pytest.mark.parametrize("modulus", [2, 3, None])
def test_select_by_vote(found: tuple[torch.Tensor, Any], modulus: int | None) -> None:
    ids, every = found

    def answer(text: list[int]) -> int | None:
        return None if sum(text) % 5 == 0 else sum(text) % (modulus or 1)

    out = chosen_by(ids, select="vote", answer=None if modulus is None else answer)
    for b in range(3):
        texts = every.trajectories.sequences[b, :, 8:].tolist()
        means = every.trajectories.mean_logprobs[b].tolist()
        answers = [tuple(t) if modulus is None else answer(t) for t in texts]
        counts = [-1 if a is None else answers.count(a) for a in answers]
        if max(counts) < 0:
            counts = [0] * 5
        want = max(range(5), key=lambda i: (counts[i], means[i]))
        assert int(out.chosen[b]) == want
        assert out.scores[b].tolist() == [-np.inf if a is None else answers.count(a) for a in answers]


def test_select_by_a_verifier(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    seen = []

    def verifier(text: list[int]) -> float:
        seen.append(text)
        return float(text[0] % 2)

    out = chosen_by(ids, select=verifier)
    texts, means = every.trajectories.sequences[:, :, 8:].tolist(), every.trajectories.mean_logprobs.tolist()
    assert seen == [text for row in texts for text in row]
    for b in range(3):
        want = max(range(5), key=lambda i: (texts[b][i][0] % 2, means[b][i]))
        assert int(out.chosen[b]) == want


def test_ties_and_what_is_no_number() -> None:
    texts = [[1], [2], [3]]
    assert select_one(lambda _: 1.0, texts, [-2.0, -1.0, -1.0]) == (1, [1.0, 1.0, 1.0])
    assert select_one("logprob", texts, [float("nan"), -5.0, -7.0])[0] == 1
    assert select_one("value", texts, [-1.0] * 3, values=[float("nan"), 0.5, 0.6])[0] == 2
    assert select_one("vote", texts, [-1.0, -2.0, -0.5]) == (2, [1.0, 1.0, 1.0])
    # No answer never wins, however many there are; where there is nothing else, the likeliest text is taken.
    assert select_one("vote", texts, [0.0, 0.0, -9.0], answer=lambda t: t[0] if t[0] == 3 else None)[0] == 2
    assert select_one("vote", texts, [-3.0, -1.0, -9.0], answer=lambda _: None)[0] == 1
    # 1 and 1.0 are one answer.
    assert select_one("vote", texts, [-3.0, -2.0, -1.0], answer=lambda t: [1, 1.0, 7][t[0] - 1])[0] == 1
    with pytest.raises(InputError, match="returns a number; got None"):
        select_one(lambda _: None, texts, [0.0] * 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="hashable"):
        select_one("vote", texts, [0.0] * 3, answer=lambda t: t)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="hashable"):
        select_one("vote", texts, [0.0] * 3, answer=np.array)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "scores", "chosen"),
    [
        ([None, None, 3, None, None, 3, None, None], [-np.inf] * 2 + [2.0] + [-np.inf] * 2 + [2.0] + [-np.inf] * 2, 2),
        ([5, None, None, None, None, None, None, None], [1.0] + [-np.inf] * 7, 0),
        ([5, 6, 6, 6, 6, 6, 6, 6], [1.0] + [7.0] * 7, 1),
        ([None] * 8, [-np.inf] * 8, 0),
    ],
)
def test_no_answer_scores_below_every_answer(answers: list[int | None], scores: list[float], chosen: int) -> None:
    texts, means = [[i] for i in range(8)], [-float(i) for i in range(8)]  # the first is the likeliest
    got = select_one("vote", texts, means, answer=lambda t: answers[t[0]])
    assert got == (chosen, scores)
    assert chosen == int(np.argmax(got[1]))


def test_of_trajectories_without_an_answer_the_likeliest_is_chosen(found: tuple[torch.Tensor, Any]) -> None:
    ids, every = found
    out = chosen_by(ids, select="vote", answer=lambda _: None)
    assert torch.equal(out.chosen, every.trajectories.mean_logprobs.argmax(1))
    assert bool((out.scores == -torch.inf).all())


@pytest.mark.parametrize(
    "answer",
    [
        lambda t: torch.tensor(7),
        lambda t: torch.tensor([7, 8]),
        lambda t: ("seven", (torch.tensor(7),)),
        lambda t: frozenset([torch.tensor(7)]),
        lambda t: None if t == [1] else object(),
    ],
)
def test_answers_that_are_told_apart_by_identity_are_refused(answer: Any) -> None:
    with pytest.raises(InputError, match=r"answer: expected .*; got .*by identity.*Return an int, a str or a tuple"):
        select_one("vote", [[1], [2], [3]], [0.0] * 3, answer=answer)
    # By value: numpy's numbers, and what holds None.
    for seven in (np.int64(7), (7, None), frozenset({7})):
        assert select_one("vote", [[1], [2]], [0.0] * 2, answer=lambda _, x=seven: x)[1] == [2.0, 2.0]  # type: ignore[misc]
