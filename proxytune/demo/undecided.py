"""Which comparisons the demo's table leaves open: there its figures say little before more problems are asked.

The rule is what a reader can check in the table: two rows can be told apart if their 95 % intervals do not overlap. The
interval of the gap closed alone would not do: it is a bootstrap, which has no width if all problems agree, however few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Undecided", "undecided"]

Question = Literal["tuned or base", "proxy or base", "proxy or either", "proxy or tuned"]
"""Which models cannot be told apart. "proxy or tuned" only where they were right on exactly the same problems: the gap
closed has an interval of no width then. Elsewhere the two may be alike, which is what the shift is for."""


@dataclass(frozen=True)
class Undecided:
    """One question that a task leaves open under one criterion, "strict" or "lenient"."""

    task: str
    criterion: str
    question: Question


def undecided(record: Mapping[str, Any]) -> list[Undecided]:
    """What the table of `proxytune.demo.measure.measure` leaves open, at most one question per task and criterion."""
    found = []
    for task, gaps in record["gap_closed"].items():
        for criterion, gap in gaps.items():
            first, last_but_one, last = (record["rows"][index]["scores"] for index in (0, -2, -1))
            base, proxy, tuned = (of[task][criterion]["interval"] for of in (first, last_but_one, last))
            question: Question | None = None
            if gap["closed"] is None or _overlap(base, tuned):
                question = "tuned or base"
            elif _overlap(base, proxy):
                question = "proxy or either" if _overlap(proxy, tuned) else "proxy or base"
            elif gap["interval"][0] == gap["interval"][1]:
                question = "proxy or tuned"
            if question is not None:
                found.append(Undecided(task, criterion, question))
    return found


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
