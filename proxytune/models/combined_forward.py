"""One forward pass of a composed model: members → logits → shift."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from proxytune.models.adapter_names import adapters_of_rows, checked_names, refuse_leftover
from proxytune.models.chunked_forward import forward_in_parts, needs_whole, part_length
from proxytune.models.forward_checks import (
    refuse_arguments,
    refuse_mask_of_other_text,
    refuse_positions,
    refuse_shapes,
)
from proxytune.models.generation_mixin import MemberOutput
from proxytune.models.lazy import asked, can_wait, positions_to_keep
from proxytune.models.members.cache_name import CACHE, one_cache
from proxytune.models.members.composite_cache import idle_in, is_lazy, note_members, refuse_outdated, view
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.cuda_streams import CompanionStreams
from proxytune.models.members.decode_step import Steps
from proxytune.models.members.forward import LatentInputs, Text, run_members
from proxytune.models.members.joint_step import Joined, JointStep, Sum, Tail
from proxytune.models.members.long_rope import note_side, side_of_pass, switches_of
from proxytune.models.members.member import Member, check_ids, positions_of
from proxytune.models.members.rewind import length_of
from proxytune.models.members.stateful_pass import kept_logits
from proxytune.models.own_prompts import (
    PROMPT_WIDTH,
    PROMPTS,
    OwnPrompts,
    note_prompt_width,
    prompt_width_of,
    roles_with_prompts,
    texts_of_pass,
)
from proxytune.models.vision import BASE_INPUTS, StepInputs, says_text, sees
from proxytune.models.weighing import Weighing

__all__ = ["CombinedForwardMixin"]

_OF_OUR_LOOPS = (
    *("return_member_logits", "precomputed_logits", "latent_inputs"),
    *("every_member", PROMPT_WIDTH, PROMPTS, "decision"),
)


class CombinedForwardMixin:
    """`forward` of a composed model; must come before `PreTrainedModel` among the bases."""

    base: Any
    config: Any
    device: torch.device
    members: list[Member]
    weighing: Weighing
    overlap: bool
    split_threads: bool
    _joint: JointStep | None
    _adopt: Any
    _sides: CompanionStreams
    _steps: Steps
    _thread: SideThread

    @property
    def usable_ids(self) -> int:
        """How many ids every member can embed; the logits of higher ids are −inf."""
        return min(m.rows for m in self.members)

    @property
    def _models(self) -> dict[str, Any]:
        return {m.role: m.model for m in self.members}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache: Cache | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run all members over the tokens and combine their logits.

        Args:
            input_ids: `[B, N]`, int64: the tokens that the cache does not hold yet.
            attention_mask: `[B, past + N]`, 1 for tokens and 0 for padding.
            position_ids: `[B, N]` or `[1, N]`; None to count by the mask.
            past_key_values: An empty cache, or one that this model filled.
            use_cache: Whether to return a cache [True].
            logits_to_keep: The number of last positions to keep [0: all], or a tensor of positions.
            labels: `[B, N]`, −100 at positions without a target: adds the mean next-token loss, in nats.
            inputs_embeds: Refused; members do not share an embedding space.
            is_first_iteration: Set by `generate()` for a prompt.
            cache: The same as `past_key_values`, by its name since transformers 5.24.
            adapter_names: For each row an adapter of the base, a PEFT model, or "__base__" [its active one for all].
            **kwargs: `cache_position`, which must go on where the cache ends; options of the package's own loops, see
                `_forward_members`; any other that is not None or False is refused.

        Returns:
            Logits `[B, K, V]`, float32, V the base's width; the loss; the cache.

        Raises:
            InputError: If the prompt is empty, too long for a member, or has ids that a member cannot embed; if the
                labels have another shape, or `adapter_names` do not fit; or an argument is not supported.
            UnsupportedModeError: If the base's adapters cannot be mixed in a batch.
            CacheError: If the cache was filled by another model.
        """
        if is_first_iteration is False and labels is None and inputs_embeds is None and adapter_names is None:
            held = past_key_values if cache is None else cache
            if (out := self._step(input_ids, attention_mask, position_ids, held, logits_to_keep, kwargs)) is not None:
                return out
        # Not in the signature, so generate() refuses them from users: transformers' loops need combined logits.
        loop_options = {name: kwargs.pop(name) for name in _OF_OUR_LOOPS if name in kwargs}
        past_key_values = one_cache(past_key_values, cache)
        step = kwargs.pop(BASE_INPUTS, None)
        refuse_positions(kwargs.pop("cache_position", None), input_ids, past_key_values)
        # A processor tells the types of tokens of a text alone, too.
        kwargs = {k: v for k, v in kwargs.items() if not (says_text(k, v) and sees(self.base))}
        refuse_arguments(inputs_embeds=inputs_embeds, **kwargs)
        if step is not None:
            wanted, width = bool(loop_options.get("return_member_logits")), loop_options.get(PROMPT_WIDTH)
            return self._forward_with_images(step, past_key_values, logits_to_keep, width, return_member_logits=wanted)
        refuse_shapes(input_ids, attention_mask, labels)
        assert input_ids is not None
        return self._forward_members(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache in (None, True),
            logits_to_keep,
            labels,
            is_first_iteration,
            adapter_names=None if adapter_names is None else checked_names(adapter_names, self.members, len(input_ids)),
            **loop_options,
        )

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
        if self._joint is not None and cache is not None and input_ids is not None and self.weighing.plain:
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
        if not _asks_nothing_new(text, logits_to_keep, options, "decision"):
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
        combine, known = not return_member_logits, precomputed_logits
        latent = latent_inputs or [None] * len(self.members)
        # As in transformers, a given cache is always used: it holds a part of the prefix.
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if isinstance(cache, StaticCache) and is_first_iteration is not False and not torch.compiler.is_compiling():
            for member in self.members:
                member.refuse_static_layers()
        if cache is not None:
            everyone = bool(every_member)
            follows = not everyone and known is None and not any(latent)
            lazy = follows and self._may_wait(cache)
            self._adopt(cache, ahead=known is not None, everyone=everyone, lazy=lazy, follows=follows)
            # Not in the later steps of a generate(), which says False: nobody changes a member meanwhile.
            if is_first_iteration is not False and not torch.compiler.is_compiling():
                waits = bool(is_first_iteration) or input_ids.shape[1] > 1  # for the device, as `check_ids` does
                refuse_outdated(cache, self._models, adapter_names, values=waits)
            refuse_mask_of_other_text(input_ids, attention_mask, cache)
        for member in self.members:
            member.refuse_padding(attention_mask)
        past = 0 if cache is None else length_of(cache)
        if isinstance(past, int):  # before any member runs, so that an error leaves the cache unchanged
            for member in self.members:
                member.refuse_length(past + input_ids.shape[1])
        # On a static cache only the device knows how many; generate() has compared the sides of its later steps.
        switches = switches_of(self.members)
        unknown = not isinstance(past, int) and (is_first_iteration is False or torch.compiler.is_compiling())
        seen = None if unknown or not switches else int(past)
        side = side_of_pass(cache, switches, seen, input_ids.shape[1], attention_mask)
        told = position_ids
        if attention_mask is not None and position_ids is None:
            position_ids = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        # Waits for the device, so for prompts only: all members can embed what is sampled or drafted.
        first = isinstance(past, int) and past == 0
        prompt = is_first_iteration or first or (input_ids.shape[1] != 1 and known is None)
        if prompt and not torch.compiler.is_compiling():
            refuse_leftover(self.base)
            check_ids(input_ids, self.members)
            for member in self.members:
                member.refuse_gaps(attention_mask)
            if told is not None:
                ones = input_ids.new_ones(1, int(past) + input_ids.shape[1])
                for member in self.members:
                    member.refuse_positions(told, ones if attention_mask is None else attention_mask)
            if isinstance(cache, StaticCache):
                for member in self.members:
                    member.refuse_static_cache(cache.get_max_length())
        part = part_length(input_ids, logits_to_keep, cache) if combine and known is None and not any(latent) else None
        if part is not None and not needs_whole(self.members, input_ids, attention_mask, position_ids, cache):
            out = forward_in_parts(
                functools.partial(
                    self.forward,
                    adapter_names=adapter_names,
                    **{PROMPT_WIDTH: prompt_width or int(past) + input_ids.shape[1], PROMPTS: own_prompts},
                ),
                input_ids,
                length=part,
                cache=DynamicCache(config=self.config) if cache is None else cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
            )
            return out if cache is not None else CausalLMOutputWithPast(loss=out.loss, logits=out.logits)

        texts_of, lazy = None, cache is not None and is_lazy(cache)
        if roles_with_prompts(self.members) or lazy:
            kept = positions_to_keep(position_ids, input_ids, int(past)) if lazy else None
            texts_of = texts_of_pass(self.members, own_prompts, input_ids, attention_mask, int(past), cache, kept)
            for member in self.members:
                if member.role in texts_of:
                    member.refuse_padding(texts_of[member.role].attention_mask)
        asleep = self.weighing.idle if cache is None else idle_in(cache)
        # Before the pass: a static cache counts in place.
        known_width = prompt_width_of(cache, past, prompt_width)
        generated = self._generated(past, input_ids.shape[1], known_width, logits_to_keep)
        joined = self._joined(
            Text(input_ids, attention_mask, position_ids),
            cache,
            asleep,
            known or {},
            tail=(Sum(self.usable_ids) if labels is None else None) if combine else decision,
            asked={
                "adapter_names": adapter_names is not None,
                "latent inputs": any(latent),
                "texts of some members' own": texts_of is not None,
                "chosen positions": isinstance(logits_to_keep, torch.Tensor),
            },
        )
        if joined is not None:
            members = joined.logits
        else:
            with adapters_of_rows(self.base, adapter_names):
                members = run_members(
                    self.members,
                    self.config.spans,
                    input_ids,
                    cache=cache,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    logits_to_keep=logits_to_keep,
                    latent=latent,
                    precomputed=known or {},
                    texts=texts_of,
                    idle=() if cache is None and every_member else [self.members[i].role for i in asleep],
                    sides=self._sides if self.overlap else None,
                    thread=self._thread if self.split_threads else None,
                )  # [B, K, V_i] each
        if cache is not None and not torch.compiler.is_compiling():
            note_members(cache, self._models, adapter_names)
            note_side(cache, side)
            note_prompt_width(cache, past, input_ids.shape[1], prompt_width)
            if is_first_iteration is not None and follows and adapter_names is None:
                self._steps.prepare(cache, self.members, self.config.spans, asleep)
        opened = None
        if lazy:
            assert cache is not None
            opened, members = self._companions_of_pass(members[0], cache, logits_to_keep, input_ids.shape[1])
        if not combine and labels is None:  # a loss needs combined logits
            return MemberOutput(cache, members, generated, opened, None if joined is None else joined.found)
        total = None if joined is None else joined.found
        logits = self._combined(members, generated, opened) if total is None else total
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device).flatten()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

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
        logits = self.weighing.combined(members, generated, opened)
        if logits.shape[-1] > (usable := self.usable_ids):
            logits[..., usable:] = -torch.inf
        return logits

    def _forward_with_images(
        self,
        step: StepInputs,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor,
        prompt_width: int | None,
        *,
        return_member_logits: bool = False,
    ) -> CausalLMOutputWithPast:
        """One pass of `generate()` with images: the base by its own inputs, the companions over the text."""
        if cache is not None:
            self._adopt(cache, ahead=True, everyone=True, follows=False)
        if step.first:
            refuse_leftover(self.base)
        step.check(self.members)
        new = step.base["input_ids"].shape[1]
        past = 0 if cache is None else int(length_of(view(cache, *self.config.spans[0])))
        generated = self._generated(past, new, prompt_width, logits_to_keep)
        members = run_members(
            self.members,
            self.config.spans,
            step.base["input_ids"],
            cache=cache,
            attention_mask=None,
            position_ids=None,
            logits_to_keep=logits_to_keep,
            latent=[step.base, *([None] * (len(self.members) - 1))],
            precomputed={},
            texts={m.role: step.text for m in self.members[1:]},
            sides=self._sides if self.overlap else None,
            thread=self._thread if self.split_threads else None,
        )  # [B, K, V_i] each
        if cache is not None:
            note_members(cache, self._models, images=True)
        if return_member_logits:
            return MemberOutput(cache, members, generated)
        return CausalLMOutputWithPast(logits=self._combined(members, generated), **{CACHE: cache})


def _asks_nothing_new(text: Text, logits_to_keep: int | torch.Tensor, options: Mapping[str, Any], *known: str) -> bool:
    """Whether a pass has only options that prepared steps know, and is told its positions if it has a mask."""
    unknown = options.keys() - {"return_member_logits", "every_member", PROMPT_WIDTH, *known}
    told = text.position_ids is not None or text.attention_mask is None
    return told and not (unknown or options.get("every_member") or isinstance(logits_to_keep, torch.Tensor))
