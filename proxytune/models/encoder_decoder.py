"""The composed model of three encoder-decoders: every member reads the source with its own encoder, once a call.

From there on it is a composition of decoders. transformers' own `generate()` runs it: greedy decoding, sampling and
beam search.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from proxytune.errors import CacheError, InputError, MemberError, UnsupportedModeError, UnsupportedModelError
from proxytune.formulas.base import Formula
from proxytune.models.forward_checks import refuse_arguments, refuse_shapes
from proxytune.models.members.cache_name import CACHE, one_cache
from proxytune.models.members.composite_cache import note_members, refuse_outdated
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.cuda_streams import CompanionStreams
from proxytune.models.members.encoder_decoder import EncoderDecoderMember, adopt_pair, start_of
from proxytune.models.members.forward import run_members
from proxytune.models.members.innermost import innermost
from proxytune.models.members.masks import is_left_padded
from proxytune.models.members.text_checks import check_ids
from proxytune.models.own_prompts import PROMPT_WIDTH, roles_with_prompts
from proxytune.models.weighing import Weighing
from proxytune.validation import shown

__all__ = ["EncoderDecoderMixin"]

_MODES = (
    *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
    *(GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE),
)
# Settings of generate() that would be wrong, and what is off.
_OFF: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (None, "dynamic"),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
}


class _Encoders:
    """All members' encoders as the one that `generate()` calls, once, before it expands rows for beams."""

    main_input_name = "input_ids"

    def __init__(self, members: list[EncoderDecoderMember]) -> None:
        self.members = members

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Run them over sources `[B, S]`: the base's `last_hidden_state`, and a companion's states under its role."""
        refuse_arguments(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        refuse_shapes(input_ids, attention_mask)
        check_ids(input_ids, self.members, [m.encoder_rows for m in self.members])
        for member in self.members:
            member.refuse_padding(attention_mask)
        base, *companions = [m.encode(input_ids, attention_mask) for m in self.members]
        states = BaseModelOutput(last_hidden_state=base)
        for member, own in zip(self.members[1:], companions, strict=True):
            states[member.role] = own
        return states

    __call__ = forward


class EncoderDecoderMixin:
    """The part of a composed model that encoder-decoders do in another way; it must come first among the bases."""

    base: Any
    config: Any
    formula: Formula
    _combined: Any
    _generated: Any
    weighing: Weighing
    members: list[EncoderDecoderMember]
    cache_owner: str
    usable_ids: int
    overlap: bool
    split_threads: bool
    _models: dict[str, Any]
    _fingerprints: dict[str, Any]
    _sides: CompanionStreams
    _thread: SideThread

    def refuse_other_starts(self) -> None:
        """Raise MemberError if the members' decoders start with different tokens."""
        starts = {m.role: start for m in self.members if (start := start_of(m.model)) is not None}
        if len(set(starts.values())) > 1:
            raise MemberError.of(
                "decoder_start_token_id",
                expected="one token with which all members' decoders start",
                got=", ".join(f"{token} ({role})" for role, token in starts.items()),
                remedy="A decoder that is started otherwise than it was trained writes noise. If one of them is only "
                "recorded wrongly, set generation_config.decoder_start_token_id of that member before wrapping.",
            )

    def refuse_own_prompts(self) -> None:
        """Raise UnsupportedModelError if a member reads a source of its own."""
        if roles := roles_with_prompts(self.members):
            raise UnsupportedModelError.of(
                f"the {roles[0]}",
                expected="members that all read the same source, as encoder-decoders do here",
                got="one with a prompt of its own",
                remedy="Leave it out of the formula.",
            )

    # --- the decode step -----------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Run all members over source and target, and combine their logits.

        Args:
            input_ids: `[B, S]`, int64: the source; not needed with `encoder_outputs`.
            attention_mask: `[B, S]`, 1 for tokens of the source and 0 for padding.
            decoder_input_ids: `[B, N]`, int64: the decoder's tokens that the cache does not hold yet [the labels, moved
                right behind the token that the decoder starts with].
            decoder_attention_mask: `[B, past + N]`, for padding at the right only.
            encoder_outputs: What `get_encoder()` of this model returned.
            past_key_values: An empty `EncoderDecoderCache`, or one that this model filled.
            labels: `[B, N]`, −100 at positions without a target: adds their mean loss, in nats.
            use_cache: Whether to return a cache [True, but not with labels].
            logits_to_keep: The number of last positions to keep [0: all], or a tensor of positions.
            inputs_embeds: Refused; members do not share an embedding space.
            is_first_iteration: Set by `generate()` for a prompt.
            cache: The same as `past_key_values`, by its name since transformers 5.24.
            **kwargs: Refused, unless None or False.

        Returns:
            Logits `[B, K, V]`, float32, V the base's width; the loss; the cache.

        Raises:
            InputError: If source or target are missing, too long for a member, or have ids that a member cannot embed;
                if the decoder's tokens are left-padded; or an argument is not supported.
            CacheError: If the cache was filled by another model, or is no `EncoderDecoderCache`.
        """
        prompt_width = kwargs.pop(PROMPT_WIDTH, None) or 1  # the token that the decoder starts with
        self._refuse_inputs(kwargs)
        refuse_arguments(inputs_embeds=inputs_embeds, **kwargs)
        held: Any = one_cache(past_key_values, cache)
        if labels is not None:
            refuse_shapes(labels, None, name="labels")
            check_ids(labels.masked_fill(labels == -100, 0), self.members, name="labels")
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None or (input_ids is None and encoder_outputs is None):
            raise InputError.of(
                "decoder_input_ids" if decoder_input_ids is None else "input_ids",
                expected="the source as input_ids, and the target as decoder_input_ids or labels",
                got="None",
                remedy="Call generate(input_ids=…) for a text; pass labels to score one.",
            )
        _refuse_decoder_shapes(decoder_input_ids, decoder_attention_mask, labels)
        if held is None and (use_cache or (use_cache is None and labels is None)):
            held = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if held is not None:
            adopt_pair(held, self.config.member_configs, self.cache_owner)
            if is_first_iteration is not False:
                waits = bool(is_first_iteration) or decoder_input_ids.shape[1] > 1  # for the device
                refuse_outdated(held.self_attention_cache, self._models, None, values=waits)
        past = 0 if held is None else int(held.get_seq_length())
        for member in self.members:
            member.refuse_length(past + decoder_input_ids.shape[1])
        if past == 0 or is_first_iteration or decoder_input_ids.shape[1] != 1:
            check_ids(decoder_input_ids, self.members, name="decoder_input_ids")
        if encoder_outputs is None:
            assert input_ids is not None
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        sources = self._sources(encoder_outputs, attention_mask)
        if (rows := len(sources[0]["states"])) not in (1, len(decoder_input_ids)):
            raise InputError.of(
                "decoder_input_ids" if labels is None else "labels",
                expected=f"one row for each of the {rows} sources",
                got=f"{len(decoder_input_ids)}",
                remedy="Pass as many targets as sources; repeat a source that has several.",
            )
        members = run_members(
            self.members,
            self.config.spans,
            decoder_input_ids,
            cache=held,
            attention_mask=decoder_attention_mask,
            position_ids=None,
            logits_to_keep=logits_to_keep,
            latent=sources,
            precomputed={},
            sides=self._sides if self.overlap else None,
            thread=self._thread if self.split_threads else None,
        )  # [B, K, V_i] each
        if held is not None:
            note_members(held.self_attention_cache, self._models, last=self._fingerprints)
        generated = self._generated(past, decoder_input_ids.shape[1], prompt_width, logits_to_keep)
        logits = self._combined(members, generated)  # [B, K, V]
        loss = None
        if labels is not None:
            targets = labels.to(logits.device).flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, encoder_last_hidden_state=encoder_outputs.last_hidden_state, **{CACHE: held}
        )

    def _refuse_inputs(self, given: dict[str, Any]) -> None:
        """Refuse by name what the base takes beside ids and masks; it knows no other names."""
        inner = innermost(self.base)
        takes = {name for f in (inner.forward, inner.generate) for name in inspect.signature(f).parameters}
        ours = inspect.signature(EncoderDecoderMixin.forward).parameters
        for name in sorted(takes & given.keys() - ours.keys()):
            if given[name] is not None and given[name] is not False and not name.startswith(("output_", "return_")):
                raise InputError.of(
                    name,
                    expected="the source as input_ids and attention_mask, and the target as decoder_input_ids",
                    got=shown(given[name], 80)
                    if isinstance(given[name], str | int)
                    else f"a {type(given[name]).__name__}",
                    remedy="Leave it out, or use the base alone, model.base.generate(…).",
                )

    def _sources(self, found: Any, mask: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
        """What each member's decoder attends to: its encoder's states, and the mask of the source."""
        roles = [m.role for m in self.members[1:]]
        if not isinstance(found, BaseModelOutput) or any(role not in found for role in roles):
            raise InputError.of(
                "encoder_outputs",
                expected="the states of all members' encoders",
                got=f"a {type(found).__name__}, which lacks the companions'",
                remedy="Pass input_ids, or what get_encoder() of the composed model returns.",
            )
        masks = {} if mask is None else {"mask": mask}
        return [{"states": found[key], **masks} for key in ("last_hidden_state", *roles)]

    def get_encoder(self, modality: str | None = None) -> Any:
        """All members' encoders as one: called with a source `[B, S]` and its mask, it returns `encoder_outputs`."""
        return _Encoders(self.members)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's tokens `[B, N]` for labels `[B, N]`, as the base makes them of those."""
        make = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
        if make is not None:
            ids: torch.Tensor = make(labels=labels)
            return ids
        start, pad = start_of(self), self.config.pad_token_id
        moved = torch.cat([labels.new_full((len(labels), 1), 0 if start is None else start), labels[:, :-1]], 1)
        return moved.masked_fill(moved == -100, 0 if pad is None else pad)

    @torch.no_grad()
    def member_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Each member's own logits, without a cache: shows what the shift changed.

        Args:
            input_ids: `[B, S]`, int64: the source.
            attention_mask: `[B, S]`; None if nothing is padded.
            decoder_input_ids: `[B, T]`, int64: the target [the token that the decoder starts with].

        Returns:
            Role → raw logits `[B, T, V_role]`, float32.

        Raises:
            InputError: As `forward`.
        """
        if decoder_input_ids is None:
            decoder_input_ids = input_ids.new_full((len(input_ids), 1), start_of(self) or 0)
        check_ids(decoder_input_ids, self.members, name="decoder_input_ids")
        sources = self._sources(self.get_encoder()(input_ids, attention_mask), attention_mask)
        return {
            m.role: m.forward(decoder_input_ids, latent=source).float()
            for m, source in zip(self.members, sources, strict=True)
        }

    # --- what generate() asks for --------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for one step of `generate()`; `input_ids` are the decoder's."""
        refuse_arguments(inputs_embeds=inputs_embeds)
        kwargs.pop("tokenizer", None)  # only for stop strings
        return {
            "decoder_input_ids": input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:],
            "attention_mask": attention_mask,
            CACHE: one_cache(past_key_values, cache),
            "is_first_iteration": is_first_iteration,
            **kwargs,
        }

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        parent: Any = super()
        ids, model_kwargs = parent._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )
        if self.weighing.scheduled:
            model_kwargs[PROMPT_WIDTH] = ids.shape[1]
        return ids, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        refuse_arguments(inputs_embeds=model_kwargs.get("inputs_embeds"))
        self._refuse_inputs(model_kwargs)
        mask = model_kwargs.get("decoder_attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise InputError.of(
                "decoder_attention_mask",
                expected="decoder_input_ids of one length in all rows",
                got="a mask with padding",
                remedy="Pass rows of other lengths one at a time: decoders of some families count padding.",
            )
        if model_kwargs.get("adapter_names") is not None:
            raise UnsupportedModeError.of(
                "adapter_names",
                expected="none with encoder-decoders",
                got=shown(model_kwargs["adapter_names"], 80),
                remedy="Use one adapter per call: base.set_adapter(name).",
            )
        parent: Any = super()
        parent._validate_model_kwargs(model_kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        if generation_mode not in _MODES:
            raise UnsupportedModeError.of(
                generation_mode.value.replace("_", " "),
                expected="greedy decoding, sampling or beam search, with encoder-decoders",
                got=f"settings for {generation_mode.value.replace('_', ' ')}",
                remedy="Leave out what asks for it (assistant_model, prompt_lookup_num_tokens, penalty_alpha, …).",
            )
        for name, off in _OFF.items():
            if (value := getattr(generation_config, name, None)) not in off:
                raise UnsupportedModeError.of(
                    name,
                    expected=f"{name}={off[-1]} with encoder-decoders",
                    got=f"{name}={value!r}",
                    remedy=f"Leave {name} out.",
                )
        parent: Any = super()
        parent._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _adopt(self, cache: Any, **told: Any) -> None:
        if isinstance(cache, EncoderDecoderCache) and (past := int(cache.get_seq_length())):
            # transformers hands the decoder its whole text again, unless a mask of it was given.
            raise CacheError.of(
                CACHE,
                expected="an empty cache in generate() of encoder-decoders",
                got=f"one that holds {past} tokens",
                remedy="Leave it out: generate(…, decoder_input_ids=…) reads the text so far anew.",
            )
        adopt_pair(cache, self.config.member_configs, self.cache_owner)


def _refuse_decoder_shapes(ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None) -> None:
    """Refuse decoder ids, masks and labels that do not fit each other, and padding before tokens."""
    refuse_shapes(ids, mask, name="decoder_input_ids")
    if labels is not None and labels.shape != ids.shape:
        raise InputError.of(
            "labels",
            expected=f"the shape of decoder_input_ids, {list(ids.shape)}",
            got=f"{list(labels.shape)}",
            remedy="Leave decoder_input_ids out: they are made of the labels.",
        )
    if mask is not None and is_left_padded(mask):
        raise InputError.of(
            "decoder_attention_mask",
            expected="padding at the right",
            got="padding before tokens",
            remedy="Pad targets at the right: decoders of some families count padding at the left.",
        )
