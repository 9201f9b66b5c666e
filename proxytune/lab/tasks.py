"""The three tasks, their verifiers, and the hash that holds problems out of all training.

A problem belongs to a split by the hash of its canonical key (what makes it the same problem, whatever its wording).
Generators take the split they may draw from; everything that writes training text asks for `"train"`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from proxytune.lab.world import ATTRIBUTES, QUESTIONS, Attribute, Person, World, stable_hash

Task = Literal["chain", "qa", "countdown"]
Split = Literal["train", "validation", "test"]
HeldOut = Literal["validation", "test"]
Operation = tuple[str, int]
"""An operator sign and its right operand."""

TASKS: tuple[Task, ...] = ("chain", "qa", "countdown")
CHAIN_LIMIT = 50
"""Every operand lies in 1..50 and every intermediate result in 0..50."""
COUNTDOWN_LIMIT = 50
COUNTDOWN_LARGEST = 12

_CHAIN_WORDS: tuple[dict[str, str], ...] = ({"+": "add", "-": "take away"}, {"+": "plus", "-": "minus"})
_EQUATION = re.compile(r"(\d+)([+\-*/])(\d+)=(\d+)")


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer.

    Attributes:
        task: Which verifier applies.
        question: The text after `Question: `.
        gold: The right final answer; for Countdown the target.
        solution: Worked steps that lead to `gold`, empty for questions about people. For Countdown one of several.
        key: What makes two problems the same; the split is a function of it.
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


@dataclass(frozen=True)
class Grade:
    """A verdict on one answer.

    Attributes:
        lenient: The content is right, whatever its form.
        strict: The answer has exactly the taught form as well, with nothing after it.
    """

    lenient: bool
    strict: bool


def split_of(key: str) -> Split:
    """The split of a problem: a tenth validation, a tenth test, the rest training.

    Args:
        key: A canonical key.

    Returns:
        The split, a pure function of the key.
    """
    bucket = stable_hash(key) % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def chain_key(start: int, operations: tuple[Operation, ...]) -> str:
    """The canonical key of a chain: its numbers and signs, not its wording."""
    return f"chain:{start}" + "".join(f"{sign}{operand}" for sign, operand in operations)


def is_training_chain(start: int, operations: tuple[Operation, ...]) -> bool:
    """Whether a chain may occur in training text.

    A chain is refused as soon as *any* stretch of two or more of its steps is a held-out problem: otherwise a test problem
    could be read off the middle of a longer training chain. Single steps are not held out; there are some 2,500 of them
    and they are the arithmetic that the large model is to know.

    Args:
        start: The first number.
        operations: The steps.

    Returns:
        True when no stretch is held out.
    """
    values = [start]
    for sign, operand in operations:
        values.append(values[-1] + operand if sign == "+" else values[-1] - operand)
    count = len(operations)
    return all(
        split_of(chain_key(values[first], operations[first:last])) == "train"
        for first in range(count - 1)
        for last in range(first + 2, count + 1)
    )


def chain_steps(start: int, operations: tuple[Operation, ...]) -> tuple[list[str], int]:
    """Work a chain out.

    Args:
        start: The first number.
        operations: The steps.

    Returns:
        One equation per step, and the result.
    """
    value, equations = start, []
    for sign, operand in operations:
        result = value + operand if sign == "+" else value - operand
        equations.append(f"{value}{sign}{operand}={result}")
        value = result
    return equations, value


def draw_operation(rng: random.Random, value: int) -> Operation:
    """A step from `value` whose result stays within 0..50."""
    while True:
        sign, operand = rng.choice("+-"), rng.randint(1, CHAIN_LIMIT)
        if 0 <= (value + operand if sign == "+" else value - operand) <= CHAIN_LIMIT:
            return sign, operand


def chain_problem(rng: random.Random, split: Split) -> Problem:
    """Draw a chain of two to four additions and subtractions.

    Args:
        rng: Source of randomness.
        split: The split to draw from; `"train"` also excludes chains that contain a held-out one.

    Returns:
        The problem, in one of two wordings.
    """
    while True:
        start, operations = rng.randint(1, CHAIN_LIMIT), ()
        value = start
        for _ in range(rng.choice((2, 3, 4))):
            operation = draw_operation(rng, value)
            operations += (operation,)
            value = value + operation[1] if operation[0] == "+" else value - operation[1]
        key = chain_key(start, operations)
        if is_training_chain(start, operations) if split == "train" else split_of(key) == split:
            break
    words = rng.choice(_CHAIN_WORDS)
    spoken = ", ".join(f"{words[sign]} {operand}" for sign, operand in operations)
    equations, result = chain_steps(start, operations)
    question = f"Start with {start}, {spoken}. What is the result?"
    return Problem("chain", question, gold=str(result), solution=", ".join(equations), key=key)


def countdown_key(numbers: tuple[int, ...], target: int) -> str:
    """The canonical key of a Countdown problem: the multiset of numbers and the target."""
    return f"countdown:{','.join(map(str, sorted(numbers)))}={target}"


def countdown_problem(rng: random.Random, split: Split, count: int = 3) -> Problem:
    """Draw a solvable Countdown problem: reach the target with every number used once.

    Args:
        rng: Source of randomness.
        split: The split to draw from.
        count: How many numbers; the bundled models know 3.

    Returns:
        The problem with one of its solutions. The target is never one of the numbers.
    """
    while True:
        numbers = tuple(rng.randint(1, COUNTDOWN_LARGEST) for _ in range(count))
        worked = _combine_at_random(rng, numbers)
        if worked is None:
            continue
        target, equations = worked
        key = countdown_key(numbers, target)
        if target not in numbers and split_of(key) == split:
            question = f"Use {', '.join(map(str, numbers))} to make {target}."
            return Problem("countdown", question, str(target), ", ".join(equations), key, numbers)


def person_problem(rng: random.Random, person: Person, attribute: Attribute) -> Problem:
    """A question about one attribute of one person, in one of two wordings.

    The split of such a problem is the person's group, see `proxytune.lab.world.Person`.
    """
    question = rng.choice(QUESTIONS[attribute]).format(name=person.name)
    return Problem("qa", question, person.value(attribute), solution="", key=f"qa:{person.name}:{attribute}")


def problems(task: Task, split: HeldOut, count: int, world: World, seed: int = 0) -> list[Problem]:
    """Held-out problems of one task, each key once.

    Args:
        task: `"chain"`, `"qa"` (people never seen in any question) or `"countdown"`.
        split: `"validation"` or `"test"`.
        count: How many at most; `"qa"` has three per person, so about 180 per split.
        world: The world to ask about.
        seed: Seed of the draw.

    Returns:
        The problems, in a fixed order.
    """
    rng = random.Random(f"{task}:{split}:{seed}")
    if task == "qa":
        found = [person_problem(rng, person, attribute) for person in world.group(split) for attribute in ATTRIBUTES]
        rng.shuffle(found)
        return found[:count]
    draw = chain_problem if task == "chain" else countdown_problem
    unique: dict[str, Problem] = {}
    # A repeat is drawn again; the bound only keeps an impossible request from looping for ever.
    for _ in range(100 * count):
        if len(unique) == count:
            break
        problem = draw(rng, split)
        unique.setdefault(problem.key, problem)
    return list(unique.values())


def grade(problem: Problem, text: str) -> Grade:
    """Verify an answer.

    Lenient looks at the first line only and accepts any form: for a chain the number after `The answer is`, or else the last
    number; for a person the right word anywhere; for Countdown equations that use every number once and end at the
    target. Strict asks for exactly the taught form and nothing after it; the steps of a chain must be right as well.

    Args:
        problem: The problem that was asked.
        text: What the model wrote after `Answer:`, without special tokens.

    Returns:
        Both verdicts; strict implies lenient.
    """
    stripped = text.strip()
    first_line = stripped.split("\n", 1)[0]
    lenient = _LENIENT[problem.task](problem, first_line)
    if problem.task == "countdown":
        worked, _, final = stripped.rpartition(". ")
        in_form = re.fullmatch(r"\d+[+\-*/]\d+=\d+(, \d+[+\-*/]\d+=\d+)*", worked) is not None
        return Grade(lenient, lenient and in_form and final == f"The answer is {problem.gold}.")
    return Grade(lenient, lenient and stripped == problem.answer)


def countdown_solved(numbers: tuple[int, ...], target: int, text: str) -> bool:
    """Whether the equations in `text` solve a Countdown problem.

    Args:
        numbers: The numbers that must each be used exactly once.
        target: What the last equation must yield.
        text: Equations such as `3*4=12, 12-2=10`; text between them is ignored.

    Returns:
        True when every equation holds, uses only numbers at hand, and all numbers are used up.
    """
    pool = list(numbers)
    equations = _EQUATION.findall(text)
    if len(equations) != len(numbers) - 1:
        return False
    result = -1
    for left, sign, right, claimed in equations:
        for operand in (int(left), int(right)):
            if operand not in pool:
                return False
            pool.remove(operand)
        result = int(claimed)
        if _apply(int(left), sign, int(right)) != result:
            return False
        pool.append(result)
    return result == target


def _chain_lenient(problem: Problem, line: str) -> bool:
    stated = re.search(r"The answer is (\d+)", line)
    numbers = [stated[1]] if stated else re.findall(r"\d+", line)
    return bool(numbers) and int(numbers[-1]) == int(problem.gold)


def _qa_lenient(problem: Problem, line: str) -> bool:
    return problem.gold in re.findall(r"[A-Za-z]+", line)


def _countdown_lenient(problem: Problem, line: str) -> bool:
    return countdown_solved(problem.numbers, int(problem.gold), line)


_LENIENT: dict[Task, Callable[[Problem, str], bool]] = {
    "chain": _chain_lenient,
    "qa": _qa_lenient,
    "countdown": _countdown_lenient,
}


def _apply(left: int, sign: str, right: int) -> int | None:
    """The result of one Countdown step, None for an inexact division."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return None if right == 0 or left % right else left // right


def _combine_at_random(rng: random.Random, numbers: tuple[int, ...]) -> tuple[int, list[str]] | None:
    """Combine all numbers by random steps; None when a step leaves 1..50."""
    pool, equations = list(numbers), []
    while len(pool) > 1:
        first, second = rng.sample(range(len(pool)), 2)
        sign = rng.choice("++--**/")  # divisions are rarely exact, so fewer are tried
        result = _apply(pool[first], sign, pool[second])
        if result is None or not 1 <= result <= COUNTDOWN_LIMIT:
            return None
        equations.append(f"{pool[first]}{sign}{pool[second]}={result}")
        pool = [number for index, number in enumerate(pool) if index not in (first, second)] + [result]
    return pool[0], equations
