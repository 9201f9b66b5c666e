"""Programs that decide whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from proxytune.demo.tasks import Problem, Task, apply_sign

_EQUATION = re.compile(r"(\d+)([+\-*/])(\d+)=(\d+)")


@dataclass(frozen=True)
class Grade:
    """The grade of one answer.

    Attributes:
        lenient: The content is right, in any form.
        strict: The answer also has exactly the taught form, with nothing after it.
    """

    lenient: bool
    strict: bool


def grade(problem: Problem, text: str) -> Grade:
    """Grade what a model wrote after `Answer:`; strict implies lenient.

    Lenient reads the first line only and accepts any form: for a chain the number after `The answer is`, or else the
    last number; for a person the right word anywhere; for Countdown equations that use every number once and end at the
    target. Strict requires exactly the taught form with nothing after it, and for a chain the right steps too.
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
    """Whether the equations in `text`, such as `3*4=12, 12-2=10`, solve a Countdown problem.

    Every equation must hold and use only numbers that are available, each number exactly once, and the last must yield
    the target. Text between equations is ignored.
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
        if apply_sign(int(left), sign, int(right)) != result:
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
