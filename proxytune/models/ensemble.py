"""Any causal LM, composed or plain, as members and weights: all that a loop needs of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.models.members.composite_cache import view
from proxytune.models.members.long_rope import switch_of, switches_of
from proxytune.models.members.member import Member
from proxytune.models.model import ProxyTunedModel

__all__ = ["Ensemble"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """A model's members and their weights; a plain model is its own only member.

    Attributes:
        model: The model.
        composed: Whether it is a `ProxyTunedModel`.
    """

    model: Any
    composed: bool

    @classmethod
    def of(cls, model: Any) -> Ensemble:
        """Wrap a `ProxyTunedModel` or any other causal LM."""
        return cls(model, isinstance(model, ProxyTunedModel))

    @property
    def models(self) -> list[tuple[str, Any]]:
        """Role and model of each member, the base first."""
        return [(m.role, m.model) for m in self.model.members] if self.composed else [("base", self.model)]

    @property
    def members(self) -> list[Member]:
        """The members; UnsupportedModelError if a plain model cannot be one."""
        if self.composed:
            return list(self.model.members)
        member = Member(self.model, "base")
        if member.stateful:  # whether it takes several tokens at once
            member.examine()
        return [member]

    @property
    def switches(self) -> dict[str, int]:
        """Role → switch of the long-rope members (`proxytune.models.members.long_rope`)."""
        if self.composed:
            return switches_of(self.model.members)
        switch = switch_of(self.model)
        return {} if switch is None else {"base": switch}

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per member; the base's is 1."""
        return (1.0, *self.model.formula.weights()) if self.composed else (1.0,)

    @property
    def alpha(self) -> float | None:
        """Strength α of the shift; None for a plain model."""
        return float(self.model.alpha) if self.composed else None

    def usable(self, width: int) -> int:
        """How many of the base's `width` ids can be drawn: those that all members can embed."""
        return min(width, int(self.model.usable_ids)) if self.composed else width

    def request(self) -> dict[str, Any]:
        """Keyword arguments for `forward` to return the members' own logits."""
        return {"return_member_logits": True} if self.composed else {}

    def logits(self, outputs: Any) -> list[torch.Tensor]:
        """Each member's raw logits, `[B, K, V_i]`, from a forward pass called with `request()`."""
        return list(outputs.member_logits) if self.composed else [outputs.logits]

    def last_logits(self, outputs: Any) -> list[torch.Tensor]:
        """Each member's raw logits at the last position, `[B, V_i]`."""
        # A view of one position, but a copy from a whole prompt's logits, so that these can be freed.
        return [z[:, -1] if z.shape[1] == 1 else z[:, -1].clone() for z in self.logits(outputs)]

    def views(self, cache: Cache) -> list[tuple[str, Cache]]:
        """Role and part of the cache of each member."""
        if not self.composed:
            return [("base", cache)]
        spans = zip(self.model.members, self.model.config.spans, strict=True)
        return [(member.role, view(cache, *span)) for member, span in spans]
