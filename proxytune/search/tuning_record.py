"""What is tuned on, and what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.validation import Ids

if TYPE_CHECKING:
    pass
from proxytune.search.knobs import Knob

__all__ = ["Item", "Judge", "Metric", "Point", "Tuning"]

Metric = Literal["logprob", "accuracy"]


Judge = Callable[[Any, Sequence[int]], Sequence[bool]]
"""From a model and the numbers of some items to whether each of its answers is right."""


@dataclass(frozen=True)
class Item:
    """A validation item, as token ids.

    Attributes:
        prompt: The prompt; or role → prompt, "base" among them, for members that read their own.
        choices: What may come after it: one text, whose log-probability is scored, or several.
        answer: Which of several is right.
        name: What errors call it.
    """

    prompt: Ids | Mapping[str, Ids]
    choices: Sequence[Ids]
    answer: int = 0
    name: str = "an item"

    def __post_init__(self) -> None:
        if len(self.choices) == 0 or not 0 <= self.answer < len(self.choices):
            raise InputError.of(
                self.name,
                expected="at least one choice, and the number of the right one, from 0",
                got=f"{len(self.choices)} choices and answer={self.answer}",
                remedy="Correct the item.",
            )


@dataclass(frozen=True)
class Point:
    """One value on the curve.

    Attributes:
        value: The value.
        items: On how many items it was scored: fewer than all if it was dropped.
        score: Its score with a 95 % bootstrap interval over items: nats per token, or the share of right answers.
        open: At which share of the scored positions the formula's gate is open; None without a gate.
        bytes: What a token reads of the members' weights then, over the base's: companions run where the gate is open.
    """

    value: float
    items: int
    score: Interval
    open: float | None = None
    bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values; null for minus infinity."""
        numbers = {"score": self.score.value, "low": self.score.low, "high": self.score.high}
        found = {k: round(v, 6) if math.isfinite(v) else None for k, v in numbers.items()}
        more = {"open": self.open, "bytes": self.bytes}
        return {"value": self.value, "items": self.items, **found} | {
            k: round(v, 4) for k, v in more.items() if v is not None
        }


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        knob: What was tuned.
        metric: "logprob" (nats per token of the right text) or "accuracy" (the right choice is the likeliest, or the
            answer written is right).
        points: The curve, by value.
        best: The value with the highest score.
        chosen: The value that changes the base least, of those within one standard error of the best.
        error: That standard error of the paired difference between chosen and best, in the metric's unit.
        items: Number of items.
        tokens: Number of scored tokens; 0 where answers were written.
        formula: The formula at the chosen value.
        seed: The seed of the items' order.
        base: The base's own score, and `ungated` that of the formula without its gate; None unless a gate was tuned.
    """

    knob: Knob
    metric: Metric
    points: tuple[Point, ...]
    best: float
    chosen: float
    error: float
    items: int
    tokens: int
    formula: Any
    seed: int
    base: float | None = None
    ungated: float | None = None

    def gap(self, value: float) -> float | None:
        """The share of the gap between base and ungated formula that a value of the gate closes; None without one."""
        if self.base is None or self.ungated is None or self.ungated == self.base:
            return None
        return (self.point(value).score.value - self.base) / (self.ungated - self.base)

    def point(self, value: float) -> Point:
        """The point of a value."""
        return next(point for point in self.points if point.value == value)

    def to_json(self) -> dict[str, Any]:
        """The evidence as JSON values."""
        return {
            "metric": self.metric,
            "items": self.items,
            "tokens": self.tokens,
            "best": self.best,
            "chosen": self.chosen,
            "rule": "least change of the base within one standard error of the paired difference to the best",
            "error": round(self.error, 6),
            "seed": self.seed,
            **({} if self.base is None else {"base": _rounded(self.base), "ungated": _rounded(self.ungated)}),
            "curve": [point.to_json() for point in self.points],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
