"""The target's pass over a round's draft tokens, by all members that have not read them yet."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from proxytune.methods.speculation.drafts import Drafter
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.round import Proposal
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.ragged_static import rows_of

__all__ = ["TargetModel"]


class TargetModel:
    """The steered model, or a plain one, over tokens that its cache does not hold yet.

    Attributes:
        added: How many columns of its cache are not committed yet.
    """

    def __init__(self, ensemble: Ensemble, cache: Cache, adapter_names: list[str] | None = None) -> None:
        self.added = 0
        self._adapter_names = adapter_names  # of a composed model's base, one per row
        self._ensemble = ensemble
        self._members = ensemble.members
        self._cache = cache

    def room(self, width: int) -> int:
        """How many draft tokens fit into every member's context, after `width` columns and one more token."""
        contexts = [member.context for member in self._members if member.context is not None]
        return max(0, min(contexts) - width - 1) if contexts else 1 << 30

    def caches(self, drafter: Drafter) -> list[tuple[Cache, int]]:
        """All caches, the draft's included, each with its number of uncommitted columns."""
        own = [(cache, drafter.added) for cache in drafter.caches]
        if drafter.role is None and rows_of(self._cache) is None:
            return [(self._cache, self.added), *own]
        views = self._ensemble.views(self._cache)
        return [(part, self.added) for role, part in views if role != drafter.role] + own

    def __call__(self, proposal: Proposal, rows: RowProgress, drafter: Drafter) -> list[torch.Tensor]:
        """Run the members over each row's last token and its draft; a member that drafts does not run again.

        Returns:
            Raw logits of each member, `[B, K + 1, V_i]`. The drafting member has not read the last draft token: its
            last position is a placeholder, which `with_last` replaces.
        """
        ids = torch.cat([rows.texts.last(), proposal.tokens.clamp(min=0)], 1)
        new = self.added = ids.shape[1]
        mask, positions = rows.columns.mask(new), rows.columns.positions(new)
        if not self._ensemble.composed:
            base = self._members[0]
            return [base.forward(ids, attention_mask=mask, position_ids=positions, cache=self._cache)]
        ahead = drafter.precomputed()  # [B, K, V_i]
        outputs = self._ensemble.model(
            input_ids=ids,
            **{CACHE: self._cache},
            is_first_iteration=False,
            precomputed_logits={} if ahead is None else {drafter.role: ahead},
            return_dict=True,
            attention_mask=mask,
            position_ids=positions,
            adapter_names=self._adapter_names,
            **self._ensemble.request(everyone=True),
        )
        logits = self._ensemble.logits(outputs)
        # The drafting member has logits for K positions: a placeholder fills the last one.
        return [z if z.shape[1] == new else torch.cat([z, z[:, -1:]], 1) for z in logits if z is not None]

    def with_last(self, logits: list[torch.Tensor], drafter: Drafter, last: torch.Tensor) -> list[torch.Tensor]:
        """Set the drafting member's last position to `last` `[B, 1, V_i]`, the logits after the last draft token."""
        return [
            torch.cat([z[:, :-1], last], 1) if member.role == drafter.role else z
            for member, z in zip(self._members, logits, strict=True)
        ]
