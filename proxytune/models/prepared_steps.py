"""The decode steps of a `generate()` that were prepared after an earlier pass, or are one compiled graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.models.combined_logits import CombinedLogitsMixin
from proxytune.models.generation_mixin import MemberOutput
from proxytune.models.lazy import positions_to_keep
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import idle_in
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.decode_step import Steps
from proxytune.models.members.forward import Text
from proxytune.models.members.gated_step import GatedStep
from proxytune.models.members.joint_step import Joined, JointStep, Sum, Tail
from proxytune.models.own_prompts import (
    PROMPT_WIDTH,
    prompt_width_of,
    texts_of_pass,
)
from proxytune.models.weighing import opens

__all__ = ["PreparedStepsMixin"]


class PreparedStepsMixin(CombinedLogitsMixin):
    """The short ways through a forward pass, where nothing has to be looked at."""

    config: Any
    split_threads: bool
    _gated: GatedStep | None
    _joint: JointStep | None
    _steps: Steps
    _thread: SideThread

    def _step(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        options: Mapping[str, Any],
    ) -> CausalLMOutputWithPast | MemberOutput | None:
        """The next decode step of a `generate()`, where one was prepared; None for a pass that has to be looked at."""
        if self._gated is not None and input_ids is not None and self._gated.waits(cache):
            return self._gated_step(Text(input_ids, attention_mask, position_ids), cache, logits_to_keep, options)
        if self._joint is not None and isinstance(cache, StaticCache) and input_ids is not None and self.weighing.plain:
            return self._joint_step(Text(input_ids, attention_mask, position_ids), cache, logits_to_keep, options)
        step = None if torch.compiler.is_compiling() else self._steps.on(cache)
        if step is None or input_ids is None or not step.follows(cache, input_ids, attention_mask):
            return None
        if not _asks_nothing_new(Text(input_ids, attention_mask, position_ids), logits_to_keep, options):
            return None
        away = step.lazy or step.idle <= {*self.weighing.idle}
        if not away or torch.is_grad_enabled():
            return None
        past = step.length
        assert past is not None
        width = prompt_width_of(cache, past, options.get(PROMPT_WIDTH))
        generated = self._generated(past, 1, width, logits_to_keep)
        if step.lazy:
            kept = positions_to_keep(position_ids, input_ids, past)
            texts_of_pass(self.members, None, input_ids, attention_mask, past, cache, kept)
        members = step(
            input_ids,
            attention_mask,
            position_ids,
            sides=self._sides if self.overlap else None,
            thread=self._thread if self.split_threads else None,
        )
        opened = None
        if step.lazy:
            assert cache is not None
            opened, members = self._companions_of_pass(members[0], cache, logits_to_keep, 1)
        if options.get("return_member_logits"):
            return MemberOutput(cache, members, generated, opened)
        return CausalLMOutputWithPast(logits=self._combined(members, generated, opened), **{CACHE: cache})

    def _joint_step(
        self, text: Text, cache: Cache, logits_to_keep: int | torch.Tensor, options: Mapping[str, Any]
    ) -> CausalLMOutputWithPast | MemberOutput | None:
        """The next step in one graph, if the last one on this cache was one."""
        if not _asks_nothing_new(text, logits_to_keep, options):
            return None
        assert self._joint is not None
        idle = idle_in(cache)
        if not (idle <= {*self.weighing.idle} and self._joint.follows(cache, text, idle)):
            return None
        combine = not options.get("return_member_logits")
        tail = Sum(self.usable_ids) if combine else options.get("decision")
        joined = self._joined(text, cache, idle, {}, tail=tail, asked={})
        if joined is None:
            return None
        if combine:
            return CausalLMOutputWithPast(logits=joined.found, **{CACHE: cache})
        return MemberOutput(cache, joined.logits, decided=joined.found)

    def _gated_step(
        self, text: Text, cache: Cache | None, logits_to_keep: int | torch.Tensor, options: Mapping[str, Any]
    ) -> CausalLMOutputWithPast | MemberOutput | None:
        """The next step over a static cache whose companions wait for a gate, in one graph or two."""
        weighing, gate = self.weighing, self.weighing.gate
        assert self._gated is not None
        assert cache is not None
        if gate is None or not weighing.gated or not _asks_nothing_new(text, logits_to_keep, options):
            return None
        if not idle_in(cache) <= {*weighing.idle}:
            return None
        combine = not options.get("return_member_logits")
        tail = Sum(self.usable_ids) if combine else options.get("decision")
        stepped = self._gated(self.members, text, cache, gate=gate, opens=opens, numbers=weighing.numbers, tail=tail)
        if stepped is None:
            return None
        if combine:
            return CausalLMOutputWithPast(logits=stepped.found, **{CACHE: cache})
        return MemberOutput(cache, stepped.logits, opened=stepped.opened, decided=stepped.found)

    def _joined(
        self,
        text: Text,
        cache: Cache | None,
        idle: Collection[int],
        known: Mapping[str, torch.Tensor],
        *,
        tail: Tail | None,
        asked: Mapping[str, bool],
    ) -> Joined | None:
        """The pass as one graph with its `tail`, if it can be; `asked` says what of the pass a graph cannot do.

        `known` are the logits of members that have run ahead.
        """
        if self._joint is None:
            return None
        ahead = [i for i, member in enumerate(self.members) if member.role in known]
        joined = self._joint(
            self.members,
            self.config.spans,
            text,
            cache,
            numbers=self.weighing.numbers,
            idle=[*idle, *ahead],
            tail=tail if self.weighing.plain else None,
            other=next((name for name, wanted in asked.items() if wanted), None),
        )
        if joined is not None:
            for i in ahead:
                joined.logits[i] = known[self.members[i].role]
        return joined


def _asks_nothing_new(text: Text, logits_to_keep: int | torch.Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a pass has only options that prepared steps know, and is told its positions if it has a mask."""
    unknown = options.keys() - {"return_member_logits", "every_member", PROMPT_WIDTH, "decision"}
    told = text.position_ids is not None or text.attention_mask is None
    return told and not (unknown or options.get("every_member") or isinstance(logits_to_keep, torch.Tensor))
