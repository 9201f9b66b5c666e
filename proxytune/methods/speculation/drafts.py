"""Draft and Drafter: the protocol of a proposer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.costs.speculation import DraftCosts
from proxytune.methods.speculation.ragged_cache import RaggedCache
from proxytune.methods.speculation.ragged_text import RaggedText

__all__ = ["Draft", "DraftContext", "Drafter"]


Draw = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


"""From raw logits `[B, V_q]` and the drafts before them `[B, j]` to tokens `[B]` and the rows they were drawn from."""


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
        added: How many columns they hold beyond what is settled.
        role: The role of the member that it is; None for none.
    """

    caches: tuple[Cache, ...] = ()
    added: int = 0
    role: str | None = None

    def room(self, width: int) -> int:
        """How many tokens it can draft, as far as its own context goes.

        Args:
            width: How many columns the caches have.

        Returns:
            At least 0.
        """
        return 1 << 30

    @abstractmethod
    def propose(
        self, count: int, last: torch.Tensor, texts: RaggedText, columns: RaggedCache, draw: Draw
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft a continuation of each row.

        Args:
            count: At most how many tokens, at least 1.
            last: `[B, 1]`, int64: the last token of each row, which no cache holds yet.
            texts: The texts.
            columns: What the caches hold.
            draw: Draws from a model's logits as the verification will.

        Returns:
            `[B, K]`, int64, K ≤ `count`, −1 from where a row has no draft; and the rows that they were drawn from,
            `[B · K, V_q]`, None if they were not drawn.
        """

    def known(self) -> torch.Tensor | None:
        """What the member that it is has already said about the first tokens of the verifying pass.

        Returns:
            `[B, K, V_i]`; None if it is none, or has drafted nothing.
        """
        return None

    def finish(self, columns: RaggedCache) -> torch.Tensor | None:
        """Run over the last draft too, since some row's has been accepted: only then is there a use for it.

        Args:
            columns: What the caches hold.

        Returns:
            `[B, 1, V_q]`: what it says about the token behind it; None for a draft without a model.
        """
        return None

    def undrafted(self, last: torch.Tensor, columns: RaggedCache) -> None:
        """See a round without a draft go by: caches of its own have to take in the last token all the same.

        Args:
            last: `[B, 1]`, int64.
            columns: What the caches hold.
        """
        self.added = 1


class Draft(ABC):
    """A source of drafted tokens, for any number of generations."""

    @abstractmethod
    def begin(self, start: DraftContext) -> Drafter:
        """Begin a generation.

        Args:
            start: What it begins with.

        Returns:
            The state.

        Raises:
            InputError: If the model is not one that it can draft for.
        """

    @abstractmethod
    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, by the figures of `proxytune.costs.devices`.

        Args:
            model: The model.
            rows: B.

        Returns:
            The costs, in seconds.

        Raises:
            InputError: If the model is not one that it can draft for.
        """
