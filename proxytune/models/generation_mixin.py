"""What transformers asks of the composed model besides its logits.

Inputs, masks and caches for `generate()`; the attributes that `PreTrainedModel` expects of one model; and errors for
what would otherwise go wrong silently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.adapter_names import checked_names
from proxytune.models.assisted import AssistedMixin, TailMask
from proxytune.models.foreign_processors import processors_of_call
from proxytune.models.forward_checks import refuse_arguments, refuse_shapes
from proxytune.models.kept_cache import KeptCache
from proxytune.models.members.cache_name import CACHE, cache_of, one_cache, renamed
from proxytune.models.members.composite_cache import adopt, refuse_short_cache, view
from proxytune.models.members.decode_step import Steps
from proxytune.models.members.embedding_table import device_of
from proxytune.models.members.gated_step import GatedStep
from proxytune.models.members.joint_step import JointStep
from proxytune.models.members.long_rope import must_read_again, read_whole, refuse_missing_ids, switches_of
from proxytune.models.own_prompts import PROMPT_WIDTH, PROMPTS, generate_with_prompts, roles_with_prompts
from proxytune.models.padding import refuse_ambiguous_padding
from proxytune.models.vision import BASE_INPUTS, BaseInputs, refuse_settings, take_base_inputs
from proxytune.validation import shown

__all__ = [
    "ComposedGenerationMixin",
    "MemberOutput",
    "refuse_continuous_batching",
]


_MADE_FOR = "_proxytune_made_for"


class MemberOutput(dict[str, Any]):
    """What `forward(return_member_logits=True)` returns: each member's own logits, for loops that combine them.

    It holds the cache, by its installed name. An output of transformers' own kind would check its fields in each step.

    Attributes:
        member_logits: `[B, K, V_i]` each, raw, in the member's dtype and on its device; the base's first. None for a
            member that did not run.
        generated: `[1, K]`, int64: how many tokens were generated before each position; None where no weight asks.
        opened: `[B, K]`, bool: where the formula's gate is open; None where that was not asked.
        decided: What a joint step's `decision` gave; None where it was not made in the graph.
    """

    logits = attentions = hidden_states = None

    def __init__(
        self,
        cache: Cache | None,
        member_logits: Sequence[torch.Tensor | None],
        generated: torch.Tensor | None = None,
        opened: torch.Tensor | None = None,
        decided: torch.Tensor | None = None,
    ) -> None:
        setattr(self, CACHE, cache)  # transformers looks for it both ways
        if cache is not None:
            self[CACHE] = cache
        self.member_logits = tuple(member_logits)
        self.generated = generated
        self.opened = opened
        self.decided = decided


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Replace what starts continuous batching: paged caches hold one model's layers and drop logits processors.

    Raises:
        UnsupportedModeError: Always, also through `generate_batch` and `cache_implementation="paged"`.
    """
    raise UnsupportedModeError.of(
        "continuous batching",
        expected="generate() with a dynamic or static cache",
        got="generate_batch or a paged cache, which would run only one of the members",
        remedy="Use generate() with a left-padded batch.",
    )


def _autocast_on(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, which layers of a static cache take at their first update; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _refuse_no_loop(custom_generate: Any) -> None:
    """Refuse what transformers would ignore (a setting of a loop) or fail at (its class)."""
    made = not isinstance(custom_generate, type)
    if custom_generate is not None and not (callable(custom_generate) and made):
        raise InputError.of(
            "custom_generate",
            expected="a loop, e.g. FusedDecoding(seed=0)",
            got=shown(custom_generate, 80) if made else f"the class {custom_generate.__name__}",
            remedy="Pass it to a loop, e.g. LatentDecoding(LatentMixture(kind='gumbel'))."
            if made
            else f"Make one: custom_generate={custom_generate.__name__}(…).",
        )


class ComposedGenerationMixin(AssistedMixin, GenerationMixin):
    """`GenerationMixin` for a model composed of several, the base among them.

    The name must end in `GenerationMixin`: `can_generate()`, which pipelines call, looks for that among the bases.
    """

    _gated: GatedStep | None
    _joint: JointStep | None
    _kept: KeptCache
    _steps: Steps

    @functools.wraps(GenerationMixin.generate, assigned=())
    def generate(self, *args: Any, prompts: Mapping[str, Any] | None = None, trace: Any = None, **kwargs: Any) -> Any:
        """As transformers has it; takes the cache as `past_key_values` or as `cache`; InputError for two caches.

        `prompts` is role → ids of the members that read a prompt of their own: what a tokenizer returns, `[B, T]`, or
        one row for all. `trace` is a `proxytune.Recording`, which records what is decided.
        """
        if trace is not None:
            if not callable(getattr(trace, "over", None)):
                raise InputError.of(
                    "trace",
                    expected="a recording",
                    got=shown(trace, 80),
                    remedy="Pass trace=proxytune.Recording(), or Recording(file='run.npz').",
                )
            return trace.over(self, self.generate, args, {**kwargs, "prompts": prompts})
        kwargs.pop("labels", None)  # trainers pass a batch whole, and a plain model makes nothing of them here
        given, loop = renamed(kwargs), super().generate
        if self._gated is None:
            return generate_with_prompts(loop, self, prompts, args, given)
        held, out = cache_of(given), None
        try:
            with self._kept.call(given.get("custom_generate")) as result:
                out = generate_with_prompts(loop, self, prompts, args, given)
                result.append(out)
        except BaseException:
            self._gated.end(self.members, held, failed=True)
            raise
        for cache in (held, cache_of(out) if isinstance(out, Mapping) else None):
            self._gated.end(self.members, cache)
        return out

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
        """The arguments of `forward` for one step of `generate()`; the last `next_sequence_length` ids are new.

        The 2-D mask is passed on unchanged, since the members build their own; `inputs_embeds` raises an InputError.
        """
        refuse_arguments(inputs_embeds=inputs_embeds)
        held, whole = one_cache(past_key_values, cache), input_ids
        if next_sequence_length is not None and next_sequence_length < 1 and next_sequence_length < input_ids.shape[1]:
            raise InputError.of(
                "input_ids",
                expected=f"more tokens than the {input_ids.shape[1] - next_sequence_length} that the cache holds",
                got=f"{input_ids.shape[1]}",
                remedy="Pass the ids of the whole text, its new tokens included, or leave out the cache.",
            )
        if next_sequence_length is not None:
            length = input_ids.shape[1]
            if must_read_again(held, switches_of(self.members), length, next_sequence_length, attention_mask):
                # A long-rope member has other frequencies from here on, and reads the whole text again, as it would
                # alone; the others read it along.
                held = None
                position_ids = kwargs.get("position_ids")
                if position_ids is not None and position_ids.shape[-1] != length:
                    kwargs["position_ids"] = None
            else:
                input_ids = input_ids[:, -next_sequence_length:]
        if (seen := kwargs.get(BASE_INPUTS)) is not None:
            view_of_base = None if held is None else view(held, *self.config.spans[0])
            new, cached = next_sequence_length, kwargs.get("use_cache", True)
            kwargs[BASE_INPUTS] = seen.step(whole, new, view_of_base, bool(is_first_iteration), cached)
        # Only for stop strings, but generate() passes it on with the model's arguments.
        kwargs.pop("tokenizer", None)
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None:
            position_ids = position_ids[..., -input_ids.shape[1] :]
        return {
            "input_ids": input_ids,
            CACHE: held,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "is_first_iteration": is_first_iteration,
            **kwargs,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        positions = model_kwargs.get("position_ids")
        # The last position is all that a step needs; reading a text again beyond a switch needs them all.
        if last := positions is not None and model_kwargs.get("use_cache") and not switches_of(self.members):
            model_kwargs = {k: v for k, v in model_kwargs.items() if k != "position_ids"}
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if last:
            assert positions is not None
            updated["position_ids"] = positions[..., -1:] + num_new_tokens
        if (seen := updated.get(BASE_INPUTS)) is not None:
            updated[BASE_INPUTS] = seen.extended(num_new_tokens)
        return updated

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if "alpha" in model_kwargs:
            raise InputError.of(
                "alpha",
                expected="no such argument of generate()",
                got=f"alpha={shown(model_kwargs['alpha'], 80)}",
                remedy="Set model.alpha before the call.",
            )
        take_base_inputs(self.base, model_kwargs)  # from a copy
        model_kwargs = {k: v for k, v in model_kwargs.items() if k != PROMPTS}
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(
        self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        given = inputs if inputs is not None else model_kwargs.get("input_ids")
        if given is not None:
            refuse_shapes(given, model_kwargs.get("attention_mask"))
            if (names := model_kwargs.get("adapter_names")) is not None:
                model_kwargs["adapter_names"] = checked_names(names, self.members, len(given))
            if seen := take_base_inputs(self.base, model_kwargs):
                if roles := roles_with_prompts(self.members):
                    raise UnsupportedModeError.of(
                        "images",
                        expected="members that all read the base's prompt",
                        got=f"the {roles[0]}, which reads a prompt of its own",
                        remedy="Leave out the images, or that member.",
                    )
                model_kwargs[BASE_INPUTS] = seen
            if self.weighing.scheduled:
                model_kwargs[PROMPT_WIDTH] = given.shape[1]
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        seen, prompts, mask = (kwargs.get(name) for name in (BASE_INPUTS, "input_ids", "attention_mask"))
        own = kwargs.pop(PROMPTS, None)
        # transformers repeats tensors alone.
        ids, expanded = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if seen is not None:  # made once the mode is known
            assert prompts is not None
            expanded[BASE_INPUTS] = functools.partial(BaseInputs.of, self.base, seen, prompts, mask, expand_size)
        if own is not None:
            expanded[PROMPTS] = own.repeated(expand_size)
        if adapter_names is not None:
            expanded["adapter_names"] = [name for name in adapter_names for _ in range(expand_size)]
        return ids, expanded

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # Only called without a mask. transformers then takes padding for text where the padding token is also EOS.
        ends = generation_config._eos_token_tensor
        if ends is not None and inputs_tensor.ndim == 2:
            refuse_ambiguous_padding(inputs_tensor, ends.tolist(), remedy="Pass the tokenizer's attention_mask.")
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        given = kwargs.get("model_kwargs") or {}
        switches, width = switches_of(self.members), input_ids_seq_length or 0
        read_whole(switches, generation_config, given, width)
        refuse_missing_ids(switches, generation_config, given, width)
        tail = TailMask(self.usable_ids)
        mended = generation_config.remove_invalid_values or generation_config.is_assistant
        processors = LogitsProcessorList([TailMask(self.usable_ids, finite=not mended)])
        found = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        for processor in found:
            # A draft gets the target's processors. It may be steered on top, since drafts only propose.
            if getattr(processor, "shifts_logits", False) and not generation_config.is_assistant:
                raise InputError.of(
                    "logits_processor",
                    expected="no ProxyTuningLogitsProcessor on a composed model",
                    got=f"a {type(processor).__name__}",
                    remedy="Leave it out, or use it on the base alone: here the two shifts would add up.",
                )
            tells = hasattr(processor, "for_call") and not generation_config.is_assistant
            processors.append(processor.for_call(generation_config, found) if tells else processor)
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                if roles := roles_with_prompts(self.members):
                    raise UnsupportedModeError.of(
                        "guidance_scale",
                        expected="members that all read the base's prompt: its second branch knows no other",
                        got=f"guidance_scale={generation_config.guidance_scale} and the {roles[0]}",
                        remedy="Leave it out, or write guidance into the formula (ClassifierFreeGuidance).",
                    )
                if given.get("adapter_names") is not None:
                    raise UnsupportedModeError.of(
                        "adapter_names",
                        expected="no guidance_scale: its second branch runs without them",
                        got=f"guidance_scale={generation_config.guidance_scale}",
                        remedy="Use one adapter per call, base.set_adapter(name), or leave guidance_scale out.",
                    )
                processors.append(tail)  # guidance computes (−inf) − (−inf) = NaN in the tail
        if generation_config.is_assistant:  # the processors are the target's
            return processors
        return processors_of_call(processors, generation_config, input_ids_seq_length)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = cache_of(model_kwargs)
        if (prepare := model_kwargs.get(BASE_INPUTS)) is not None:
            refuse_settings(generation_config, generation_mode, cache, self.members)
            model_kwargs[BASE_INPUTS] = prepare()
        if cache is None:
            return
        if isinstance(cache, StaticCache):
            for member in self.members:
                member.refuse_static_layers()
        # Adopted first: assisted decoding then asks the cache's layers to record their past.
        self._adopt(cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        if isinstance(cache, StaticCache):
            # Only the device knows how full it is, so this is the one chance to see that it would overflow.
            for member in self.members:
                member.refuse_length(max_cache_length)
            refuse_short_cache(cache, max_cache_length)
            if self._gated is not None and self.weighing.gate is not None:
                other = self._why_along(generation_mode, model_kwargs)
                self._gated.allow(self.members, self.config.spans, cache, other)
            plain = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            if plain and (key := vars(cache).pop(_MADE_FOR, None)) is not None:
                self._kept.lend(key, cache)

    def _why_along(self, generation_mode: Any, model_kwargs: Mapping[str, Any]) -> str | None:
        """Why companions cannot wait for a gate in this call over a static cache, in words; None if they can."""
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"{generation_mode.value.replace('_', ' ')}, which moves rows or takes tokens back"
        if not self.weighing.gated:
            return "a schedule, a mask or log-probabilities in the formula"
        if not any(self.weighing.needed[1:]):
            return "no companion with a weight"
        asked = {"adapter_names": "adapter_names", BASE_INPUTS: "images"}
        return next((said for name, said in asked.items() if model_kwargs.get(name) is not None), None)

    def _adopt(
        self, cache: Any, *, ahead: bool = False, everyone: bool = False, lazy: bool = False, follows: bool = True
    ) -> None:
        """Make a cache this model's, see `composite_cache.adopt`; `everyone` as `every_member` of a pass."""
        idle = () if everyone else self.weighing.idle
        adopt(
            cache,
            self.config.member_configs,
            self.cache_owner,
            ahead=ahead,
            texts=bool(roles_with_prompts(self.members)),
            idle=idle,
            lazy=lazy,
            follows=follows,
        )
        self._steps.forget(cache)
        if self._gated is not None:
            self._gated.settle(self.members, cache)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> Cache:
        length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))  # as transformers takes it
        places = [(member.device, member.model.dtype, _autocast_on(member.device)) for member in self.members]
        key = (batch_size, length, self.weighing.gate is not None, torch.is_inference_mode_enabled(), *places)
        usable = self._joint is not None and cache_implementation == "static"
        cache: Cache | None = self._kept.take(key) if usable else None
        if cache is not None and self._gated is not None:
            self._gated.forget(cache)
        if cache is None:
            given = (cache_implementation, batch_size, max_cache_len)
            cache = super()._prepare_static_cache(*given, *args, **kwargs)
        if usable:
            setattr(cache, _MADE_FOR, key)
        return cache

    def _get_static_cache_init_shape(self) -> None:
        # Members differ in head counts and sizes: each layer initialises itself at its first update.
        return None

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **named: Any
    ) -> dict[str, Any]:
        _refuse_no_loop(custom_generate)
        given = super()._extract_generation_mode_kwargs(None, kwargs.copy(), *args, **named)
        found: dict[str, Any] = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **named)
        if not callable(custom_generate):
            return found
        # transformers passes no streamer, tokenizer or draft to a callable; here it gets those it has parameters for.
        names = inspect.signature(custom_generate).parameters
        return {name: value for name, value in given.items() if name in names} | found

    @property
    def init_continuous_batching(self) -> NoReturn:
        """Missing, so that `transformers serve --continuous-batching` takes one request after the other instead."""
        raise AttributeError("init_continuous_batching: use generate() with a left-padded batch")

    generate_batch = continuous_batching_context_manager = staticmethod(refuse_continuous_batching)

    # --- what PreTrainedModel expects of one model --------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The base's device, where logits are returned."""
        return device_of(self.base) if self.base.device.type == "meta" else self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype; logits are float32 nevertheless."""
        return self.base.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The base's input embedding."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's output embedding; it alone does not give this model's logits."""
        return self.base.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: each member has tied its own weights."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the attention implementation of all members."""
        for member in self.members:
            member.model.set_attn_implementation(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raise UnsupportedModeError: an id added to one member means nothing to the others."""
        raise UnsupportedModeError.of(
            "resize_token_embeddings",
            expected="the vocabulary that all members share",
            got="a request to resize only the base's",
            remedy="Resize every member before wrapping them.",
        )
