"""From the members' logits to one row: the formula at each position, and the gate that lets companions run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.models.lazy import asked, can_wait
from proxytune.models.members.cuda_streams import CompanionStreams
from proxytune.models.members.fingerprint import Fingerprint
from proxytune.models.members.member import Member
from proxytune.models.members.stateful_pass import kept_logits
from proxytune.models.weighing import Weighing

__all__ = ["CombinedLogitsMixin", "showing"]

_SHOWN: ContextVar[tuple[Any, Callable[..., None]] | None] = ContextVar("proxytune_shown", default=None)


@contextmanager
def showing(model: Any, watch: Callable[..., None]) -> Iterator[None]:
    """Show `watch` (`proxytune.generation.call_log`) the rows of each pass of a model in this thread."""
    before = _SHOWN.set((model, watch))
    try:
        yield
    finally:
        _SHOWN.reset(before)


class CombinedLogitsMixin:
    """What a composed model makes of its members' logits."""

    device: torch.device
    members: list[Member]
    weighing: Weighing
    overlap: bool
    _fingerprints: dict[str, Fingerprint]
    _sides: CompanionStreams

    @property
    def usable_ids(self) -> int:
        """How many ids every member can embed; the logits of higher ids are −inf."""
        return min(m.rows for m in self.members)

    @property
    def _models(self) -> dict[str, Any]:
        return {m.role: m.model for m in self.members}

    def _may_wait(self, cache: Cache) -> bool:
        """Whether a cache that is still empty is to be laid out for companions that wait for a gate."""
        gated = self.weighing.gate is not None and any(self.weighing.needed[1:])
        return gated and can_wait(cache) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _companions_of_pass(
        self, base: torch.Tensor | None, cache: Cache, logits_to_keep: int | torch.Tensor, new: int
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Where the gate is open, `[B, K]` (None without one), and all members' logits; waits for the device."""
        assert base is not None
        gated = self.weighing.gate is not None
        opened = self.weighing.open(base.flatten(0, 1)).view(base.shape[:2]) if gated else None
        if not any(self.weighing.needed[1:]) or (opened is not None and not bool(opened.any())):
            return opened, [base, *([None] * (len(self.members) - 1))]
        sides = self._sides if self.overlap else None
        return opened, [base, *asked(self.members, self.weighing.needed, cache, logits_to_keep, new, sides)]

    def _generated(
        self, past: int | torch.Tensor, new: int, prompt_width: int | None, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor | None:
        """How many tokens were generated before each kept position, `[1, K]`, int64; None without schedules."""
        if not self.weighing.scheduled:
            return None
        width = (past + new) if prompt_width is None else prompt_width
        column = past + torch.arange(new, device=self.device)
        return kept_logits((column - (width - 1)).clamp(min=0)[None], logits_to_keep)

    def _combined(
        self,
        members: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The combined logits `[B, K, V]`, float32; −inf for ids that some member cannot embed."""
        if generated is not None and members[0] is not None:
            generated = generated.expand(len(members[0]), -1)
        if not torch.compiler.is_compiling() and (shown := _SHOWN.get()) is not None and shown[0] is self:
            self._show(shown[1], members, generated, opened)
        logits = self.weighing.combined(members, generated, opened)
        if logits.shape[-1] > (usable := self.usable_ids):
            logits[..., usable:] = -torch.inf
        return logits

    def _show(
        self,
        watch: Callable[..., None],
        members: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None,
        opened: torch.Tensor | None,
    ) -> None:
        """Show the last position's rows."""
        rows = [None if x is None else x[:, -1] for x in members]
        of_row = [None if x is None else x[:, -1] for x in (generated, opened)]
        gate = of_row[1]
        if gate is None and self.weighing.gate is not None and rows[0] is not None:
            gate = self.weighing.open(rows[0])
        watch(rows, partial(self.weighing, rows, *of_row), usable=self.usable_ids, opened=gate)
