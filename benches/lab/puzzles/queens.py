"""Six queens: the blocked squares of a board are given, the answer is the column of one queen per row.

An empty board has four solutions, which differ in every row, so the first token decides the whole answer. An instance
leaves one to three of the four free: a model that knew the four but ignored the board would be right about half the
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import torch

from lab.puzzles.puzzle import Instance, Puzzle, Solution, body_of
from lab.puzzles.vocabulary import ANSWER, BLANK, BOS, COLUMNS, QUEENS

__all__ = ["SIZE", "Queens"]

SIZE = len(COLUMNS)
_BLOCKED = 0.15
"""Probability that a square is blocked; it leaves a solution free on 38 of 100 boards."""


def _attack(columns: Sequence[int]) -> bool:
    """Whether any two queens share a column or a diagonal."""
    return any(
        abs(columns[low] - columns[high]) in (0, high - low) for low, high in combinations(range(len(columns)), 2)
    )


_ALL = torch.tensor([columns for columns in permutations(range(SIZE)) if not _attack(columns)])  # [4, rows]
_SQUARES = torch.zeros(len(_ALL), SIZE * SIZE).scatter_(1, _ALL + SIZE * torch.arange(SIZE), 1.0)  # [4, squares]


class Queens(Puzzle):
    """Queens on a board of 6 × 6; an instance is 36 bits, row by row, 1 for a blocked square."""

    name = "queens"
    prompt_length = SIZE * SIZE + 3
    answer_length = SIZE + 1

    def propose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Boards with randomly blocked squares, `[N, 36]` int64 of 0 and 1; none leaves all four solutions free."""
        boards = (torch.rand(count, SIZE * SIZE, generator=generator) < _BLOCKED).long()
        return boards[~self.solved_by(boards).all(1)]

    def key(self, instance: Instance) -> str:
        """The blocked squares."""
        return "queens:" + "".join(map(str, instance))

    def solved_by(self, instances: torch.Tensor) -> torch.Tensor:
        """Which of the four solutions are free, `[N, 4]` bool."""
        return instances.float() @ _SQUARES.T == 0

    def written(self, instances: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """One column per row, `[N, 6]` int64."""
        return COLUMNS[0] + _ALL[choice]

    def prompts(self, instances: torch.Tensor) -> torch.Tensor:
        """One bit per square, `[N, 39]` int64."""
        column = instances.new_ones(len(instances), 1)
        return torch.cat([BOS * column, QUEENS * column, BLANK + instances, ANSWER * column], 1)

    def read(self, instance: Instance, ids: Sequence[int]) -> Solution | None:
        """The columns, if there are six on free squares and no two queens attack each other."""
        body = body_of(ids)
        if body is None or len(body) != SIZE or not set(body) <= set(COLUMNS):
            return None
        columns = [token - COLUMNS[0] for token in body]
        blocked = any(instance[SIZE * row + column] for row, column in enumerate(columns))
        return None if blocked or _attack(columns) else tuple(body)
