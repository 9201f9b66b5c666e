"""Drafts without a model: a lookup of the last tokens in the text so far, and a table of bigrams.

Each proposed token counts as certain (q = 1), so it is accepted with the target's probability of it, p.
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
from proxytune.models.members.embedding_table import device_of, embedding_rows
from proxytune.validation import whole

__all__ = ["BigramDraft", "PromptLookupDraft"]


class _Free(Draft):
    """A draft that costs nothing beside the positions that are verified."""

    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, in seconds: the target's pass alone."""
        return costs_of_round(model, None, rows)


@dataclass(frozen=True)
class PromptLookupDraft(_Free):
    """Drafts what followed the last occurrence of the last few tokens, in the prompt or in the generated text.

    Prompt lookup decoding (Saxena 2023; `prompt_lookup_num_tokens` of transformers, for one row).

    Attributes:
        longest: Length of the n-gram to search for first; if it does not occur, one less, and so on.
        shortest: Length of the shortest n-gram to search for.

    Raises:
        InputError: Unless both are whole numbers with 1 ≤ shortest ≤ longest.
    """

    longest: int = 3
    shortest: int = 2

    def __post_init__(self) -> None:
        remedy = "Pass e.g. PromptLookupDraft(longest=3, shortest=2)."
        object.__setattr__(self, "shortest", whole("shortest", self.shortest, least=1, remedy=remedy))
        object.__setattr__(self, "longest", whole("longest", self.longest, least=self.shortest, remedy=remedy))

    def begin(self, start: DraftContext) -> Drafter:
        """Start drafting for one generation."""
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
        follows = torch.full_like(end, -1)  # where the continuation begins; −1 for no hit
        for size in range(self._settings.shortest, self._settings.longest + 1):  # a longer match replaces a shorter one
            if ids.shape[1] <= size:
                break
            ngram = ids.gather(1, (end - size + torch.arange(size, device=ids.device)).clamp(min=0))
            windows = ids.unfold(1, size, 1)  # [B, T − size + 1, size]
            start = torch.arange(windows.shape[1], device=ids.device)
            inside = (start >= self._padded[:, None]) & (start + size < end)
            hit = (windows == ngram[:, None]).all(-1) & inside
            last_hit = torch.where(hit, start + size, -1).amax(1, keepdim=True)
            follows = torch.where(last_hit >= 0, last_hit, follows)
        # A continuation that reaches the text's end is repeated from its own beginning.
        period = (end - follows).clamp(min=1)
        column = (follows + torch.arange(count, device=ids.device) % period).clamp(min=0)
        drafted = torch.where(follows >= 0, ids.gather(1, column), -1)
        # Waits for the device, but saves a verification pass if no row has a draft.
        return Proposal(drafted if bool((follows >= 0).any()) else drafted[:, :0])


@dataclass(frozen=True, eq=False)
class BigramDraft(_Free):
    """Drafts with a table: for each token, the one a model finds likeliest after it without other context.

    The model-derived bigrams of Stewart et al. 2024 (The N-Grammys, arXiv 2411.03786). `BigramDraft.of` computes the
    table from a model.

    Attributes:
        following: `[N]`, int64: the token after each token, below N; −1 for none.

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
        """Compute the table with a model: one short pass per token of the vocabulary, some seconds for a small model.

        Args:
            model: A causal LM, such as a composed model's base.
            bos_token_id: The token to put before each; None for none.
            rows: Batch size of the passes.

        Raises:
            InputError: If `rows` or `bos_token_id` is not a whole number.
        """
        whole("rows", rows, "of rows", least=1, remedy="Pass e.g. rows=256.")
        ids = torch.arange(embedding_rows(model), device=device_of(model))[:, None]
        if bos_token_id is not None:
            ids = torch.cat([torch.full_like(ids, whole("bos_token_id", bos_token_id)), ids], 1)
        likeliest = [
            model(input_ids=part, use_cache=False).logits[:, -1, : len(ids)].argmax(-1) for part in ids.split(rows)
        ]
        return cls(torch.cat(likeliest))

    def begin(self, start: DraftContext) -> Drafter:
        """Start drafting for one generation."""
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
