"""The interface of drafts: `Draft` is the setting, `Drafter` its state in one generation."""

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
"""Samples tokens `[B]` from raw logits `[B, V_q]` after draft tokens `[B, j]`; returns them and the logits used."""


@dataclass(frozen=True, eq=False)
class DraftContext:
    """What a draft is given at the start of a generation.

    Attributes:
        model: The composed model, or a plain causal LM.
        cache: Its cache, which holds the prompts.
        input_ids: `[B, T]`, int64: the prompts.
        attention_mask: `[B, T]`, longer if the call continues a given cache; None if nothing is padded.
        usable: Token ids below this may be drafted.
    """

    model: Any
    cache: Cache
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    usable: int


class Drafter(ABC):
    """A draft in one generation.

    Attributes:
        caches: The caches it writes draft tokens to.
        added: How many columns of them are not committed yet.
        role: The role of the composition's member that drafts; None for a draft from outside the model.
    """

    caches: tuple[Cache, ...] = ()
    added: int = 0
    role: str | None = None

    def room(self, width: int) -> int:
        """How many tokens fit into its context after `width` columns; at least 0."""
        return 1 << 30

    @abstractmethod
    def propose(self, count: int, rows: RowProgress, draw: Draw) -> Proposal:
        """Draft at most `count` ≥ 1 tokens per row.

        No cache holds the last token of the texts in `rows` yet. `draw` samples from logits as the target will.
        """

    def precomputed(self) -> torch.Tensor | None:
        """The drafting member's logits over the first K tokens of the target's pass, `[B, K, V_i]`, if it has any."""
        return None

    def read_last(self, rows: RowProgress) -> torch.Tensor | None:
        """Read the last draft token too; returns the logits after it, `[B, 1, V_q]`, or None without a model.

        Called only once some row has accepted its whole draft.
        """
        return None

    def skip(self, rows: RowProgress) -> None:
        """Pass over a round without a draft; a cache of its own has to read the last token all the same."""
        self.added = 1


class Draft(ABC):
    """A source of draft tokens, for any number of generations."""

    @abstractmethod
    def begin(self, start: DraftContext) -> Drafter:
        """Start drafting for one generation.

        Args:
            start: The model, its cache and the prompts.

        Raises:
            InputError: If it cannot draft for this model.
        """

    @abstractmethod
    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, in seconds, by the figures of `proxytune.costs.devices`.

        Args:
            model: The composed model, or a plain causal LM.
            rows: B.

        Raises:
            InputError: If it cannot draft for this model.
        """
