"""Routes: a task whose forks are known by construction, and whose answers can be enumerated with their probabilities.

`Start with 25, walk 4, 7, 2, 5. What is the result?` Each number is added or subtracted at random: an even number is
added with probability .85, an odd one with .6. So an answer has two kinds of tokens: one sign per number, and all
others, which the text before them determines. A route of n numbers has 2ⁿ paths, so a model's distribution over answers
is known without sampling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from proxytune.demo.holdout import HeldOut, Split, split_of
from proxytune.demo.tasks import CHAIN_LIMIT, apply_sign, distinct

__all__ = ["ADDED_IF_EVEN", "ADDED_IF_ODD", "SIGNS", "Path", "Route", "draw_route", "route_examples", "routes"]

ADDED_IF_EVEN = 0.85
ADDED_IF_ODD = 0.6
SIGNS = ("+", "-")
"""The tokens at the forks; they occur nowhere else in an answer."""
_LENGTHS = (4, 5)
_LARGEST = 9


@dataclass(frozen=True)
class Path:
    """One path along a route.

    Attributes:
        signs: The sign taken at each number.
        text: The whole answer, with the leading blank.
        taught: Its probability in the training text.
    """

    signs: tuple[str, ...]
    answer: int
    text: str
    taught: float


@dataclass(frozen=True)
class Route:
    """One problem: a start, and the numbers that are added or subtracted."""

    start: int
    numbers: tuple[int, ...]

    @property
    def key(self) -> str:
        """The canonical key; the split is a function of it."""
        return f"route:{self.start}:{','.join(map(str, self.numbers))}"

    @property
    def question(self) -> str:
        """The text after `Question: `."""
        return f"Start with {self.start}, walk {', '.join(map(str, self.numbers))}. What is the result?"

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """All `2^len(numbers)` paths; their `taught` adds up to 1."""
        return tuple(self.path(signs) for signs in product(SIGNS, repeat=len(self.numbers)))

    def path(self, signs: Sequence[str]) -> Path:
        """The path with these signs, one per number."""
        value, steps, taught = self.start, [], 1.0
        for sign, number in zip(signs, self.numbers, strict=True):
            result = apply_sign(value, sign, number)
            assert result is not None
            steps.append(f"{value}{sign}{number}={result}")
            added = ADDED_IF_ODD if number % 2 else ADDED_IF_EVEN
            taught *= added if sign == "+" else 1.0 - added
            value = result
        return Path(tuple(signs), value, f" {', '.join(steps)}. The answer is {value}.", taught)

    def read(self, text: str) -> int | None:
        """Where a text's path ends; None for any text that is not a path's."""
        return self._answers.get(text)

    @cached_property
    def _answers(self) -> dict[str, int]:
        return {path.text: path.answer for path in self.paths}


def draw_route(rng: random.Random, split: Split) -> Route:
    """Draw a route of four or five numbers whose paths all stay within 0..50."""
    length = rng.choice(_LENGTHS)
    while True:
        numbers = tuple(rng.randint(1, _LARGEST) for _ in range(length))
        reach = sum(numbers)
        if 2 * reach <= CHAIN_LIMIT:
            route = Route(rng.randint(reach, CHAIN_LIMIT - reach), numbers)
            if split_of(route.key) == split:
                return route


def routes(split: HeldOut, count: int, seed: int = 0) -> list[Route]:
    """Distinct held-out routes, the same on every machine."""
    rng = random.Random(f"route:{split}:{seed}")
    return distinct(lambda: draw_route(rng, split), lambda route: route.key, count)


def route_examples(rng: random.Random, count: int) -> list[tuple[Route, Path]]:
    """Training routes, each with one path drawn with probability `taught`."""
    drawn = [draw_route(rng, "train") for _ in range(count)]
    return [(route, rng.choices(route.paths, [path.taught for path in route.paths])[0]) for route in drawn]
