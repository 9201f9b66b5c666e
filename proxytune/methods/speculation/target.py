"""The pass that looks at all of a round's drafts at once: of all members that have not seen them yet."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.methods.speculation.drafts import Drafter
from proxytune.methods.speculation.ragged_cache import RaggedCache
from proxytune.models.members.composite_cache import view
from proxytune.models.members.member import Member
from proxytune.models.model import ProxyTunedModel

__all__ = ["TargetModel"]


class TargetModel:
    """The steered model, or a plain one, over the tokens behind what its cache holds."""

    def __init__(self, model: Any, cache: Cache) -> None:
        """Keep what all rounds share.

        Args:
            model: The composed model, or a plain causal LM.
            cache: Its cache, which is extended in place.

        Raises:
            UnsupportedModelError: If a plain model has other than attention layers.
        """
        self._model = model
        self._cache = cache
        self._composed = isinstance(model, ProxyTunedModel)
        self._members = model.members if self._composed else [Member(model, "base")]

    def room(self, width: int) -> int:
        """How many drafted tokens fit into every member's context, behind one token that is not drafted.

        Args:
            width: How many columns the cache has.

        Returns:
            At least 0.
        """
        contexts = [member.context for member in self._members if member.context is not None]
        return max(0, min(contexts) - width - 1) if contexts else 1 << 30

    def caches(self, drafter: Drafter, new: int) -> list[tuple[Cache, int]]:
        """All caches, and how many columns they hold beyond what is settled.

        Args:
            drafter: The draft, with caches of its own or a part of the composite one.
            new: How many columns the verifying pass has added.

        Returns:
            Caches with the same columns each.
        """
        own = [(cache, drafter.added) for cache in drafter.caches]
        if drafter.role is None:
            return [(self._cache, new), *own]
        spans = zip(self._members, self._model.config.spans, strict=True)
        return [(view(self._cache, *span), new) for member, span in spans if member.role != drafter.role] + own

    def finished(self, members: list[torch.Tensor], drafter: Drafter, behind: torch.Tensor) -> list[torch.Tensor]:
        """The members' logits, after the draft has run over its last token too.

        Args:
            members: What `__call__` returned.
            drafter: The draft.
            behind: `[B, 1, V_q]`: what it says about the token behind.

        Returns:
            Raw logits of each member, `[B, N, V_i]`.
        """
        return [
            torch.cat([z[:, :-1], behind], 1) if member.role == drafter.role else z
            for member, z in zip(self._members, members, strict=True)
        ]

    def __call__(self, input_ids: torch.Tensor, columns: RaggedCache, drafter: Drafter) -> list[torch.Tensor]:
        """Run the members.

        Args:
            input_ids: `[B, N]`, int64: the last token and the drafts.
            columns: What the cache holds.
            drafter: The draft. If it is a member, it has said all but what comes after the last token.

        Returns:
            Raw logits of each member, `[B, N, V_i]`. Of a member that drafts, the last position is a stand-in: who
            comes that far needs `finished`.
        """
        new = input_ids.shape[1]
        mask, positions = columns.mask(new), columns.positions(new)
        if not self._composed:
            base = self._members[0]
            return [base.forward(input_ids, attention_mask=mask, position_ids=positions, cache=self._cache)]
        said = drafter.known()  # [B, N − 1, V_i]
        outputs = self._model(
            input_ids=input_ids,
            past_key_values=self._cache,
            is_first_iteration=False,
            combine=False,
            known={} if said is None else {drafter.role: said},
            return_dict=True,
            attention_mask=mask,
            position_ids=positions,
        )
        logits = list(outputs.member_logits)
        return logits if said is None else self.finished([_longer(z, new) for z in logits], drafter, said[:, -1:])


def _longer(logits: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, N, V]` at least so long; the last position again where it is shorter."""
    return logits if logits.shape[1] == length else torch.cat([logits, logits[:, -1:]], 1)
