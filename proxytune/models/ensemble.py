"""Any causal LM, composed or plain, as members and weights: all that a loop needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from proxytune.models.members.composite_cache import view
from proxytune.models.members.long_rope import switch_of, switches_of
from proxytune.models.members.member import Member
from proxytune.models.members.text_layer import text_layer_of
from proxytune.models.model import ProxyTunedModel
from proxytune.models.weighing import Weighing
from proxytune.ops.combination import Weights

__all__ = ["Ensemble", "Shown"]


class Shown(NamedTuple):
    """The last position of a pass: raw logits `[B, V_i]` of each member, None for one that did not run; the gate."""

    rows: list[torch.Tensor | None]
    opened: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Ensemble:
    """A model's members and what their formula makes of them; a plain model is its own only member.

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
    def weighing(self) -> Weighing | None:
        """What the formula makes of the members' rows; None for a plain model."""
        return self.model.weighing if self.composed else None

    def weighing_of(self, formula: Any) -> Weighing:
        """What another formula over the same roles makes of the members' rows; KeyError for another role."""
        return Weighing(formula, self.model._index)

    @property
    def alpha(self) -> Any:
        """Strength α of the shift, a number or a schedule; None for a plain model."""
        return self.model.alpha if self.composed else None

    def usable(self, width: int) -> int:
        """How many of the base's `width` ids can be drawn: those that all members can embed."""
        return min(width, int(self.model.usable_ids)) if self.composed else width

    def request(self, *, everyone: bool = False) -> dict[str, Any]:
        """Keyword arguments for `forward` to return the members' own logits.

        `everyone` says that companions run although their weight is 0, or a gate is shut: one of them drafts.
        """
        return {"return_member_logits": True, "every_member": everyone or None} if self.composed else {}

    def logits(self, outputs: Any) -> list[torch.Tensor | None]:
        """Each member's raw logits, `[B, K, V_i]`, from a pass called with `request()`; None if it did not run."""
        return list(outputs.member_logits) if self.composed else [outputs.logits]

    def last_logits(self, outputs: Any) -> list[torch.Tensor | None]:
        """Each member's raw logits at the last position, `[B, V_i]`."""
        # A view of one position, but a copy from a whole prompt's logits, so that these can be freed.
        return [z if z is None else z[:, -1] if z.shape[1] == 1 else z[:, -1].clone() for z in self.logits(outputs)]

    def last_rows(self, outputs: Any) -> tuple[list[torch.Tensor], Weights]:
        """The rows `[B, V_i]` at the last position of the members that ran, and their weights for `ops.step`."""
        rows = self.last_logits(outputs)
        generated, opened = (getattr(outputs, name, None) for name in ("generated", "opened"))
        return self.weigh(rows, *(None if x is None else x[:, -1] for x in (generated, opened)))

    def shown(self, outputs: Any) -> Shown:
        """What a recording keeps of a pass: all members' last rows, and where the gate was open."""
        rows, opened = self.last_logits(outputs), getattr(outputs, "opened", None)
        opened = None if opened is None else opened[:, -1]
        if opened is None and self.weighing is not None and self.weighing.gate is not None and rows[0] is not None:
            opened = self.weighing.open(rows[0])
        return Shown(rows, opened)

    def weigh(
        self,
        rows: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], Weights]:
        """Members' whole rows `[N, V_i]` and their weights.

        `generated` is `[N]`, the tokens generated before; `opened` is `[N]`, where the gate is known to be open.
        """
        if self.weighing is None:
            return [x for x in rows if x is not None], (1.0,)
        if generated is not None and rows[0] is not None:
            generated = generated.expand(len(rows[0]))
        return self.weighing(rows, generated, opened)

    def views(self, cache: Cache) -> list[tuple[str, Cache]]:
        """Role and part of the cache of each member; and, where it holds texts as well, of these (role "")."""
        if not self.composed:
            return [("base", cache)]
        spans = zip(self.model.members, self.model.config.spans, strict=True)
        parts = [(member.role, view(cache, *span)) for member, span in spans]
        count = len(cache.layers)
        return parts if text_layer_of(cache) is None else [*parts, ("", view(cache, count - 1, count))]
