"""What the puzzles have in common: instances drawn and split, all solutions enumerated, answers written and read.

A puzzle has, for every instance, a finite list of candidates in a fixed order, and knows which of them solve it. From
that follow the solver, the text of both twins, and the hold-out. An instance is a row of integers, a solution the
token ids of its canonical answer, without the end of text; both are plain tuples, so they can be counted and compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from lab.puzzles.vocabulary import EOS, PAD
from proxytune.demo.holdout import HeldOut, Split, split_of
from proxytune.demo.world import stable_hash
from proxytune.errors import LabError

__all__ = ["TWINS", "Instance", "Puzzle", "Solution", "Twin", "body_of", "keyed_generator"]

Twin = Literal["varied", "collapsed"]
"""Whether a training text has a solution drawn uniformly from all there are, or always the first of them."""
TWINS: tuple[Twin, ...] = ("varied", "collapsed")
Instance = tuple[int, ...]
Solution = tuple[int, ...]

_ROUNDS = 50
"""Draws without a new instance after which there are taken to be no more."""


class Puzzle(ABC):
    """A task whose instances have several solutions, all of which can be written down.

    Attributes:
        name: What it is called.
        prompt_length: Token ids of every prompt.
        answer_length: Token ids of the longest answer in the training text, the end of text included.
    """

    name: str
    prompt_length: int
    answer_length: int

    @abstractmethod
    def propose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Instances of any split, some of which may have no solution.

        Args:
            count: How many.
            generator: Source of randomness, on the CPU.

        Returns:
            One instance per row, `[N, F]` int64.
        """

    @abstractmethod
    def key(self, instance: Instance) -> str:
        """What makes two instances the same; the split is a function of it."""

    @abstractmethod
    def solved_by(self, instances: torch.Tensor) -> torch.Tensor:
        """Which candidates solve which instance.

        Args:
            instances: `[N, F]` int64.

        Returns:
            `[N, S]` bool, each distinct solution once, in the fixed order that `"collapsed"` takes the first of.
        """

    @abstractmethod
    def written(self, instances: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """The canonical answers of chosen candidates.

        Args:
            instances: `[N, F]` int64.
            choice: The candidate of each instance, `[N]` int64.

        Returns:
            Token ids without the end of text, `[N, L]` int64.
        """

    @abstractmethod
    def prompts(self, instances: torch.Tensor) -> torch.Tensor:
        """The prompts of instances.

        Args:
            instances: `[N, F]` int64.

        Returns:
            Token ids, `[N, prompt_length]` int64; no row is padded.
        """

    @abstractmethod
    def read(self, instance: Instance, ids: Sequence[int]) -> Solution | None:
        """The verdict on a generated answer.

        Args:
            instance: The instance that was asked.
            ids: What followed the prompt, up to the end of text and with any padding after it.

        Returns:
            The canonical solution that the answer gives, which is one of `solutions(instance)`; None for an answer
            that is not finished, not well-formed or wrong.
        """

    def answers(self, instances: torch.Tensor, twin: Twin, generator: torch.Generator) -> torch.Tensor:
        """The answers that a twin is trained on.

        Args:
            instances: `[N, F]` int64, each with a solution.
            twin: Which.
            generator: Source of randomness, on the CPU; nothing of it reaches the text of the collapsed twin.

        Returns:
            Token ids with the end of text, padded on the right, `[N, answer_length]` int64.
        """
        return ended(self.written(instances, self.chosen(instances, twin, generator)))

    def chosen(self, instances: torch.Tensor, twin: Twin, generator: torch.Generator) -> torch.Tensor:
        """The candidate that the training text of a twin has for each instance, `[N]` int64."""
        solved = self.solved_by(instances)
        if twin == "collapsed":
            return solved.int().argmax(1)  # the first of equal values
        return torch.multinomial(solved.float(), 1, generator=generator)[:, 0]

    def solutions(self, instance: Instance) -> tuple[Solution, ...]:
        """All distinct solutions of an instance, in the fixed order.

        Args:
            instance: The instance.

        Returns:
            Token ids of each canonical answer, without the end of text.
        """
        row = torch.tensor([instance])
        choice = self.solved_by(row)[0].nonzero()[:, 0]  # [solutions]
        return tuple(tuple(answer) for answer in self.written(row.expand(len(choice), -1), choice).tolist())

    def draw(self, count: int, generator: torch.Generator, split: Split) -> torch.Tensor:
        """Instances of one split; the same one may occur twice.

        Args:
            count: How many.
            generator: Source of randomness, on the CPU.
            split: Training instances have a solution, held-out ones have at least two.

        Returns:
            One instance per row, `[count, F]` int64.
        """
        least = 1 if split == "train" else 2
        found: list[torch.Tensor] = []
        missing = count
        while missing > 0:
            proposed = self.propose((2 if split == "train" else 16) * missing + 8, generator)
            proposed = proposed[self.solved_by(proposed).sum(1) >= least]
            kept = [split_of(self.key(tuple(row))) == split for row in proposed.tolist()]
            proposed = proposed[torch.tensor(kept, dtype=torch.bool)][:missing]
            found.append(proposed)
            missing -= len(proposed)
        return torch.cat(found)

    def held_out(self, split: HeldOut, count: int, seed: int = 0) -> list[Instance]:
        """Held-out instances with at least two solutions, all different, the same on every machine.

        Args:
            split: Where they come from.
            count: How many.
            seed: Seed of the draw.

        Returns:
            The instances.

        Raises:
            LabError: The split has fewer.
        """
        generator = keyed_generator(f"{self.name}:{split}:{seed}")
        found: dict[str, Instance] = {}
        idle = 0
        while len(found) < count and idle < _ROUNDS:
            before = len(found)
            for row in self.draw(64, generator, split).tolist():
                found.setdefault(self.key(tuple(row)), tuple(row))
            idle = idle + 1 if len(found) == before else 0
        if len(found) < count:
            raise LabError.of(
                f"held-out instances of {self.name!r}",
                expected=f"at most the {len(found)} that the {split} split has",
                got=f"count={count}",
                remedy="Ask for fewer, and draw more answers to each.",
            )
        return list(found.values())[:count]


def keyed_generator(key: str) -> torch.Generator:
    """A generator whose numbers are a function of a key, on the CPU."""
    return torch.Generator().manual_seed(stable_hash(key) >> 1)


def body_of(ids: Sequence[int]) -> list[int] | None:
    """The ids before the end of text; None if there is no end, or something other than padding after it."""
    listed = list(ids)
    if EOS not in listed:
        return None
    end = listed.index(EOS)
    return listed[:end] if all(token == PAD for token in listed[end + 1 :]) else None


def ended(answers: torch.Tensor) -> torch.Tensor:
    """Answers `[N, L]` with the end of text behind each, `[N, L + 1]`."""
    return torch.cat([answers, answers.new_full((len(answers), 1), EOS)], 1)
