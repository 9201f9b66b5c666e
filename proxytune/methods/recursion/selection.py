"""Select one of several texts of a prompt: by log-probability, vote, value head, or the caller's verifier.

Ties go to the higher mean log-probability, then to the first. NaN counts as −inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch

from proxytune.errors import InputError
from proxytune.validation import choice
from proxytune.voting.vote import Sample, vote

__all__ = ["Select", "TextScorer", "check_select", "select_one"]

TextScorer: TypeAlias = Callable[[list[int]], float]
"""Generated ids, without padding, to a score; larger is better."""
Named = Literal["logprob", "vote", "value"]
Select: TypeAlias = Named | TextScorer | None


def check_select(select: Select) -> None:
    """Raise InputError unless `select` is one of the names, a callable, or None."""
    if not (select is None or callable(select)):
        otherwise = "a callable from ids to a score, or None for all trajectories"
        choice("select", select, get_args(Named), otherwise, remedy="Leave it out for 'logprob'.")


def select_one(
    select: Named | TextScorer,
    texts: Sequence[list[int]],
    mean_logprobs: Sequence[float],
    *,
    values: Sequence[float] | None = None,
    answer: Callable[[list[int]], Hashable | None] | None = None,
) -> tuple[int, list[float]]:
    """Select one of the texts of a prompt.

    Args:
        select: `"logprob"` for the mean log-probability, `"vote"` for the most frequent answer, `"value"` for the
            values, or a verifier.
        texts: N ≥ 1 lists of generated ids, without padding.
        mean_logprobs: `[N]`, nats.
        values: `[N]`, for `"value"`.
        answer: For `"vote"`: ids to a hashable answer, None for no answer; default: the ids themselves. No answer never
            wins against an answer; if no text has one, the highest mean log-probability wins.

    Returns:
        Its index, and what each text was compared by, `[N]`; for `"vote"` how many texts have its answer, −inf for
        none.

    Raises:
        InputError: If a verifier returns no number, or an answer is unhashable or hashes by identity, as a tensor does.
    """
    if select == "logprob":
        scores = list(mean_logprobs)
    elif select == "value":
        assert values is not None
        scores = list(values)
    elif select == "vote":
        scores = _votes([tuple(ids) if answer is None else answer(list(ids)) for ids in texts])
    else:
        assert callable(select)
        scores = [_score(select, ids) for ids in texts]
    return _best(scores, mean_logprobs), scores


def _votes(answers: Sequence[Hashable | None]) -> list[float]:
    """How many texts share each answer; −inf for no answer."""
    for answer in answers:
        if _by_identity(answer):
            raise InputError.of(
                "answer",
                expected="a value that equal answers share, or None for no answer",
                got=f"{answer!r} of type {type(answer).__name__}, which is compared by identity: no two would agree",
                remedy="Return an int, a str or a tuple of them; of a tensor its item(), or tuple(x.tolist()).",
            )
    totals = vote([Sample(answer) for answer in answers]).totals
    return [-math.inf if answer is None else totals[answer] for answer in answers]


def _by_identity(answer: Any) -> bool:
    """Whether a value, or one inside a tuple or frozenset, hashes by identity instead of by value."""
    if isinstance(answer, tuple | frozenset):
        return any(map(_by_identity, answer))
    kind: Any = type(answer)
    return isinstance(answer, torch.Tensor) or (answer is not None and kind.__hash__ is object.__hash__)


def _best(scores: Sequence[float], mean_logprobs: Sequence[float]) -> int:
    pairs = zip(map(_number, scores), map(_number, mean_logprobs), strict=True)
    return max(enumerate(pairs), key=lambda item: (*item[1], -item[0]))[0]


def _number(x: float) -> float:
    return -math.inf if math.isnan(x) else x


def _score(verifier: TextScorer, ids: list[int]) -> float:
    value = verifier(list(ids))
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise InputError.of(
            "select",
            expected="a verifier that returns a number",
            got=f"{value!r} for {ids[:8]}",
            remedy="Return e.g. 1.0 for right, 0.0 for wrong, -inf for a text that must not be selected.",
        )
    return score
