"""What every diagnosis stands on: the texts of each prompt, and intervals over prompts.

Samples of one prompt resemble each other, and tokens of one text even more. So whole prompts are drawn again, never
texts or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.stats.student import t_quantile
from proxytune.trace import Trace, TracedText
from proxytune.validation import as_float, finite, shown, whole

__all__ = [
    "LEAST",
    "Finding",
    "Resamples",
    "as_trace",
    "graded",
    "prompts_of",
    "refuse_single",
    "refuse_weighted",
    "said",
    "shared_prompts",
    "values_of",
    "weights_of",
]

LEAST = 5
"""The fewest prompts that an interval is made of."""

Prompts = list[list[TracedText]]
"""The texts of each prompt."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a diagnosis found, and on how much it rests.

    Attributes:
        says: The finding in a sentence.
        prompts: How many prompts it rests on; intervals are over these.
        texts: How many texts.
        tokens: How many tokens, prompts not counted.
    """

    says: str
    prompts: int
    texts: int
    tokens: int


def counts(prompts: Prompts) -> dict[str, int]:
    """What a `Finding` rests on."""
    return {
        "prompts": len(prompts),
        "texts": sum(map(len, prompts)),
        "tokens": sum(len(text) for texts in prompts for text in texts),
    }


def as_trace(trace: Any, name: str = "trace") -> Trace:
    """A trace; InputError for anything else."""
    if isinstance(trace, Trace):
        return trace
    raise InputError.of(
        name,
        expected="a proxytune.trace.Trace",
        got=shown(trace, 80),
        remedy="Pass proxytune.trace.load('run.npz'), or a recording's .trace.",
    )


def keyed(trace: Trace, *, given: bool | None) -> dict[str, list[TracedText]]:
    """The texts of each prompt by its key, sorted; empty texts and texts of the other kind left out."""
    groups = {
        key: [text for text in texts if len(text) and given in (None, text.given)]
        for key, texts in as_trace(trace).groups().items()
    }
    return {key: groups[key] for key in sorted(groups) if groups[key]}


def prompts_of(trace: Trace, what: str, *, given: bool | None = False, few: bool = False) -> Prompts:
    """The texts of each prompt, in an order that does not depend on that of the texts.

    Args:
        trace: The run.
        what: The diagnosis, for messages.
        given: Which texts: those that came from elsewhere, those that the model wrote, or (None) both.
        few: Whether fewer than `LEAST` prompts are allowed.

    Raises:
        InputError: If there are none, or of too few prompts.
    """
    found = list(keyed(trace, given=given).values())
    if not found:
        kind = {True: "given texts", False: "texts that the model wrote", None: "texts"}[given]
        others = sum(len(text) > 0 for text in trace)
        raise InputError.of(
            what,
            expected=f"{kind} with at least one token",
            got=f"{len(trace)} texts, {others} of them with tokens, none of that kind",
            remedy={
                True: "Score texts from elsewhere into the trace.",
                False: "Record a run; of texts from elsewhere, pass given=True where it is offered.",
                None: "Record a run.",
            }[given],
        )
    if not few:
        refuse_few(len(found), what)
    return found


def shared_prompts(one: dict[str, list[TracedText]], other: dict[str, list[TracedText]], what: str) -> list[str]:
    """The keys of prompts that two runs share; InputError if they are fewer than `LEAST`."""
    shared = sorted(one.keys() & other.keys())
    if len(shared) < LEAST:
        raise InputError.of(
            what,
            expected=f"at least {LEAST} prompts that both have",
            got=f"{len(shared)}, of {len(one)} and {len(other)}",
            remedy="Run both on the same prompts; facts['group'] names a prompt where its ids differ.",
        )
    return shared


def refuse_few(count: int, what: str, units: str = "prompts") -> None:
    """Raise InputError if there are too few units for an interval."""
    if count < LEAST:
        raise InputError.of(
            what,
            expected=f"texts of at least {LEAST} {units}, which intervals are over",
            got=str(count),
            remedy=f"Record more {units}; more samples of the same say nothing about others.",
        )


def refuse_single(prompts: Prompts, what: str) -> None:
    """Raise InputError if a prompt has one sample only."""
    single = sum(len(texts) == 1 for texts in prompts)
    if single:
        raise InputError.of(
            what,
            expected="at least two samples of each prompt",
            got=f"{single} of {len(prompts)} prompts with one",
            remedy="Draw several samples: num_return_sequences=8.",
        )


def graded(prompts: Prompts, what: str) -> list[Floats]:
    """Whether each text of each prompt is right, as 0 and 1: of grades in [0, 1] only 1 is right.

    Raises:
        InputError: If a text has no grade, or one out of range.
    """
    missing = sum(text.grade is None for texts in prompts for text in texts)
    if missing:
        raise InputError.of(
            what,
            expected="a grade for each text, 1 for right",
            got=f"{missing} of {sum(map(len, prompts))} texts without one",
            remedy="Grade them: dataclasses.replace(text, grade=1.0).",
        )
    grades = [np.array([float(text.grade or 0) for text in texts]) for texts in prompts]
    strange = [one for row in grades for one in row.tolist() if not 0 <= one <= 1]
    if strange:
        raise InputError.of(
            what,
            expected="grades in [0, 1], 1 for right",
            got=f"{strange[0]:g} in {len(strange)} texts",
            remedy="Grade right texts 1.0, all others less.",
        )
    return [(row == 1).astype(np.float64) for row in grades]


def values_of(prompts: Prompts, name: str, what: str) -> list[list[Floats]]:
    """An array of each text, e.g. its entropies, as float64; InputError if a value is not finite."""
    found = [[np.asarray(getattr(text, name), np.float64) for text in texts] for texts in prompts]
    bad = sum(int((~np.isfinite(one)).sum()) for texts in found for one in texts)
    if bad:
        raise InputError.of(
            what,
            expected=f"a finite {name} at each token",
            got=f"{bad} tokens without",
            remedy="See where the model makes NaN or infinite logits, or leave those texts out.",
        )
    return found


def numbers_of(prompts: Prompts, fact: str, what: str, *, above: float = 0.0) -> list[Floats]:
    """A number of each text among its facts; InputError if it is missing, not finite, or not above `above`."""
    found = [[as_float(text.facts.get(fact)) for text in texts] for texts in prompts]
    bad = [
        text.facts.get(fact)
        for texts, row in zip(prompts, found, strict=True)
        for text, value in zip(texts, row, strict=True)
        if not above < value < math.inf
    ]
    if bad:
        raise InputError.of(
            what,
            expected=f"facts[{fact!r}] of each text, a number above {above:g}",
            got=f"{shown(bad[0], 60)} in {len(bad)} of {sum(map(len, prompts))} texts",
            remedy=f"Write it with the text: dataclasses.replace(text, facts={{**text.facts, {fact!r}: …}}).",
        )
    return [np.array(row) for row in found]


def is_weighted(texts: Sequence[TracedText], what: str) -> bool:
    """Whether the texts of a prompt have weights, as a tree's leaves do; InputError if only some do."""
    having = sum("weight" in text.facts for text in texts)
    if 0 < having < len(texts):
        raise InputError.of(
            what,
            expected="facts['weight'] in all texts of a prompt, or in none",
            got=f"{having} of {len(texts)}",
            remedy="Give the samples of a tree a group of their own.",
        )
    return having > 0


def weights_of(prompts: Prompts, what: str) -> list[Floats]:
    """How much each text counts: `facts["weight"]` of a tree's leaves, scaled to a mean of 1; else 1.

    Raises:
        InputError: If a weight is not a number of at least 0, those of a prompt are all 0, or only some have one.
    """
    out = []
    for texts in prompts:
        if not is_weighted(texts, what):
            out.append(np.ones(len(texts)))
            continue
        raw = np.array([as_float(text.facts["weight"]) for text in texts])
        if not ((raw >= 0) & (raw < np.inf)).all() or not raw.any():
            raise InputError.of(
                what,
                expected="facts['weight'] of at least 0, not all of them 0",
                got=shown(raw.tolist(), 80),
                remedy="Pass the leaves' tree.weights().",
            )
        scaled = raw / raw.max()
        out.append(scaled * (len(raw) / scaled.sum()))
    return out


DEPENDENT = ("ForkDecoding", "SiblingDecoding")
"""Loops whose samples of a prompt depend on each other."""


def refuse_weighted(trace: Trace, prompts: Prompts, what: str, remedy: str) -> None:
    """Raise InputError if samples of a prompt are leaves of a tree, or siblings: they are not independent."""
    weighted = sum(is_weighted(texts, what) for texts in prompts)
    loop = trace.about.get("loop")
    if weighted or (loop in DEPENDENT and max(map(len, prompts)) > 1):
        raise InputError.of(
            what,
            expected="independent samples of each prompt",
            got=f"{weighted} of {len(prompts)} prompts whose texts have weights" if weighted else f"texts of {loop}",
            remedy=remedy,
        )


class Resamples:
    """The same prompts drawn again and again, for intervals of whatever is a function of sums over prompts.

    The percentile interval of few units is too narrow; its tails are moved out as Hesterberg 2015 (arXiv 1411.5279,
    5.3) does: by Student's t, and `√(n/(n − 1))`. In simulations, intervals at 95 % cover in 91 % of the runs with 5
    prompts, and in 93 to 96 % with 10 or more.

    Attributes:
        times: `[draws, prompts]`, float64: how often each prompt was drawn.
        stretch: How much wider than that of a normal distribution an interval has to be.
    """

    def __init__(self, units: int, what: str, *, level: float, draws: int, seed: int, of: str = "prompts") -> None:
        refuse_few(units, what, of)
        self.units, self.what, self.level = units, what, finite("level", level, above=0.0, below=1.0)
        draws = whole("draws", draws, "of resamples", least=1)
        rng = np.random.default_rng(seed)
        self.times = rng.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)
        reach = t_quantile((1 + level) / 2, units - 1) * math.sqrt(units / (units - 1))
        self._tail = NormalDist().cdf(-reach)
        self.stretch = reach / NormalDist().inv_cdf((1 + level) / 2)

    def interval(self, value: float, drawn: ArrayLike) -> Interval:
        """A value with its interval, from its values in the resamples; NaN where one has none.

        Raises:
            InputError: If the value, or more than half of the resamples, have none.
        """
        found = np.asarray(drawn, np.float64)
        found = found[~np.isnan(found)]
        if math.isnan(value) or 2 * len(found) < len(self.times):
            raise InputError.of(
                self.what,
                expected="prompts that tell in most resamples",
                got=f"{len(self.times) - len(found)} of {len(self.times)} resamples that do not",
                remedy="Record more prompts.",
            )
        # Of two neighbours the outer one: one of them may be infinite.
        low = np.quantile(found, self._tail, method="lower")
        high = np.quantile(found, 1 - self._tail, method="higher")
        return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))

    def ratio(self, sums: ArrayLike, counted: ArrayLike) -> Interval:
        """`Σ sums / Σ counted` over prompts, `[prompts]` each."""
        top, bottom = np.asarray(sums, np.float64), np.asarray(counted, np.float64)
        return self.interval(float(over(top.sum(), bottom.sum())), over(self.times @ top, self.times @ bottom))

    def mean(self, values: ArrayLike) -> Interval:
        """The mean over prompts of `[prompts]`."""
        return self.ratio(values, np.ones(self.units))

    def bounded(self, sums: ArrayLike, counted: ArrayLike, *, least: float = 0.0, most: float = 1.0) -> Interval:
        """`ratio` of what lies between two numbers, as a share of texts does: none of twenty is not "never".

        The interval also holds what the value would be if so many prompts were of another kind, at either bound, as may
        be missed by chance: `1 − ((1 − level)/2)^(1/n)` of n that have any, 12 % of 30.
        """
        found = self.ratio(sums, counted)
        missed = 1 - ((1 - self.level) / 2) ** (1 / int(np.count_nonzero(counted)))
        low, high = (found.value + missed * (bound - found.value) for bound in (least, most))
        return Interval(found.value, min(found.low, low), max(found.high, high))

    def share(self, values: ArrayLike, *, least: float = 0.0, most: float = 1.0) -> Interval:
        """The mean over prompts of what lies between two numbers, as in `bounded`."""
        return self.bounded(values, np.ones(self.units), least=least, most=most)

    def of(self, statistic: Callable[[Floats], Floats]) -> Interval:
        """A statistic that turns how often each prompt counts, `[N, prompts]`, into N values."""
        return self.interval(float(statistic(np.ones((1, self.units)))[0]), statistic(self.times))


def over(top: Any, bottom: Any) -> Any:
    """A quotient; NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, np.divide(top, bottom))


def said(found: Interval, *, percent: bool = False, points: bool = False) -> str:
    """A value and its interval, for a sentence; `points` for what is added to a share, or lies between two shares."""
    scale, unit = (100, " %") if percent else (100, " points") if points else (1, "")
    value, low, high = (figure(scale * number) for number in (found.value, found.low, found.high))
    return f"{value}{unit} [{low}, {high}]"


def figure(number: float) -> str:
    """A number with three digits, or all digits before the point."""
    if math.isinf(number):
        return "−∞" if number < 0 else "∞"
    text = f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    return "0" if abs(number) < 1e-9 else f"−{text[1:]}" if number < 0 else text
