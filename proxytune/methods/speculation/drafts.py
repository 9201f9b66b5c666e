"""The protocol of a draft: `Draft` is the setting, `Drafter` its state in one generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.costs.speculation import DraftCosts
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.round import Proposal

__all__ = ["Draft", "DraftContext", "Drafter", "Draw"]

Draw = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From raw logits `[B, V_q]` and the draft tokens before them `[B, j]` to tokens `[B]` and the rows they came from."""


@dataclass(frozen=True, eq=False)
class DraftContext:
    """What a generation begins with.

    Attributes:
        model: The composed model, or a plain causal LM.
        cache: Its cache, which holds the prompts.
        input_ids: `[B, T]`, int64: the prompts.
        attention_mask: `[B, T]`, or longer where a cache was given and only new ids; None if nothing is padded.
        usable: How many ids may be drafted.
    """

    model: Any
    cache: Cache
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    usable: int


class Drafter(ABC):
    """A draft in one generation.

    Attributes:
        caches: The caches that it runs ahead on.
        added: How many columns they hold beyond what is committed.
        role: The role of the member that it is; None for a draft from outside the model.
    """

    caches: tuple[Cache, ...] = ()
    added: int = 0
    role: str | None = None

    def room(self, width: int) -> int:
        """How many tokens it can draft within its context, after `width` columns; at least 0."""
        return 1 << 30

    @abstractmethod
    def propose(self, count: int, rows: RowProgress, draw: Draw) -> Proposal:
        """Draft a continuation of each row.

        Args:
            count: At most how many tokens, at least 1.
            rows: The texts, whose last token no cache holds yet, and the caches' columns.
            draw: Draws from a model's logits as the target will.

        Returns:
            K ≤ `count` tokens for each row, or fewer.
        """

    def precomputed(self) -> torch.Tensor | None:
        """The member's logits `[B, K, V_i]` over the first tokens of the target's pass; None if it ran over none."""
        return None

    def read_last(self, rows: RowProgress) -> torch.Tensor | None:
        """Run over the last draft token too, which is of use only once some row has accepted its whole draft.

        Returns:
            `[B, 1, V_q]`: the logits behind it; None for a draft without a model.
        """
        return None

    def skip(self, rows: RowProgress) -> None:
        """Let a round without a draft go by: caches of its own have to take in the last token all the same."""
        self.added = 1


class Draft(ABC):
    """A source of draft tokens, for any number of generations."""

    @abstractmethod
    def begin(self, start: DraftContext) -> Drafter:
        """Begin a generation.

        Args:
            start: What it begins with.

        Raises:
            InputError: If the model is not one that it can draft for.
        """

    @abstractmethod
    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, in seconds, by the figures of `proxytune.costs.devices`.

        Args:
            model: The model.
            rows: B.

        Raises:
            InputError: If the model is not one that it can draft for.
        """
