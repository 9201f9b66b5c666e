"""The pass that looks at all of a round's drafts at once: of all members that have not seen them yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.decoding.columns import Columns
from proxytune.member import Member
from proxytune.model import ProxyTunedModel

__all__ = ["Verifying"]


class Verifying:
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

    def __call__(
        self, input_ids: torch.Tensor, columns: Columns, known: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run the members.

        Args:
            input_ids: `[B, N]`, int64: the last token and the drafts.
            columns: What the cache holds.
            known: Role → `[B, J, V_i]`: what members have already said about the first J of them.

        Returns:
            Raw logits of each member, `[B, N, V_i]`.
        """
        new = input_ids.shape[1]
        mask, positions = columns.mask(new), columns.positions(new)
        if not self._composed:
            base = self._members[0]
            return [base.forward(input_ids, attention_mask=mask, position_ids=positions, cache=self._cache)]
        outputs = self._model(
            input_ids=input_ids,
            past_key_values=self._cache,
            is_first_iteration=False,
            combine=False,
            known=known,
            return_dict=True,
            attention_mask=mask,
            position_ids=positions,
        )
        return list(outputs.member_logits)
