"""What the puzzles share: instances drawn and split, all solutions enumerated, answers written and read.

A puzzle has a finite, ordered list of candidates for every instance, and knows which of them solve it. Solver, training
text of both twins and hold-out follow from that. An instance is a tuple of integers; a solution is the tuple of its
canonical answer's token ids, without the end of text.
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
"""Whether the solution in a training text is drawn uniformly from all, or always the first."""
TWINS: tuple[Twin, ...] = ("varied", "collapsed")
Instance = tuple[int, ...]
Solution = tuple[int, ...]

_ROUNDS = 50
"""Draws without a new instance after which a split counts as exhausted."""


class Puzzle(ABC):
    """A task whose instances have several solutions, all of which can be enumerated.

    Attributes:
        name: Its name.
        prompt_length: Tokens of every prompt.
        answer_length: Tokens of the longest answer in the training text, end of text included.
    """

    name: str
    prompt_length: int
    answer_length: int

    @abstractmethod
    def propose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Instances of any split, `[N, F]` int64; some may have no solution."""

    @abstractmethod
    def key(self, instance: Instance) -> str:
        """The canonical key of an instance; the split is a function of it."""

    @abstractmethod
    def solved_by(self, instances: torch.Tensor) -> torch.Tensor:
        """Which candidates solve which of the instances `[N, F]`.

        Returns:
            `[N, S]` bool, each distinct solution once, in the fixed order of which `"collapsed"` takes the first.
        """

    @abstractmethod
    def written(self, instances: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Canonical answers of the chosen candidates `[N]`: token ids without the end of text, `[N, L]` int64."""

    @abstractmethod
    def prompts(self, instances: torch.Tensor) -> torch.Tensor:
        """Prompts of instances `[N, F]`: token ids, `[N, prompt_length]` int64, without padding."""

    @abstractmethod
    def read(self, instance: Instance, ids: Sequence[int]) -> Solution | None:
        """The solution in a generated answer.

        Args:
            instance: The instance that was asked.
            ids: What followed the prompt, up to the end of text, with any padding after it.

        Returns:
            One of `solutions(instance)`; None for an answer that is unfinished, malformed or wrong.
        """

    def answers(self, instances: torch.Tensor, twin: Twin, generator: torch.Generator) -> torch.Tensor:
        """The answers that a twin is trained on.

        Returns:
            Token ids with the end of text, padded on the right, `[N, answer_length]` int64. The collapsed twin's do not
            depend on the generator.
        """
        return ended(self.written(instances, self.chosen(instances, twin, generator)))

    def chosen(self, instances: torch.Tensor, twin: Twin, generator: torch.Generator) -> torch.Tensor:
        """The candidate in a twin's training text for each instance, `[N]` int64."""
        solved = self.solved_by(instances)
        if twin == "collapsed":
            return solved.int().argmax(1)  # the first of equal values
        return torch.multinomial(solved.float(), 1, generator=generator)[:, 0]

    def solutions(self, instance: Instance) -> tuple[Solution, ...]:
        """All distinct solutions of an instance, in the fixed order."""
        row = torch.tensor([instance])
        choice = self.solved_by(row)[0].nonzero()[:, 0]  # [solutions]
        return tuple(tuple(answer) for answer in self.written(row.expand(len(choice), -1), choice).tolist())

    def draw(self, count: int, generator: torch.Generator, split: Split) -> torch.Tensor:
        """Instances of one split, `[count, F]` int64, possibly repeated.

        Training instances have a solution, held-out ones at least two.
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
        """Distinct held-out instances with at least two solutions, the same on every machine.

        Raises:
            LabError: If the split has fewer than `count`.
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
    """A CPU generator whose numbers are a function of a key."""
    return torch.Generator().manual_seed(stable_hash(key) >> 1)


def body_of(ids: Sequence[int]) -> list[int] | None:
    """The ids before the end of text; None if there is no end, or something other than padding after it."""
    listed = list(ids)
    if EOS not in listed:
        return None
    end = listed.index(EOS)
    return listed[:end] if all(token == PAD for token in listed[end + 1 :]) else None


def ended(answers: torch.Tensor) -> torch.Tensor:
    """Answers `[N, L]` followed by the end of text, `[N, L + 1]`."""
    return torch.cat([answers, answers.new_full((len(answers), 1), EOS)], 1)
