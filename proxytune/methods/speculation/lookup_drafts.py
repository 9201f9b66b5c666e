"""Drafts without a model: what followed the same words before, and a table of bigrams.

They are certain of what they propose, so a token is accepted with the probability that the target gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from proxytune.costs.speculation import DraftCosts
from proxytune.errors import InputError
from proxytune.methods.speculation.drafts import Draft, DraftContext, Drafter, Draw
from proxytune.methods.speculation.model_drafts import costs_of_round
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.round import Proposal
from proxytune.models.members.member import embedding_rows
from proxytune.validation import whole

__all__ = ["BigramDraft", "PromptLookupDraft"]


class _Free(Draft):
    """A draft that costs nothing beside the positions that are verified."""

    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes.

        Args:
            model: The model.
            rows: B.

        Returns:
            The costs, in seconds.
        """
        return costs_of_round(model, None, rows)


@dataclass(frozen=True)
class PromptLookupDraft(_Free):
    """Drafts what followed the last occurrence of the last few tokens, in the prompt or in what was generated.

    Prompt lookup decoding (Saxena 2023; `prompt_lookup_num_tokens` of transformers, for one row).

    Attributes:
        longest: How many tokens are looked for first; if they are not found, one less, and so on.
        shortest: The least number that is looked for.

    Raises:
        InputError: If they are no whole numbers with 1 ≤ shortest ≤ longest.
    """

    longest: int = 3
    shortest: int = 2

    def __post_init__(self) -> None:
        whole("shortest", self.shortest, "of tokens", least=1)
        whole("longest", self.longest, "of tokens", least=self.shortest)

    def begin(self, start: DraftContext) -> Drafter:
        """Begin a generation.

        Args:
            start: What it begins with.

        Returns:
            The state.
        """
        mask, ids = start.attention_mask, start.input_ids
        padded = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
        if mask is not None:
            padded = (mask[:, mask.shape[1] - ids.shape[1] :].cumsum(1) == 0).sum(1)
        return _Lookup(self, padded)


class _Lookup(Drafter):
    def __init__(self, settings: PromptLookupDraft, padded: torch.Tensor) -> None:
        self._settings = settings
        self._padded = padded  # [B]: where each row's text begins

    def propose(self, count: int, rows: RowProgress, draw: Draw) -> Proposal:
        texts = rows.texts
        ids = texts.upto(max(texts.counts))  # [B, T]
        end = texts.prompts.shape[1] + texts.lengths[:, None]  # [B, 1]
        found = torch.full_like(end, -1)  # where what followed begins
        for size in range(self._settings.shortest, self._settings.longest + 1):  # the longest has the last word
            if ids.shape[1] <= size:
                break
            wanted = ids.gather(1, (end - size + torch.arange(size, device=ids.device)).clamp(min=0))
            windows = ids.unfold(1, size, 1)  # [B, T − size + 1, size]
            start = torch.arange(windows.shape[1], device=ids.device)
            inside = (start >= self._padded[:, None]) & (start + size < end)
            hit = (windows == wanted[:, None]).all(-1) & inside
            last_hit = torch.where(hit, start + size, -1).amax(1, keepdim=True)
            found = torch.where(last_hit >= 0, last_hit, found)
        # A text that repeats itself goes on doing so: behind the end it begins again.
        period = (end - found).clamp(min=1)
        column = (found + torch.arange(count, device=ids.device) % period).clamp(min=0)
        drafted = torch.where(found >= 0, ids.gather(1, column), -1)
        # Waits for this lookup, and saves a pass over drafts that no row has.
        return Proposal(drafted if bool((found >= 0).any()) else drafted[:, :0])


@dataclass(frozen=True, eq=False)
class BigramDraft(_Free):
    """Drafts with a table: after each token the one that a model finds likeliest after it, without any other context.

    The model-derived bigrams of Stewart et al. 2024 (The N-Grammys, arXiv 2411.03786). `BigramDraft.of` makes the table
    from the base's own weights.

    Attributes:
        following: `[N]`, int64: the token after each token; −1 for none.

    Raises:
        InputError: If it is no such table.
    """

    following: torch.Tensor

    def __post_init__(self) -> None:
        table = self.following
        if table.ndim != 1 or table.dtype != torch.int64 or not len(table) or int(table.max()) >= len(table):
            raise InputError.of(
                "following",
                expected="[N], int64, ids below N, −1 for none",
                got=f"shape {list(table.shape)}, {table.dtype}",
                remedy="Make it with BigramDraft.of(model.base).",
            )

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, *, bos_token_id: int | None = None, rows: int = 256) -> BigramDraft:
        """Ask a model for the likeliest token after every token: one pass over each, some seconds for a small one.

        Args:
            model: A causal LM, such as a composed model's base.
            bos_token_id: What stands before each token; None for nothing.
            rows: How many tokens go through the model at once.

        Returns:
            The draft.

        Raises:
            InputError: If a number is not one.
        """
        whole("rows", rows, least=1)
        device = model.get_input_embeddings().weight.device
        ids = torch.arange(embedding_rows(model), device=device)[:, None]
        if bos_token_id is not None:
            ids = torch.cat([torch.full_like(ids, whole("bos_token_id", bos_token_id)), ids], 1)
        found = [
            model(input_ids=part, use_cache=False).logits[:, -1, : len(ids)].argmax(-1) for part in ids.split(rows)
        ]
        return cls(torch.cat(found))

    def begin(self, start: DraftContext) -> Drafter:
        """Begin a generation.

        Args:
            start: What it begins with.

        Returns:
            The state.
        """
        table = self.following[: start.usable].to(start.input_ids.device)
        return _Table(table.masked_fill(table >= start.usable, -1))


class _Table(Drafter):
    def __init__(self, following: torch.Tensor) -> None:
        self._following = following

    def propose(self, count: int, rows: RowProgress, draw: Draw) -> Proposal:
        token, drafted = rows.texts.last(), []
        for _ in range(count):
            known = (token >= 0) & (token < len(self._following))
            token = torch.where(known, self._following[token.clamp(0, len(self._following) - 1)], -1)
            drafted.append(token)
        return Proposal(torch.cat(drafted, 1))
