"""Votes over the answers of many samples.

Samples without an answer form the class `None`, counted and reported like any other, which never wins against an
answer. Stopped samples do not vote and are counted apart. Each vote is the sample's weight (from a tree; 1 for
independent samples) times:

- `"majority"`: 1
- `"confidence"`: a trace score, e.g. the mean confidence (DeepConf, arXiv 2508.15260)
- `"deepconf"`: the same, over the top η % of the traces or those above a threshold
- `"borda"`: `(N − r + 1)^p` for the r-th most self-certain of N (2502.18581)
- `"margin"`: the mean `p₁ − p₂` over the answer's tokens (chain-of-thought decoding, 2402.10200)

Ties go to the answer with more samples, then to the one with the heaviest single sample, then to the one whose type and
`repr` come first alphabetically; never to the one that came first.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.validation import choice, finite, numbers, shown
from proxytune.voting.confidence import FINITE, WINDOW, TraceScore, TraceScores, keep_top, trace_scores

__all__ = ["How", "Sample", "Score", "Tally", "borda_points", "check_answer", "refuse_other", "sample_scores", "vote"]

How = Literal["majority", "confidence", "deepconf", "borda", "margin"]
Score = TraceScore | Literal["self_certainty", "margin"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished sample.

    Attributes:
        answer: A hashable value, equal for equal answers; None if it has no answer.
        confidences: `[T]`, C_t of each token in nats, larger = more confident; None if not recorded.
        weight: Its weight in a tree; 1 for independent samples.
        self_certainty: In nats, larger = more certain; None if not recorded.
        margins: `[A]`, p₁ − p₂ over the answer's tokens; None if not recorded.
        stopped: Whether it was stopped early; then it does not vote.
        cut: Whether its length or a budget cut it off. It votes with what it had by then, and the tally's note says so.
    """

    answer: Hashable | None
    confidences: NDArray[np.float64] | None = None
    weight: float = 1.0
    self_certainty: float | None = None
    margins: NDArray[np.float64] | None = None
    stopped: bool = False
    cut: bool = False

    def __post_init__(self) -> None:
        check_answer(self.answer)
        finite("weight", self.weight, least=0.0, remedy="Pass exp() of a log-weight.")
        for name in ("confidences", "margins"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, numbers(name, value, remedy=FINITE))
        if self.margins is not None and (np.abs(self.margins - 0.5) > 0.5 + 1e-6).any():
            raise InputError.of(
                "margins",
                expected="p₁ − p₂ in [0, 1]",
                got=f"values from {self.margins.min()} to {self.margins.max()}",
                remedy="Subtract the second largest probability from the largest, at each token of the answer.",
            )
        if self.self_certainty is not None:
            finite("self_certainty", self.self_certainty, remedy=FINITE)

    def scores(self, window: int | float = WINDOW) -> TraceScores:
        """The trace scores of its confidences, in nats; InputError if none were recorded."""
        return trace_scores(_recorded(self, "confidences"), window)


@dataclass(frozen=True)
class Tally:
    """The outcome of a vote.

    Attributes:
        winner: The answer; None if no voting sample has one.
        share: The winner's share of the total weight, samples without an answer included.
        shares: Answer → share of the weight, the heaviest first; None is no answer. They sum to 1.
        totals: Answer → weight, not normalised. Under `"majority"` with Kool's weights of a tree, the unbiased estimate
            of the answer's probability.
        counts: Answer → number of samples that voted.
        filtered: Samples that a filter left out.
        stopped: Samples that did not vote because they were stopped.
        note: What to know about how the vote came about; may be empty.
        cut: Voting samples whose texts were cut off.
    """

    winner: Hashable | None
    share: float
    shares: dict[Hashable | None, float]
    totals: dict[Hashable | None, float]
    counts: dict[Hashable | None, int]
    filtered: int = 0
    stopped: int = 0
    note: str = ""
    cut: int = 0

    @property
    def answered(self) -> bool:
        """Whether there is an answer at all."""
        return self.winner is not None


def vote(
    samples: Sequence[Sample],
    how: How = "majority",
    *,
    score: TraceScore = "lowest_group",
    window: int | float = WINDOW,
    eta: float = 10.0,
    threshold: float | None = None,
    power: float = 0.5,
) -> Tally:
    """Vote over samples.

    Args:
        samples: At least one that was not stopped; the order does not matter.
        how: What weights a vote; see the module's table.
        score: The trace score of `"confidence"` and `"deepconf"`.
        window: Tokens per group, or a share of the length.
        eta: `"deepconf"`: η in (0, 100], the percentage of traces, by that score, that vote.
        threshold: `"deepconf"`: the score that voting traces reach, instead of the top η %; e.g. an `OnlineFilter`'s.
        power: `"borda"`: p ≥ 0; 0 is the majority. The default is that of the authors' code.

    Returns:
        The outcome. Its note says if texts were cut off, and if it fell back to a majority: of all samples if the
        filter kept none with an answer, of the kept ones if their scores are all 0.

    Raises:
        InputError: If something else than samples is given, no sample votes, a record is missing, a setting is out of
            range, or the weights are negative or all 0.
    """
    refuse_other(samples)
    voting = [s for s in samples if not s.stopped]
    if not voting:
        raise InputError.of(
            "samples",
            expected="at least one that was not stopped",
            got=f"{len(samples)}, all of them stopped" if samples else "none",
            remedy="Keep the warm-up's samples, or lower the threshold." if samples else "Draw some.",
        )
    stopped = len(samples) - len(voting)
    kept, note = voting, ""
    match how:
        case "majority":
            factors = np.ones(len(voting))
        case "confidence" | "deepconf":
            factors = sample_scores(voting, score, window=window)
            if how == "deepconf":
                keep = (
                    keep_top(factors, eta)
                    if threshold is None
                    else factors >= finite("threshold", threshold, "of nats")
                )
                kept, factors = [s for s, k in zip(voting, keep, strict=True) if k], factors[keep]
        case "borda":
            factors = borda_points(sample_scores(voting, "self_certainty"), power)
        case "margin":
            factors = sample_scores(voting, "margin")
        case _:
            choice("how", how, get_args(How))
    if all(s.answer is None for s in kept) and any(s.answer is not None for s in voting):
        kept, factors, note = voting, np.ones(len(voting)), "no sample that was kept has an answer: majority of all"
    elif not any(s.weight * f for s, f in zip(kept, factors, strict=True)):  # also where the products underflow
        factors, note = np.ones(len(kept)), "every score is 0: majority"
    return _tally(kept, factors, filtered=len(voting) - len(kept), stopped=stopped, note=note)


def refuse_other(samples: Any, name: str = "samples") -> None:
    """Raise InputError unless all of `samples` are `Sample`s; bare answers are the usual mistake."""
    several = isinstance(samples, Iterable) and not isinstance(samples, str)
    others = [s for s in samples if not isinstance(s, Sample)] if several else [samples]
    if others:
        raise InputError.of(
            name,
            expected="a list of Sample objects",
            got=shown(others[0], 80),
            remedy="Wrap each answer: [Sample(answer) for answer in answers].",
        )


def check_answer(answer: Any) -> Hashable | None:
    """Return an answer (None for no answer); InputError if it is not hashable or does not equal itself."""
    try:
        hash(answer)
        # A tensor's `==` gives a tensor: two of equal content would be two answers, as they are hashed by identity.
        same = isinstance(found := answer == answer, (bool, np.bool_)) and bool(found)
    except TypeError:
        same = False
    if not same:
        raise InputError.of(
            "answer",
            expected="a hashable value that equals itself, or None for no answer",
            got=f"{answer!r} of type {type(answer).__name__}",
            remedy="Pass a str, a number or a tuple; None where there is no answer.",
        )
    return answer


def sample_scores(samples: Sequence[Sample], score: Score, *, window: int | float = WINDOW) -> NDArray[np.float64]:
    """One score per sample `[N]`; larger is more confident. InputError if a sample lacks the record.

    Args:
        samples: N samples that have the record it needs.
        score: A trace score or `"self_certainty"`, in nats; or `"margin"`, the mean p₁ − p₂ of the answer's tokens, 0
            for a sample without an answer.
        window: Tokens per group, or a share of the length.
    """
    if score == "self_certainty":
        return np.array([float(_recorded(s, "self_certainty")) for s in samples])
    if score == "margin":
        return np.array(
            [0.0 if s.answer is None and s.margins is None else np.mean(_recorded(s, "margins")) for s in samples]
        )
    choice("score", score, (*get_args(TraceScore), "self_certainty", "margin"))
    return np.array([getattr(s.scores(window), score) for s in samples])


def _recorded(sample: Sample, name: str) -> Any:
    value = getattr(sample, name)
    if value is None:
        raise InputError.of(
            name, expected="a record of it in every sample", got="None", remedy='Record it, or vote by "majority".'
        )
    return value


def _tally(samples: Sequence[Sample], factors: NDArray[np.float64], *, filtered: int, stopped: int, note: str) -> Tally:
    """Sum the votes, independently of the samples' order."""
    if (factors < 0).any():
        raise InputError.of(
            "votes",
            expected="scores of at least 0",
            got=f"{factors.min()}",
            remedy="Use another score: a vote's weight cannot be negative.",
        )
    members: dict[Hashable | None, list[tuple[Hashable | None, float]]] = {}
    for sample, factor in zip(samples, factors, strict=True):
        members.setdefault(sample.answer, []).append((sample.answer, sample.weight * float(factor)))
    # 1 and 1.0 are one class; which of them represents it must not depend on the order.
    classes = {min((a for a, _ in votes), key=_name): [w for _, w in votes] for votes in members.values()}
    totals = {answer: math.fsum(weights) for answer, weights in classes.items()}
    whole = math.fsum(totals.values())
    if not 0 < whole < math.inf:
        raise InputError.of(
            "votes",
            expected="weights with a finite sum > 0",
            got=f"a sum of {whole}",
            remedy='Scale the weights, or leave the scores out: how="majority".',
        )
    order = sorted(classes, key=lambda a: (-totals[a], -len(classes[a]), -max(classes[a]), _name(a)))
    winner = next((answer for answer in order if answer is not None), None)
    cut = sum(s.cut for s in samples)
    notes = [note or ("" if winner is not None else "no sample has an answer")]
    if cut:
        notes.append(f"{cut} of {len(samples)} texts were cut off, and count with what they had said by then")
    return Tally(
        winner=winner,
        share=totals[winner] / whole if winner is not None else 0.0,
        shares={answer: totals[answer] / whole for answer in order},
        totals={answer: totals[answer] for answer in order},
        counts={answer: len(classes[answer]) for answer in order},
        filtered=filtered,
        stopped=stopped,
        note="; ".join(filter(None, notes)),
        cut=cut,
    )


def _name(answer: Hashable | None) -> tuple[str, str]:
    return type(answer).__qualname__, repr(answer)


def borda_points(scores: ArrayLike, power: float = 0.5) -> NDArray[np.float64]:
    """Borda votes `(N − r + 1)^p` by rank r, the largest score first; equal scores share their ranks' votes equally.

    Raises:
        InputError: If scores are empty or not finite, or p is negative or not finite.
    """
    values = numbers("scores", scores, remedy=FINITE)
    power = finite("power", power, least=0.0, remedy="0 is the majority, 0.5 the default.")
    _, tied, sizes = np.unique(values, return_inverse=True, return_counts=True)
    points = np.arange(1, len(values) + 1, dtype=np.float64) ** power  # of the lowest first
    ends = np.cumsum(sizes)
    means = np.array([math.fsum(points[e - n : e]) / n for e, n in zip(ends, sizes, strict=True)])
    return means[tied]
