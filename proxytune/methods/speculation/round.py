"""What a round passes from step to step: a proposal, its verification, and the host's copy of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from proxytune.errors import NumericalError

__all__ = ["Commit", "Proposal", "RoundResult", "Verification"]


@dataclass(frozen=True, eq=False)
class Proposal:
    """The draft tokens of a round.

    Attributes:
        tokens: `[B, K]`, int64; −1 from where a row has no draft.
        drawn_from: `[B · K, V_q]`: the logits they were sampled from; None if they were not sampled.
    """

    tokens: torch.Tensor
    drawn_from: torch.Tensor | None = None

    @classmethod
    def none(cls, input_ids: torch.Tensor) -> Proposal:
        """No draft for any row of `input_ids`, `[B, T]`."""
        return cls(input_ids[:, :0])

    @property
    def length(self) -> int:
        """K, the length of the longest draft."""
        return self.tokens.shape[1]


@dataclass(frozen=True, eq=False)
class Verification:
    """Which draft tokens the target accepted, and the token after them.

    Attributes:
        tokens: `[B, K + 1]`, int64: the accepted draft tokens; then the recovered token (after a rejection) or the
            bonus token (after a whole draft), −1 where there is no distribution to draw it from; then −1.
        accepted: `[B]`, int64: how many draft tokens were accepted.
        scores: `[B, K + 1, V]`, float32, after all processors; None if not wanted.
        logits: `[B, K + 1, V]`, float32, before all processors; None if not wanted.
        failure: From (row, column, step) to the error that says why no token could be drawn there.
    """

    tokens: torch.Tensor
    accepted: torch.Tensor
    scores: torch.Tensor | None
    logits: torch.Tensor | None
    failure: Callable[[int, int, int], NumericalError]


@dataclass(frozen=True, eq=False)
class RoundResult:
    """A verification on the host, one entry per row.

    Attributes:
        verification: The verification.
        accepted: Accepted draft tokens.
        drafted: Draft tokens.
        failed: Whether the token after the accepted ones could not be drawn.
        ends: `[B][K + 1]`: whether the text ends at each of the new tokens.
    """

    verification: Verification
    accepted: list[int]
    drafted: list[int]
    failed: list[bool]
    ends: list[list[bool]]


@dataclass(frozen=True)
class Commit:
    """What a round added to the texts, one entry per row; 0 for rows that had ended before it.

    Attributes:
        start: Generated tokens before the round.
        kept: Tokens that the round added.
        drafted: Draft tokens.
        accepted: How many of them were accepted.
        rejected: 1 if the round ended in a rejection.
    """

    start: list[int]
    kept: list[int]
    drafted: list[int]
    accepted: list[int]
    rejected: list[int]
