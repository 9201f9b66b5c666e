"""Graph 3-colouring: the edges of a graph of five nodes are given, the answer is one colour per node.

Graphs are planted: an edge is possible only between nodes of different colours in a hidden colouring, so every instance
has a solution, and at least five more by renaming the colours. Two graphs are the same instance if they have the same
edges; graphs that differ by the names of their nodes may lie in different splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import torch

from lab.puzzles.puzzle import Instance, Puzzle, Solution, body_of
from lab.puzzles.vocabulary import ANSWER, BLANK, BOS, COLOURING, COLOURS

__all__ = ["NODES", "PAIRS", "Colouring"]

NODES = 5
PAIRS = tuple(combinations(range(NODES), 2))
"""The pair of nodes that each bit of an instance stands for."""
_EDGE = 0.6
"""Probability of an edge between two nodes of different colours."""
_FROM = torch.tensor([first for first, _ in PAIRS])
_TO = torch.tensor([second for _, second in PAIRS])
_ALL = torch.tensor(list(product(range(len(COLOURS)), repeat=NODES)))  # [243, nodes], in lexicographic order
_CLASHES = (_ALL[:, _FROM] == _ALL[:, _TO]).float()  # [243, pairs]


class Colouring(Puzzle):
    """3-colouring of graphs with five nodes; an instance is 10 bits, one for each pair of nodes."""

    name = "colouring"
    prompt_length = len(PAIRS) + 3
    answer_length = NODES + 1

    def propose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Planted graphs, `[N, 10]` int64 of 0 and 1."""
        hidden = torch.randint(len(COLOURS), (count, NODES), generator=generator)
        edges = torch.rand(count, len(PAIRS), generator=generator) < _EDGE
        return (edges & (hidden[:, _FROM] != hidden[:, _TO])).long()

    def key(self, instance: Instance) -> str:
        """The edges."""
        return "colouring:" + "".join(map(str, instance))

    def solved_by(self, instances: torch.Tensor) -> torch.Tensor:
        """Which of all 243 colourings have no edge between equal colours, `[N, 243]` bool."""
        return instances.float() @ _CLASHES.T == 0

    def written(self, instances: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """One colour per node, `[N, 5]` int64."""
        return COLOURS[0] + _ALL[choice]

    def prompts(self, instances: torch.Tensor) -> torch.Tensor:
        """One bit per pair of nodes, `[N, 13]` int64."""
        column = instances.new_ones(len(instances), 1)
        return torch.cat([BOS * column, COLOURING * column, BLANK + instances, ANSWER * column], 1)

    def read(self, instance: Instance, ids: Sequence[int]) -> Solution | None:
        """The colours, if there are five and no edge joins equal ones."""
        body = body_of(ids)
        if body is None or len(body) != NODES or not set(body) <= set(COLOURS):
            return None
        joined = (pair for pair, bit in zip(PAIRS, instance, strict=True) if bit)
        return None if any(body[first] == body[second] for first, second in joined) else tuple(body)
