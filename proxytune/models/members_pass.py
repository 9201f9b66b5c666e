"""A pass of all members over the tokens that follow the cache: checked, run, noted on the cache, combined."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.models.adapter_names import adapters_of_rows, refuse_leftover
from proxytune.models.chunked_forward import forward_in_parts, needs_whole, part_length
from proxytune.models.forward_checks import (
    refuse_mask_of_other_text,
)
from proxytune.models.generation_mixin import MemberOutput
from proxytune.models.lazy import positions_to_keep
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import idle_in, is_lazy, note_members, refuse_outdated
from proxytune.models.members.decode_step import traceless_at
from proxytune.models.members.forward import LatentInputs, Text, run_members
from proxytune.models.members.joint_step import Joined, Sum, Tail
from proxytune.models.members.long_rope import note_side, side_of_pass, switches_of
from proxytune.models.members.masks import positions_of
from proxytune.models.members.rewind import length_of
from proxytune.models.members.text_checks import check_ids
from proxytune.models.own_prompts import (
    PROMPT_WIDTH,
    PROMPTS,
    OwnPrompts,
    note_prompt_width,
    prompt_width_of,
    roles_with_prompts,
    texts_of_pass,
)
from proxytune.models.prepared_steps import PreparedStepsMixin

__all__ = ["MembersPassMixin"]


@dataclass(eq=False)
class _Pass:
    """What a pass is asked for; the names are those of `_forward_members`."""

    text: Text
    cache: Cache | None
    logits_to_keep: int | torch.Tensor
    labels: torch.Tensor | None
    first: bool | None
    adapter_names: list[str] | None
    combine: bool
    known: Mapping[str, torch.Tensor] | None
    latent: LatentInputs
    everyone: bool
    prompt_width: int | None
    own_prompts: OwnPrompts | None
    decision: Tail | None

    @property
    def new(self) -> int:
        """How many tokens it runs over."""
        return self.text.input_ids.shape[1]

    @property
    def follows(self) -> bool:
        """Whether all that runs runs over the ids, with no logits at hand."""
        return not self.everyone and self.known is None and not any(self.latent)

    @property
    def may_be_traceless(self) -> bool:
        """Whether it is a prompt of `generate()` that no one but the members looks into."""
        return bool(self.first) and self.follows and self.adapter_names is None


class MembersPassMixin(PreparedStepsMixin):
    """A pass that looks at everything: the first of a generation, and whatever no prepared step serves."""

    base: Any
    forward: Any
    _adopt: Any

    def _forward_members(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int | torch.Tensor,
        labels: torch.Tensor | None,
        is_first_iteration: bool | None,
        *,
        adapter_names: list[str] | None = None,
        return_member_logits: bool = False,
        precomputed_logits: Mapping[str, torch.Tensor] | None = None,
        latent_inputs: LatentInputs | None = None,
        every_member: bool | None = None,
        prompt_width: int | None = None,
        own_prompts: OwnPrompts | None = None,
        decision: Tail | None = None,
    ) -> CausalLMOutputWithPast | MemberOutput:
        """`forward` with the options of the package's own loops.

        `return_member_logits` returns a `MemberOutput`; `precomputed_logits` holds, by role, the logits of the first of
        these tokens for members that have already run over them; `latent_inputs` is what each member takes in place of
        ids; `every_member` lets those of weight 0 run as well; `prompt_width` says how many columns are the prompt;
        `own_prompts` are the prompts of members that read their own; `decision` is what a joint step is to end in.
        """
        if self.weighing.gate is not None:
            self.weighing.gate.refuse_uncalibrated()
        # As in transformers, a given cache is always used: it holds a part of the prefix.
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        one = _Pass(
            Text(input_ids, attention_mask, position_ids),
            cache,
            logits_to_keep,
            labels,
            is_first_iteration,
            adapter_names,
            not return_member_logits,
            precomputed_logits,
            latent_inputs or [None] * len(self.members),
            bool(every_member),
            prompt_width,
            own_prompts,
            decision,
        )
        self._take_cache(one)
        past = self._checked_past(one)
        side = self._side_of(one, past)
        if attention_mask is not None and position_ids is None:
            one.text = one.text._replace(position_ids=positions_of(attention_mask)[:, -one.new :])
        self._check_prompt(one, past, position_ids)
        if (out := self._in_parts(one, past)) is not None:
            return out
        texts = self._texts_of(one, past)
        asleep = self.weighing.idle if cache is None else idle_in(cache)
        # Before the pass: a static cache counts in place.
        generated = self._generated(past, one.new, prompt_width_of(cache, past, prompt_width), logits_to_keep)
        joined = self._joined_pass(one, texts, asleep)
        traceless = traceless_at(self.members, cache, asleep) if one.may_be_traceless and joined is None else None
        members = self._run(one, texts, asleep, traceless is not None) if joined is None else joined.logits
        if cache is not None and not torch.compiler.is_compiling():
            self._note(one, cache, past, side, asleep, traceless)
        opened = None
        if cache is not None and is_lazy(cache):
            opened, members = self._companions_of_pass(members[0], cache, logits_to_keep, one.new)
        found = None if joined is None else joined.found
        if return_member_logits and labels is None:  # a loss needs combined logits
            return MemberOutput(cache, members, generated, opened, found)
        logits = self._combined(members, generated, opened) if found is None else found
        return CausalLMOutputWithPast(loss=_loss(logits, labels), logits=logits, **{CACHE: cache})

    def _take_cache(self, one: _Pass) -> None:
        """Make the cache this model's, or refuse it."""
        cache, compiling = one.cache, torch.compiler.is_compiling()
        # Not in the later steps of a generate(), which says False: nobody changes a member meanwhile.
        looks = one.first is not False and not compiling
        if isinstance(cache, StaticCache) and looks:
            for member in self.members:
                member.refuse_static_layers()
        if cache is None:
            return
        lazy = one.follows and self._may_wait(cache)
        self._adopt(cache, ahead=one.known is not None, everyone=one.everyone, lazy=lazy, follows=one.follows)
        if looks:
            waits = bool(one.first) or one.new > 1  # for the device, as `check_ids` does
            refuse_outdated(cache, self._models, one.adapter_names, values=waits)
        refuse_mask_of_other_text(one.text.input_ids, one.text.attention_mask, cache)

    def _checked_past(self, one: _Pass) -> int | torch.Tensor:
        """How many tokens the cache holds, after a look at padding and lengths."""
        for member in self.members:
            member.refuse_padding(one.text.attention_mask)
        past = 0 if one.cache is None else length_of(one.cache)
        if isinstance(past, int):  # before any member runs, so that an error leaves the cache unchanged
            for member in self.members:
                member.refuse_length(past + one.new)
        return past

    def _side_of(self, one: _Pass, past: int | torch.Tensor) -> frozenset[str] | None:
        """On which side of their long-rope members' switches the text is."""
        # On a static cache only the device knows how many; generate() has compared the sides of its later steps.
        switches = switches_of(self.members)
        unknown = not isinstance(past, int) and (one.first is False or torch.compiler.is_compiling())
        seen = None if unknown or not switches else int(past)
        return side_of_pass(one.cache, switches, seen, one.new, one.text.attention_mask)

    def _check_prompt(self, one: _Pass, past: int | torch.Tensor, told: torch.Tensor | None) -> None:
        """Look at the ids of a prompt, at its gaps, and at positions that the caller told."""
        # Waits for the device, so for prompts only: all members can embed what is sampled or drafted.
        ids, mask, cache = one.text.input_ids, one.text.attention_mask, one.cache
        empty = isinstance(past, int) and past == 0
        prompt = one.first or empty or (one.new != 1 and one.known is None)
        if not prompt or torch.compiler.is_compiling():
            return
        refuse_leftover(self.base)
        check_ids(ids, self.members)
        for member in self.members:
            member.refuse_gaps(mask)
        if told is not None:
            ones = ids.new_ones(1, int(past) + one.new)
            for member in self.members:
                member.refuse_positions(told, ones if mask is None else mask)
        if isinstance(cache, StaticCache):
            for member in self.members:
                member.refuse_static_cache(cache.get_max_length())

    def _in_parts(self, one: _Pass, past: int | torch.Tensor) -> CausalLMOutputWithPast | None:
        """The pass in parts, where a text is too long for one; None if one pass does."""
        if not one.combine or one.known is not None or any(one.latent):
            return None
        ids, mask, positions = one.text
        part = part_length(ids, one.logits_to_keep, one.cache)
        if part is None or needs_whole(self.members, ids, mask, positions, one.cache):
            return None
        out = forward_in_parts(
            functools.partial(
                self.forward,
                adapter_names=one.adapter_names,
                **{PROMPT_WIDTH: one.prompt_width or int(past) + one.new, PROMPTS: one.own_prompts},
            ),
            ids,
            length=part,
            cache=DynamicCache(config=self.config) if one.cache is None else one.cache,
            attention_mask=mask,
            position_ids=positions,
            labels=one.labels,
        )
        return out if one.cache is not None else CausalLMOutputWithPast(loss=out.loss, logits=out.logits)

    def _texts_of(self, one: _Pass, past: int | torch.Tensor) -> dict[str, Text] | None:
        """The texts of members that read their own, and of a lazy cache; None if all read the same."""
        lazy = one.cache is not None and is_lazy(one.cache)
        if not (roles_with_prompts(self.members) or lazy):
            return None
        ids, mask, positions = one.text
        kept = positions_to_keep(positions, ids, int(past)) if lazy else None
        texts = texts_of_pass(self.members, one.own_prompts, ids, mask, int(past), one.cache, kept)
        for member in self.members:
            if member.role in texts:
                member.refuse_padding(texts[member.role].attention_mask)
        return texts

    def _joined_pass(self, one: _Pass, texts: Mapping[str, Text] | None, asleep: Collection[int]) -> Joined | None:
        """The pass as one graph, with the sum or a loop's decision in it; None if it is none."""
        return self._joined(
            one.text,
            one.cache,
            asleep,
            one.known or {},
            tail=(Sum(self.usable_ids) if one.labels is None else None) if one.combine else one.decision,
            asked={
                "adapter_names": one.adapter_names is not None,
                "latent inputs": any(one.latent),
                "texts of some members' own": texts is not None,
                "chosen positions": isinstance(one.logits_to_keep, torch.Tensor),
            },
        )

    def _run(
        self, one: _Pass, texts: Mapping[str, Text] | None, asleep: Collection[int], traceless: bool
    ) -> list[torch.Tensor | None]:
        """Each member's logits `[B, K, V_i]`; None of those that do not run."""
        mask = one.text.attention_mask
        if traceless and mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None  # each member would look
        quiet = torch.inference_mode() if traceless and not self.split_threads else nullcontext()
        with adapters_of_rows(self.base, one.adapter_names), quiet:
            return run_members(
                self.members,
                self.config.spans,
                one.text.input_ids,
                cache=one.cache,
                attention_mask=mask,
                position_ids=one.text.position_ids,
                logits_to_keep=one.logits_to_keep,
                latent=one.latent,
                precomputed=one.known or {},
                texts=texts,
                idle=() if one.cache is None and one.everyone else [self.members[i].role for i in asleep],
                sides=self._sides if self.overlap else None,
                thread=self._thread if self.split_threads else None,
            )

    def _note(
        self,
        one: _Pass,
        cache: Cache,
        past: int | torch.Tensor,
        side: frozenset[str] | None,
        asleep: Collection[int],
        traceless: int | None,
    ) -> None:
        """Note on the cache who filled it, and prepare the next decode step."""
        note_members(cache, self._models, one.adapter_names, last=self._fingerprints)
        note_side(cache, side)
        note_prompt_width(cache, past, one.new, one.prompt_width)
        if one.first is not None and one.follows and one.adapter_names is None:
            self._steps.prepare(cache, self.members, self.config.spans, asleep, traceless)
            if self._gated is not None and one.first:
                self._gated.read(self.members, self.config.spans, cache, one.text)


def _loss(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The mean next-token loss in nats of logits `[B, N, V]`; None without labels."""
    if labels is None:
        return None
    targets = labels[:, 1:].to(logits.device).flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
