"""What speculation hands back beside the tokens: how many were drafted, and what became of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from proxytune.costs.speculation import acceptance_of
from proxytune.methods.speculation.round import Commit, Verification

__all__ = ["SpeculativeOutput", "SpeculativeRecorder"]


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of transformers' own loop, and what it took to get there.

    Attributes:
        rounds: Forward passes of the target, the prompt's among them.
        drafted: `[B]`, int64: draft tokens of each row.
        accepted: `[B]`, int64: how many of them were accepted.
        rejected: `[B]`, int64: rounds that ended in a rejection. Tokens after a rejection were never tested, so
            accepted/drafted underestimates acceptance.
        draft_lengths: The draft length of each round after the prompt's.
    """

    rounds: int | None = None
    drafted: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    rejected: torch.Tensor | None = None
    draft_lengths: list[int] | None = None

    @property
    def acceptance(self) -> float:
        """The share of accepted draft tokens among those that were tested; NaN if none was."""
        if self.accepted is None or self.rejected is None:
            return math.nan
        return acceptance_of(int(self.accepted.sum()), int(self.rejected.sum()))


class SpeculativeRecorder:
    """What a generation is asked to report, gathered row by row.

    Attributes:
        wanted: Whether scores and logits are.
        lengths: The draft length of each round.
    """

    def __init__(self, generation_config: Any, rows: int) -> None:
        """Begin with nothing.

        Args:
            generation_config: The settings.
            rows: B.
        """
        asked = bool(generation_config.return_dict_in_generate)
        self.wanted = (asked and bool(generation_config.output_scores), asked and bool(generation_config.output_logits))
        self.lengths: list[int] = []
        self._rounds = 0
        self._counts = {name: [0] * rows for name in ("drafted", "accepted", "rejected")}
        self._kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def add(self, verification: Verification, commit: Commit, pad: int) -> None:
        """Count what became of a round's drafts, and keep the scores and logits of the tokens that it added.

        Args:
            verification: The round's.
            commit: What it added.
            pad: What follows a row's end, and is certain there.
        """
        self._rounds += 1
        for name, counts in self._counts.items():
            self._counts[name] = [x + y for x, y in zip(counts, getattr(commit, name), strict=True)]
        for kept, found in zip(self._kept, (verification.scores, verification.logits), strict=True):
            if found is None:
                continue
            for row, (start, new) in enumerate(zip(commit.start, commit.kept, strict=True)):
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
            rounds=self._rounds,
            draft_lengths=self.lengths,
            **{name: torch.tensor(counts, device=device) for name, counts in self._counts.items()},
        )
