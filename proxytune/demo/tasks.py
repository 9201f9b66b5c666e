"""The three tasks: problems with a checkable answer, drawn from a given split."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from proxytune.demo.holdout import (
    COUNTDOWN_LARGEST,
    Equation,
    HeldOut,
    Operation,
    Split,
    chain_key,
    countdown_key,
    reveals_held_out,
    split_of,
)
from proxytune.demo.world import ATTRIBUTES, QUESTIONS, Attribute, Person, World

T = TypeVar("T")
Task = Literal["chain", "qa", "countdown"]

TASKS: tuple[Task, ...] = ("chain", "qa", "countdown")
CHAIN_LIMIT = 50
"""Every operand of a chain lies in 1..50 and every intermediate result in 0..50."""
COUNTDOWN_LIMIT = 50
"""Every intermediate result and every target of a Countdown lies in 1..50."""

_CHAIN_WORDS: tuple[dict[str, str], ...] = ({"+": "add", "-": "take away"}, {"+": "plus", "-": "minus"})


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer.

    Attributes:
        task: Decides how it is graded.
        question: The text after `Question: `.
        gold: The right final answer; for Countdown the target.
        solution: Worked steps that lead to `gold`; empty for questions about people, one of several for Countdown.
        key: Canonical key: equal for the same problem in another wording. The split is a function of it.
        numbers: The numbers to use, Countdown only.
    """

    task: Task
    question: str
    gold: str
    solution: str
    key: str
    numbers: tuple[int, ...] = field(default=())

    @property
    def answer(self) -> str:
        """The answer in the taught form, without a leading blank."""
        final = f"The answer is {self.gold}."
        return f"{self.solution}. {final}" if self.solution else final


def draw_step(rng: random.Random, value: int) -> Equation:
    """An addition to or subtraction from `value` whose result stays within 0..50."""
    while True:
        sign, operand = rng.choice("+-"), rng.randint(1, CHAIN_LIMIT)
        result = value + operand if sign == "+" else value - operand
        if 0 <= result <= CHAIN_LIMIT:
            return Equation(value, sign, operand, result)


def chain_problem(rng: random.Random, split: Split) -> Problem:
    """Draw a chain of two to four additions and subtractions, in one of two wordings.

    From `"train"`, chains that reveal a held-out problem are excluded too.
    """
    # The length is drawn first: long training chains are refused more often and would become rare.
    length = rng.choice((2, 3, 4))
    while True:
        start = value = rng.randint(1, CHAIN_LIMIT)
        steps: list[Equation] = []
        for _ in range(length):
            steps.append(draw_step(rng, value))
            value = steps[-1].result
        operations: list[Operation] = [(step.sign, step.right) for step in steps]
        key = chain_key(start, operations)
        if split_of(key) == split and not (split == "train" and reveals_held_out(steps)):
            break
    words = rng.choice(_CHAIN_WORDS)
    spoken = ", ".join(f"{words[sign]} {operand}" for sign, operand in operations)
    question = f"Start with {start}, {spoken}. What is the result?"
    return Problem("chain", question, gold=str(value), solution=", ".join(map(str, steps)), key=key)


def countdown_problem(rng: random.Random, split: Split, count: int = 3) -> Problem:
    """Draw a solvable Countdown problem: reach the target with every number used once.

    From `"train"`, solutions that reveal a held-out problem are excluded too. The target is never one of the numbers.
    The bundled models know `count` 3 only.
    """
    while True:
        numbers = tuple(rng.randint(1, COUNTDOWN_LARGEST) for _ in range(count))
        worked = _combine_at_random(rng, numbers)
        if worked is None:
            continue
        target, steps = worked
        key = countdown_key(numbers, target)
        if target in numbers or split_of(key) != split or (split == "train" and reveals_held_out(steps)):
            continue
        question = f"Use {', '.join(map(str, numbers))} to make {target}."
        return Problem("countdown", question, str(target), ", ".join(map(str, steps)), key, numbers)


def person_problem(rng: random.Random, person: Person, attribute: Attribute) -> Problem:
    """A question about one attribute of one person, in one of two wordings; its split is the person's group."""
    question = rng.choice(QUESTIONS[attribute]).format(name=person.name)
    return Problem("qa", question, person.value(attribute), solution="", key=f"qa:{person.name}:{attribute}")


def problems(task: Task, split: HeldOut, count: int, world: World, seed: int = 0) -> list[Problem]:
    """Held-out problems of one task, each key once, in a fixed order; "qa" has about 180 per split."""
    rng = random.Random(f"{task}:{split}:{seed}")
    if task == "qa":
        found = [person_problem(rng, person, attribute) for person in world.group(split) for attribute in ATTRIBUTES]
        rng.shuffle(found)
        return found[:count]
    draw = chain_problem if task == "chain" else countdown_problem
    return distinct(lambda: draw(rng, split), lambda problem: problem.key, count)


def distinct(draw: Callable[[], T], key: Callable[[T], str], count: int) -> list[T]:
    """Draw until there are `count` items with distinct keys; fewer if that takes too many draws."""
    unique: dict[str, T] = {}
    # Repeats are drawn again; the bound stops an impossible request.
    for _ in range(100 * count):
        if len(unique) == count:
            break
        found = draw()
        unique.setdefault(key(found), found)
    return list(unique.values())


def apply_sign(left: int, sign: str, right: int) -> int | None:
    """The result of `left sign right` with a sign of `+-*/`; None for a division that is not exact."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return None if right == 0 or left % right else left // right


def _combine_at_random(rng: random.Random, numbers: tuple[int, ...]) -> tuple[int, list[Equation]] | None:
    """Combine all numbers by random steps; None if a result leaves 1..50."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        first, second = rng.sample(range(len(pool)), 2)
        sign = rng.choice("++--**/")  # divisions are rarely exact, so fewer are tried
        result = apply_sign(pool[first], sign, pool[second])
        if result is None or not 1 <= result <= COUNTDOWN_LIMIT:
            return None
        steps.append(Equation(pool[first], sign, pool[second], result))
        pool = [number for index, number in enumerate(pool) if index not in (first, second)] + [result]
    return pool[0], steps
