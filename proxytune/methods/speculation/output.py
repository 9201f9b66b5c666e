"""What speculation hands back beside the tokens: how many were drafted, and what became of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from proxytune.costs.speculation import acceptance_of
from proxytune.methods.speculation.verifier import Verification

__all__ = ["SpeculativeOutput", "SpeculativeRecorder"]


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of transformers' own loop, and what it took to get there.

    Attributes:
        rounds: Forward passes of the verifying members, the prompt's among them.
        drafted: `[B]`, int64: drafted tokens of each row.
        accepted: `[B]`, int64: how many of them were accepted.
        rejected: `[B]`, int64: rounds that ended in a rejection. What stood behind a rejected token was not decided on.
        draft_lengths: The draft length of each round after the prompt's.
    """

    rounds: int | None = None
    drafted: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    rejected: torch.Tensor | None = None
    draft_lengths: list[int] | None = None

    @property
    def acceptance(self) -> float:
        """The share of accepted tokens among those that were decided upon; NaN if none was drafted."""
        if self.accepted is None or self.rejected is None:
            return math.nan
        return acceptance_of(int(self.accepted.sum()), int(self.rejected.sum()))


class SpeculativeRecorder:
    """What a generation is asked to report, gathered row by row."""

    def __init__(self, generation_config: Any, rows: int) -> None:
        """Begin with nothing.

        Args:
            generation_config: The settings.
            rows: B.
        """
        asked = bool(generation_config.return_dict_in_generate)
        self.wanted = (asked and bool(generation_config.output_scores), asked and bool(generation_config.output_logits))
        self.rounds = 0
        self.lengths: list[int] = []
        self._counts = {name: [0] * rows for name in ("drafted", "accepted", "rejected")}
        self._kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def count(self, drafted: list[int], accepted: list[int]) -> tuple[int, int]:
        """Take in what became of a round's drafts.

        Args:
            drafted: How many tokens each row had drafted; 0 for one that does not count.
            accepted: How many of them were accepted.

        Returns:
            How many were accepted, and how many rows rejected one.
        """
        self.rounds += 1
        rejected = [int(a < d) for a, d in zip(accepted, drafted, strict=True)]
        taken = [min(a, d) for a, d in zip(accepted, drafted, strict=True)]
        for name, values in (("drafted", drafted), ("accepted", taken), ("rejected", rejected)):
            self._counts[name] = [x + y for x, y in zip(self._counts[name], values, strict=True)]
        return sum(taken), sum(rejected)

    def keep(self, ruling: Verification, before: list[int], got: list[int], pad: int) -> None:
        """Keep the scores and logits of the tokens that stand, if they were asked for.

        Args:
            ruling: The round's.
            before: How many tokens each row had.
            got: How many it has got.
            pad: What follows a row's end, and is certain there.
        """
        for kept, found in zip(self._kept, (ruling.scores, ruling.logits), strict=True):
            if found is None:
                continue
            for row, (start, new) in enumerate(zip(before, got, strict=True)):
                while len(kept) < start + new:
                    kept.append(torch.full_like(found[:, 0], -torch.inf))
                    kept[-1][:, pad] = 0.0
                for column in range(new):
                    kept[start + column][row] = found[row, column]

    def output(self, sequences: torch.Tensor, steps: int, cache: Any) -> SpeculativeOutput:
        """What `generate()` returns.

        Args:
            sequences: `[B, T + new]`, int64.
            steps: How many tokens the longest row has got.
            cache: The cache; None where its rows are not those of the sequences.

        Returns:
            The output.
        """
        scores, logits = (
            tuple(kept[:steps]) if wanted else None for kept, wanted in zip(self._kept, self.wanted, strict=True)
        )
        device = sequences.device
        return SpeculativeOutput(
            sequences=sequences,
            scores=scores,
            logits=logits,
            past_key_values=cache,
            rounds=self.rounds,
            draft_lengths=self.lengths,
            **{name: torch.tensor(counts, device=device) for name, counts in self._counts.items()},
        )
