"""The hash that holds problems out of training, and the check that no training text reveals one.

A problem's split is a hash of its canonical key, which does not depend on the wording, so nothing has to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from proxytune.demo.world import stable_hash

Split = Literal["train", "validation", "test"]
HeldOut = Literal["validation", "test"]
Operation = tuple[str, int]
"""An operator sign and its right operand."""

COUNTDOWN_LARGEST = 12
"""The numbers of a Countdown problem lie in 1..12."""


class Equation(NamedTuple):
    """One worked step, such as `3*4=12`."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


def split_of(key: str) -> Split:
    """The split of a canonical key: a tenth validation, a tenth test, the rest training."""
    bucket = stable_hash(key) % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def chain_key(start: int, operations: Sequence[Operation]) -> str:
    """The canonical key of a chain: its numbers and signs, not its wording."""
    return f"chain:{start}" + "".join(f"{sign}{operand}" for sign, operand in operations)


def countdown_key(numbers: Sequence[int], target: int) -> str:
    """The canonical key of a Countdown problem: the multiset of numbers and the target."""
    return f"countdown:{','.join(map(str, sorted(numbers)))}={target}"


def reveals_held_out(equations: Sequence[Equation]) -> bool:
    """Whether a sequence of worked steps, in the order of the text, contains the solution of a held-out problem.

    A training text is refused not only if it *is* a held-out problem, but also if one can be read off a part of it: two
    or more steps of a longer chain, equations of a list that happen to continue each other, the steps of a Countdown
    solution that happen to be a chain, or two steps of a chain that happen to solve a Countdown of three numbers.
    Single equations are not held out: there are some 2,500 additions and subtractions, and the large model should know
    them.
    """
    if any(_solves_held_out_countdown(first, second) for first, second in pairwise(equations)):
        return True
    for first in range(len(equations) - 1):
        operations: list[Operation] = []
        value = equations[first].left
        for equation in equations[first:]:
            if equation.left != value or equation.sign not in "+-":
                break
            operations.append((equation.sign, equation.right))
            value = equation.result
            if len(operations) > 1 and split_of(chain_key(equations[first].left, operations)) != "train":
                return True
    return False


def _solves_held_out_countdown(first: Equation, second: Equation) -> bool:
    """Whether the second step combines the first one's result with a third number to reach a held-out target."""
    for used, third in ((second.left, second.right), (second.right, second.left)):
        numbers = (first.left, first.right, third)
        possible = used == first.result and max(numbers) <= COUNTDOWN_LARGEST and second.result not in numbers
        if possible and split_of(countdown_key(numbers, second.result)) != "train":
            return True
    return False
