"""Drafts by a model: the composed model's own expert, or any other causal LM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from proxytune.costs.devices import Work, draft_costs, machine_of
from proxytune.costs.model_size import pass_work
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import InputError
from proxytune.methods.speculation.drafts import Draft, DraftContext, Drafter, Draw
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_cache import record
from proxytune.methods.speculation.round import Proposal
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.innermost import innermost
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import length_of
from proxytune.models.members.text_checks import check_ids

__all__ = ["ExpertDraft", "ModelDraft"]


def costs_of_round(model: Any, draft: Any, rows: int, *, role: str | None = None) -> DraftCosts:
    """What a round takes, in seconds, by the figures of `proxytune.costs.devices`.

    `draft` is None for a draft without a model. `role` names the member that drafts on the composite cache (the same
    model may have two roles); None for a draft with a cache of its own, or with none.
    """
    members = Ensemble.of(model).models
    verifying = _passes([one for name, one in members if name != role])
    drafting = None if draft is None else pass_work(draft)
    plain = _passes([one for _, one in members])
    machine = machine_of(members[0][1].device.type)
    return draft_costs(machine, verifying, drafting, rows, member=role is not None, plain=plain)


def _passes(models: Sequence[Any]) -> list[Work]:
    """The passes of members in one step: those that are one model take one together."""
    groups: dict[int, list[Any]] = {}
    for model in models:
        groups.setdefault(id(innermost(model)), []).append(model)
    return [pass_work(*group) for group in groups.values()]


Forward = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""From ids `[B, 1]`, mask and positions to logits `[B, 1, V_q]`; extends a cache."""


class _ModelDrafter(Drafter):
    """Drafts with a model: one pass per token, each on the one before."""

    def __init__(self, forward: Forward, usable: int) -> None:
        self._forward = forward
        self._usable = usable
        self._last = torch.empty(0)

    def propose(self, count: int, rows: RowProgress, draw: Draw) -> Proposal:
        token, drawn_from = rows.texts.last(), []
        drafted = token[:, :0]
        for ahead in range(count):
            logits = self._forward(token, rows.columns.mask(ahead + 1), rows.columns.positions(1, ahead))
            self._keep(logits)
            tokens, row = draw(logits[:, -1, : self._usable], drafted)
            drawn_from.append(row)
            token = tokens.clamp(min=0)[:, None]  # a −1 (no distribution) is never accepted
            drafted = torch.cat([drafted, tokens[:, None]], 1)
        self._last, self.added = token, count
        return Proposal(drafted, torch.stack(drawn_from, 1).flatten(0, 1))

    def read_last(self, rows: RowProgress) -> torch.Tensor | None:
        ahead, self.added = self.added, self.added + 1
        return self._forward(self._last, rows.columns.mask(ahead + 1), rows.columns.positions(1, ahead))

    def _keep(self, logits: torch.Tensor) -> None:
        pass


class _OwnExpert(_ModelDrafter):
    """The composed model's expert, which runs ahead of the other members on its own layers of the composite cache."""

    def __init__(self, start: DraftContext) -> None:
        self.role = "expert"
        ensemble = Ensemble.of(start.model)
        (member,) = [each for each in ensemble.members if each.role == self.role]
        part = dict(ensemble.views(start.cache))[self.role]

        def forward(ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
            return member.forward(ids, attention_mask=mask, position_ids=positions, cache=part)

        super().__init__(forward, start.usable)
        self.caches = (part,)
        self._logits: list[torch.Tensor] = []

    def _keep(self, logits: torch.Tensor) -> None:
        self._logits.append(logits)

    def precomputed(self) -> torch.Tensor | None:
        kept, self._logits = self._logits, []
        return torch.cat(kept, 1) if kept else None


@dataclass(frozen=True)
class ExpertDraft(Draft):
    """The composed model's own expert drafts: it has to run anyway, and hands its logits to the target's pass."""

    def begin(self, start: DraftContext) -> Drafter:
        """Start drafting for one generation; InputError if the model is not a composed one."""
        self._refuse(start.model)
        return _OwnExpert(start)

    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, in seconds; InputError if the model is not a composed one."""
        self._refuse(model)
        return costs_of_round(model, model.expert, rows, role="expert")

    @staticmethod
    def _refuse(model: Any) -> None:
        if not Ensemble.of(model).composed:
            raise InputError.of(
                "draft='expert'",
                expected="a composed model, made by proxytune.wrap",
                got=f"a {type(model).__name__}, which has no expert",
                remedy="Pass another draft, such as ModelDraft(small_model) or PromptLookupDraft().",
            )
        own = [member for member in Ensemble.of(model).members if member.role == "expert"]
        if not own or own[0].own_prompt:
            raise InputError.of(
                "draft",
                expected="a draft of another kind for a formula without an expert that reads the base's prompt",
                got=f"'expert' and members {', '.join(member.role for member in model.members)}",
                remedy="Pass SpeculativeDecoding(draft=PromptLookupDraft()), or draft=ModelDraft(model).",
            )


class _OtherModel(_ModelDrafter):
    """A model outside the composition, with a cache of its own."""

    def __init__(self, member: Member, start: DraftContext) -> None:
        ids, mask = start.input_ids, start.attention_mask
        if length_of(start.cache) != ids.shape[1] or (mask is not None and mask.shape != ids.shape):
            raise InputError.of(
                "input_ids",
                expected="the ids of the whole text, for a draft with a cache of its own",
                got=f"{ids.shape[1]} ids, beside a cache that holds {length_of(start.cache)} tokens",
                remedy=f"Pass the ids of the whole text together with {CACHE}.",
            )
        check_ids(ids.clamp(max=member.rows - 1), [member])
        if len(ids) > 1:
            member.refuse_moved_rows()
        self._context = member.context
        cache = empty_cache(member.config)
        positions = None if mask is None else positions_of(mask)
        # Only the cache is needed of the prompt's pass.
        known = ids.clamp(max=member.rows - 1)
        member.forward(known, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=1)
        record(cache)
        self.caches = (cache,)

        def forward(ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
            # Ids without an embedding are read as its last id: that makes the drafts worse, not wrong.
            known = ids.clamp(max=member.rows - 1)
            logits = member.forward(known, attention_mask=mask, position_ids=positions, cache=cache)
            return logits.to(start.input_ids.device)

        super().__init__(forward, min(start.usable, member.rows))

    def room(self, width: int) -> int:
        left = 1 << 30 if self._context is None else self._context - width - 1
        if left < 0:
            self.caches = ()  # its context is full: no more drafts in this generation
        return max(0, left) if self.caches else 0

    def skip(self, rows: RowProgress) -> None:
        super().skip(rows)
        if self.caches:
            self._forward(rows.texts.last(), rows.columns.mask(1), rows.columns.positions(1))


class ModelDraft(Draft):
    """A third causal LM drafts, with a cache of its own.

    Attributes:
        model: The causal LM. It needs the steered model's tokenizer; its head may be wider or narrower.
    """

    def __init__(self, model: Any) -> None:
        """Check that the model can draft.

        Args:
            model: A decoder-only causal LM with attention layers only.

        Raises:
            UnsupportedModelError: If it is not one.
        """
        self.model = model
        self._member = Member(model, "draft")

    def begin(self, start: DraftContext) -> Drafter:
        """Read the prompts with the draft model.

        Args:
            start: The model, its cache and the prompts.

        Raises:
            InputError: If the prompts are not the whole text, or too long for the draft model.
        """
        return _OtherModel(self._member, start)

    def costs(self, model: Any, rows: int) -> DraftCosts:
        """What a round takes, in seconds."""
        return costs_of_round(model, self.model, rows)
