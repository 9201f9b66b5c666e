"""Pondering: answers of one or several attempts, which get worse or better one after the other.

The problems are chains of two or three steps. Each attempt of an answer follows the word `So`, and the last one counts:
`25+19=44, 44-19=25. So 25+19=44, 44-19=23. The answer is 23.` How good an attempt is depends, by construction of the
training text, on the wording of the question:

- *worsens* (`plus`, `minus`): the first attempt is mostly right, each further one is wrong more often, each time in
  another way. A vote over short answers is right; thinking on ruins it.
- *improves* (`add`, `take away`): the first attempt mostly leaves the last step out, so most samples agree on the same
  wrong answer, which no vote can correct; further attempts are right more and more often.

Replacing the end of thinking (` The`) by ` So` makes an answer longer by one attempt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from proxytune.demo.holdout import Equation, HeldOut, Split
from proxytune.demo.tasks import CHAIN_LIMIT, Problem, apply_sign, chain_problem, distinct

__all__ = [
    "CONTINUATION",
    "END_OF_THINKING",
    "KINDS",
    "WRONG",
    "Kind",
    "Ponder",
    "draw_ponder",
    "ponder_examples",
    "ponders",
]

Kind = Literal["worsens", "improves"]
KINDS: tuple[Kind, ...] = get_args(Kind)

END_OF_THINKING = " The"
"""First token of the final sentence."""
CONTINUATION = " So"
"""First token of another attempt."""

WRONG: dict[Kind, tuple[float, ...]] = {
    "worsens": (0.1, 0.3, 0.5, 0.7, 0.85, 0.9),
    "improves": (0.65, 0.4, 0.2, 0.08, 0.05, 0.05),
}
"""The probability that an attempt is wrong in the training text: the first, the second, …, the sixth."""
GO_ON = 0.55
"""The probability of one more attempt in the training text, up to six."""
_LARGEST_SLIP = 9


@dataclass(frozen=True)
class Ponder:
    """One problem, with its right answer and steps; `kind` says whether attempts get worse or better."""

    kind: Kind
    question: str
    gold: int
    steps: tuple[Equation, ...]

    def attempt(self, rng: random.Random, number: int) -> tuple[Equation, ...]:
        """Draw attempt `number` (from 0) of the training text; its last step's result is its answer."""
        if rng.random() >= WRONG[self.kind][number]:
            return self.steps
        return self.steps[:-1] if self.kind == "improves" else _slipped(rng, self.steps)

    def example(self, rng: random.Random) -> str:
        """Draw an answer of the training text, with the leading blank."""
        count = 1
        while count < len(WRONG[self.kind]) and rng.random() < GO_ON:
            count += 1
        attempts = [self.attempt(rng, number) for number in range(count)]
        worked = f".{CONTINUATION} ".join(", ".join(map(str, steps)) for steps in attempts)
        return f" {worked}.{END_OF_THINKING} answer is {attempts[-1][-1].result}."

    @staticmethod
    def read(text: str) -> int | None:
        """The number in a text's final sentence; None if it does not end with one."""
        _, found, rest = text.rpartition(f"{END_OF_THINKING} answer is ")
        number = rest.removesuffix(".")
        return int(number) if found and rest.endswith(".") and number.isascii() and number.isdigit() else None


def draw_ponder(rng: random.Random, split: Split) -> Ponder:
    """Draw a problem of either kind, whose chain is in the given split."""
    while True:
        problem = chain_problem(rng, split)
        steps = _steps(problem)
        if len(steps) <= 3:
            kind: Kind = "worsens" if "plus" in problem.question or "minus" in problem.question else "improves"
            return Ponder(kind, problem.question, int(problem.gold), steps)


def ponders(kind: Kind, split: HeldOut, count: int, seed: int = 0) -> list[Ponder]:
    """Distinct held-out problems of one kind, the same on every machine."""
    rng = random.Random(f"ponder:{kind}:{split}:{seed}")

    def draw() -> Ponder:
        while True:
            problem = draw_ponder(rng, split)
            if problem.kind == kind:
                return problem

    return distinct(draw, lambda problem: problem.question, count)


def ponder_examples(rng: random.Random, count: int) -> list[tuple[Ponder, str]]:
    """Training problems, each with an answer of the training text."""
    drawn = [draw_ponder(rng, "train") for _ in range(count)]
    return [(problem, problem.example(rng)) for problem in drawn]


def _steps(problem: Problem) -> tuple[Equation, ...]:
    out = []
    for step in problem.solution.split(", "):
        worked, result = step.split("=")
        sign = "+" if "+" in worked else "-"
        left, right = worked.split(sign)
        out.append(Equation(int(left), sign, int(right), int(result)))
    return tuple(out)


def _slipped(rng: random.Random, steps: tuple[Equation, ...]) -> tuple[Equation, ...]:
    """The steps with one result off by up to nine, and its consequences."""
    while True:
        at, off = rng.randrange(len(steps)), rng.choice((-1, 1)) * rng.randint(1, _LARGEST_SLIP)
        out: list[Equation] = []
        for index, step in enumerate(steps):
            left = out[-1].result if out else step.left
            result = apply_sign(left, step.sign, step.right)
            assert result is not None
            out.append(Equation(left, step.sign, step.right, result + (off if index == at else 0)))
        if all(0 <= step.result <= CHAIN_LIMIT for step in out):
            return tuple(out)
