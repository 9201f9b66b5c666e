"""What speculation returns beside the tokens: how many were drafted, accepted and rejected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from proxytune.costs.speculation import acceptance_of
from proxytune.methods.speculation.round import Commit, Verification
from proxytune.models.members.cache_name import CACHE

__all__ = ["SpeculativeOutput", "SpeculativeRecorder"]


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of transformers' own loop, with counts of the speculation.

    Attributes:
        rounds: Forward passes of the target, the prompt's included.
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
    """Collects what `SpeculativeOutput` reports.

    Attributes:
        wanted: Whether to report scores, and whether to report logits.
        lengths: The draft length of each round.
    """

    def __init__(self, generation_config: Any, rows: int) -> None:
        full = bool(generation_config.return_dict_in_generate)
        self.wanted = (full and bool(generation_config.output_scores), full and bool(generation_config.output_logits))
        self.lengths: list[int] = []
        self._rounds = 0
        self._counts = {name: [0] * rows for name in ("drafted", "accepted", "rejected")}
        self._kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def add(self, verification: Verification, commit: Commit, pad: int) -> None:
        """Add a round's counts and its new tokens' scores and logits; after a row's end `pad` has 0, other ids −inf."""
        self._rounds += 1
        for name, counts in self._counts.items():
            self._counts[name] = [x + y for x, y in zip(counts, getattr(commit, name), strict=True)]
        for kept, values in zip(self._kept, (verification.scores, verification.logits), strict=True):
            if values is None:
                continue
            for row, (start, new) in enumerate(zip(commit.start, commit.kept, strict=True)):
                while len(kept) < start + new:
                    kept.append(torch.full_like(values[:, 0], -torch.inf))
                    kept[-1][:, pad] = 0.0
                for column in range(new):
                    kept[start + column][row] = values[row, column]

    def output(self, sequences: torch.Tensor, steps: int, cache: Any) -> SpeculativeOutput:
        """What `generate()` returns, `steps` tokens long; `cache` is None if its rows differ in length."""
        scores, logits = (
            tuple(kept[:steps]) if wanted else None for kept, wanted in zip(self._kept, self.wanted, strict=True)
        )
        device = sequences.device
        return SpeculativeOutput(
            sequences=sequences,
            scores=scores,
            logits=logits,
            **{CACHE: cache},
            rounds=self._rounds,
            draft_lengths=self.lengths,
            **{name: torch.tensor(counts, device=device) for name, counts in self._counts.items()},
        )
