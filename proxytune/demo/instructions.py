"""The prompt format and the instruction set."""

from __future__ import annotations

import random
from dataclasses import dataclass

from proxytune.demo.tasks import Problem, chain_problem, countdown_problem, person_problem
from proxytune.demo.world import ATTRIBUTES, Attribute, Person, World

__all__ = ["InstructionRecipe", "instruction_set", "prompt_of"]


@dataclass(frozen=True)
class InstructionRecipe:
    """Number of chains, questions about people of the tuning group (at most three each), and Countdown problems."""

    chain: int = 400
    qa: int = 90
    countdown: int = 200
    seed: int = 42


def prompt_of(question: str) -> str:
    """The prompt for `question`; the tokenizer's chat template renders one user turn to the same text."""
    return f"Question: {question}\nAnswer:"


def instruction_set(world: World, recipe: InstructionRecipe) -> list[Problem]:
    """Draw the problems to tune on, chains first, none of them held out; `Problem.answer` is the target."""
    rng = random.Random(recipe.seed)
    chains = [chain_problem(rng, "train") for _ in range(recipe.chain)]
    countdowns = [countdown_problem(rng, "train") for _ in range(recipe.countdown)]
    facts: list[tuple[Person, Attribute]] = [
        (person, attribute) for person in world.group("tuning") for attribute in ATTRIBUTES
    ]
    rng.shuffle(facts)
    people = [person_problem(rng, person, attribute) for person, attribute in facts[: recipe.qa]]
    return chains + countdowns + people


def _styled_answer(problem: Problem, style: int) -> str:
    """A right answer in one of the forms of its task, or (style 3) in the taught form."""
    if style == 3:
        return problem.answer
    if problem.task == "countdown":
        return f"{problem.solution}."
    if problem.task == "chain":
        return f"It is {problem.gold}." if style == 0 else f"{problem.solution}."
    return (f"{problem.gold}.", f"It is {problem.gold}.", problem.gold)[style]
