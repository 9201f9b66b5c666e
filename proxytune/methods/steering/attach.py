"""The hooks that `ProxyTuningLogitsProcessor.attach` puts on a model, and the processor of one `generate()`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from proxytune.errors import InputError, SteeringWarning, UnsupportedModeError, UnsupportedModelError
from proxytune.generation.prompt_rows import expand_mask
from proxytune.models.assisted import refuse_rewinding, refuse_self_speculation
from proxytune.models.end_tokens import listed_ends
from proxytune.models.ensemble import Ensemble
from proxytune.models.foreign_processors import processors_of_call
from proxytune.models.learned_prompts import refuse_unfound_cache
from proxytune.models.members.cache_name import cache_of, tokens_in
from proxytune.models.members.innermost import innermost
from proxytune.models.members.long_rope import longest_prompt, read_whole, refuse_unread
from proxytune.models.members.masks import is_left_padded
from proxytune.models.members.member import Member
from proxytune.models.members.own_cache import refuse_reordering
from proxytune.models.members.self_test import generation_fault, padding_fault
from proxytune.models.members.whole_text import reads_whole_text
from proxytune.models.vision import pixels_in, refuse_cached_images, refuse_regrouped, text_mask, text_of
from proxytune.ops import normalise_

__all__ = [
    "AttachedProcessor",
    "CompanionPrefetch",
    "ScoringNotice",
    "SteeredProcessors",
    "StoppingIds",
    "drafts_refused",
    "examined_base",
    "refuse_no_ids",
]


class _Steering(Protocol):
    """The part of `ProxyTuningLogitsProcessor` that is used here."""

    overlap: bool

    def begin_generation(self, *, handed_on: bool) -> None: ...
    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None: ...
    def read_prompts(self, chunk: int | None, *, finite: bool) -> None: ...
    def explicit_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None: ...
    def shifted(
        self, input_ids: torch.Tensor, scores: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor: ...


def refuse_no_ids(length: int | None) -> None:
    """Raise InputError for a prefix of length 0; None is a length not known yet."""
    if length == 0:
        raise InputError.of(
            "input_ids",
            expected="the prompt's token ids, which the companions read",
            got="0 ids: generate() was given inputs_embeds only, or an empty prompt",
            remedy="Pass input_ids.",
        )


def examined_base(model: Any) -> Member | None:
    """A base after its self-test; None for one that is no `Member`, or that no cache serves, as a base may be.

    Raises:
        UnsupportedModelError: If it depends on later tokens, continues its cache differently, or counts positions in
            another way than `generate()`, which tells it them.
    """
    if reads_whole_text(model) is not None:
        if (fault := generation_fault(model, rows=1)) is not None:
            raise UnsupportedModelError.of(
                "the base",
                expected="a causal LM whose generate() gives what one pass over the text gives",
                got=f"a {type(innermost(model)).__name__} with {fault}",
                remedy="Compose it with proxytune.wrap. self_test=False skips this check.",
            )
        return None
    try:
        base = Member(model, "base")
    except UnsupportedModelError:
        return None
    base.examine()
    if not base.verdict.counts:
        raise UnsupportedModelError.of(
            "the base",
            expected="a model that counts positions from 0, as generate() does",
            got=f"a {type(model).__name__}, whose results change when it is given such positions",
            remedy="Compose it with proxytune.wrap, which gives it none. self_test=False skips this check.",
        )
    return base


def refuse_unserved(model: Any, generation_config: GenerationConfig, mask: torch.Tensor | None, rows: int) -> None:
    """Raise UnsupportedModeError where `generate()` is wrong on a base with a state that is in no cache.

    Takes the call's mask `[B, T]` and its number of rows. Waits for the device, for such bases only.
    """
    if (why := reads_whole_text(model)) is None:
        return
    generation_config.prefill_chunk_size = None
    name, remedy = type(innermost(model)).__name__, "compose it with proxytune.wrap, which reads the whole text anew"
    moved = getattr(innermost(model), "_is_stateful", False) and generation_config.use_cache
    if (generation_config.num_beams or 1) > 1 and moved:
        raise UnsupportedModeError.of(
            "beams for the base",
            expected="a cache whose rows can take each other's content",
            got=f"a {name}, which {why}",
            remedy=f"Pass use_cache=False, or {remedy}.",
        )
    if rows > 1 and generation_config.use_cache and (fault := generation_fault(model, rows=2)) is not None:
        raise UnsupportedModeError.of(
            "a batch for the base",
            expected="a model that carries the states of several rows",
            got=f"a {name} with {fault}",
            remedy=f"Pass one prompt at a time, or use_cache=False, or {remedy}.",
        )
    if mask is not None and is_left_padded(mask) and (fault := padding_fault(model)) is not None:
        raise UnsupportedModeError.of(
            "left padding for the base",
            expected="a model that tells padding from text by its mask",
            got=f"a {name} with {fault}",
            remedy=f"Pass prompts of the same length, or one at a time, or {remedy}.",
        )


class SteeredProcessors:
    """Replaces a steered model's `_get_logits_processor`."""

    changes_logits = True

    def __init__(self, processor: _Steering, model: Any, base: Member | None = None) -> None:
        self.processor = processor
        self.model = model
        self.base = base  # None if it was not tested
        self.switches = Ensemble.of(model).switches  # of the base; companions read again what they need

    def __call__(
        self,
        original: Callable[..., LogitsProcessorList],
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """The processors of one `generate()`, the shift first; `model_kwargs` has the mask, expanded for beams.

        Raises:
            InputError: If the ids are missing or not the whole prefix, or the shift would be added twice.
            UnsupportedModeError: If the mode would run the base unsteered (guidance, drafting with parts of itself), or
                prompts are left-padded and the base is wrong there.
        """
        processors = original(generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs)
        if any(isinstance(p, AttachedProcessor) and p.processor is self.processor for p in processors):
            return processors  # the model drafts for itself, with its own processors
        shifting = [type(p).__name__ for p in processors if getattr(p, "shifts_logits", False)]
        if shifting:
            raise InputError.of(
                "logits_processor",
                expected="no processor that shifts the logits beside the attached one",
                got=f"a {shifting[0]}: the shifts would add up",
                remedy="Leave it out of logits_processor, or detach() the attached one.",
            )
        if not generation_config.is_assistant:
            processors = LogitsProcessorList(
                p.for_call(generation_config, processors) if hasattr(p, "for_call") else p for p in processors
            )
            processors = processors_of_call(processors, generation_config, input_ids_seq_length)
        prompts = kwargs.get("encoder_input_ids")
        processors.insert(0, self._steering(generation_config, input_ids_seq_length, model_kwargs or {}, prompts))
        return processors

    def _steering(
        self, generation_config: GenerationConfig, length: int | None, model_kwargs: dict[str, Any], prompts: Any
    ) -> AttachedProcessor:
        """Read mask and settings of a `generate()`, which its steps do not show, and refuse unsupported ones."""
        refuse_no_ids(length)
        refuse_self_speculation(generation_config)
        if generation_config.guidance_scale not in (None, 1):
            raise UnsupportedModeError.of(
                "guidance_scale",
                expected="none with an attached processor: the unconditional branch would not be steered",
                got=str(generation_config.guidance_scale),
                remedy="Use proxytune.wrap, whose model steers both branches.",
            )
        mask = model_kwargs.get("attention_mask")
        past = cache_of(model_kwargs)
        held = None if past is None else tokens_in(past)
        if self.base is not None:
            self.base.refuse_padding(mask)
        refuse_unfound_cache(self.model, generation_config.use_cache)
        seen = length or 0
        # generate() drops a mask of ones, but keeps its length.
        covered = getattr(generation_config, "_mask_length", seen) if mask is None else mask.shape[1]
        several = self.base is not None and self.base.verdict.several and held is not None and seen - held > 1
        if past is not None and (held is None or (held and several)):
            again = "whose cache has no length, so that the whole text is read again"
            singly = "which goes on by single tokens only"
            raise UnsupportedModeError.of(
                "a filled cache for the base",
                expected="a model that generate() continues rightly",
                got=f"a {type(innermost(self.model)).__name__}, {again if held is None else singly}",
                remedy="Leave the cache out, or compose the model with proxytune.wrap.",
            )
        if covered != seen or (past is not None and seen <= (held or 0)):
            raise InputError.of(
                "input_ids",
                expected="the whole prefix, with a cache too: the companions read it from the ids",
                got=f"only the {seen} new ids",
                remedy="Pass all ids; generate() forwards through the base only those that the cache has not seen.",
            )
        if self.switches and generation_config.use_cache and not generation_config.is_assistant:
            longest = torch.tensor([longest_prompt(generation_config, model_kwargs, seen)])
            most_new = generation_config.max_length - seen
            refuse_unread("an attached processor", self.model, self.switches, longest, seen, most_new)
        read_whole(self.switches, generation_config, model_kwargs, seen)
        if self.base is not None:
            self.base.read_rightly(generation_config, mask)
            if generation_config.cache_implementation in ("static", "offloaded_static") or isinstance(
                past, StaticCache
            ):
                self.base.refuse_static_layers()
                self.base.refuse_static_cache(int(generation_config.max_length))
        else:
            refuse_unserved(self.model, generation_config, mask, 1 if prompts is None else len(prompts))
        if (generation_config.num_beams or 1) > 1:
            refuse_reordering("beams", self.model, generation_config.use_cache)
        images = bool(pixels_in(model_kwargs))
        if held:
            refuse_cached_images(self.model, prompts, images)
        if images:
            times = max(generation_config.num_beams, generation_config.num_return_sequences)
            refuse_regrouped(self.model, prompts, model_kwargs, times, held=times)
            mask = self._without_images(prompts, mask)
        self.processor.begin_generation(handed_on=past is not None and held != 0)
        self.processor.read_prompts(
            generation_config.prefill_chunk_size, finite=not generation_config.remove_invalid_values
        )
        return AttachedProcessor(self.processor, mask, normalise=generation_config.num_beams > 1, images=images)

    def _without_images(self, prompts: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mask of what companions read of the prompts `[B, T]`; `mask` may be expanded for beams."""
        if self.processor.explicit_mask(prompts) is not None:
            raise InputError.of(
                "attention_mask",
                expected="generate()'s own alone, with images: the processor finds their placeholders by itself",
                got="another, given to the processor",
                remedy="Pass it to generate().",
            )
        return text_mask(self.model, prompts if mask is None else expand_mask(prompts, mask), mask)


def drafts_refused(switches: Mapping[str, int], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces a base's `_get_candidate_generator`: no drafts across a long-rope switch, or after a filled cache."""
    cache = cache_of(kwargs.get("model_kwargs") or {})
    if cache is not None and (held := tokens_in(cache)) != 0:
        raise UnsupportedModeError.of(
            "drafts after a filled cache",
            expected="none: assisted decoding of transformers reads the whole text again, after what the cache holds",
            got=f"{held} cached tokens",
            remedy="Leave the cache out, or use proxytune.wrap.",
        )
    refuse_rewinding(switches, *args, **kwargs)
    return original(*args, **kwargs)


class StoppingIds:
    """Replaces a steered model's `_prepare_generation_config`: texts also stop where the expert ends its turn.

    An `eos_token_id` of the call comes first; in a `GenerationConfig`, one that is not the model's own, which pipelines
    copy.
    """

    def __init__(self, model: Any, ids: list[int]) -> None:
        self.model, self.ids = model, ids

    def __call__(self, original: Callable[..., Any], generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Prepare the config of one `generate()`, with the ids in place of the model's own."""
        config, rest = original(generation_config, *args, **kwargs)
        own = listed_ends(self.model.generation_config.eos_token_id)
        if "eos_token_id" not in kwargs and set(listed_ends(config.eos_token_id)) == set(own):
            config.eos_token_id = list(self.ids)
        return config, rest


class ScoringNotice:
    """Says once that logits of a whole text, asked for outside `generate()`, are the base's own.

    Harnesses score so: one pass without a cache, in evaluation, for the logits of all positions. Not so `generate()`,
    its loops and companions, training, and passes for hidden states, of which nothing is said.

    Attributes:
        generating: Whether the next pass is one of `generate()`, which has just prepared its inputs.
    """

    def __init__(self, *models: Any) -> None:
        self.generating = self._said = False
        # A PEFT model calls the model inside by its `forward`, past that one's hooks: both are watched.
        watched = {id(m): m for m in models if isinstance(m, torch.nn.Module) and not hasattr(m, "_orig_mod")}
        self._handles = [m.register_forward_pre_hook(self._look, with_kwargs=True) for m in watched.values()]

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> ScoringNotice:
        silent = ScoringNotice()  # a copy of the model is not steered
        silent._said = True
        return silent

    def _look(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._said or torch.compiler.is_compiling():
            return
        generating, self.generating = self.generating, False
        ids = kwargs.get("input_ids", args[0] if args else None)
        whole = kwargs.get("labels") is not None or (
            isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[1] > 1 and not _is_set(kwargs, _PARTS)
        )
        if generating or model.training or not whole or cache_of(kwargs) is not None:
            return
        self._said = True
        warnings.warn(
            "forward() of a model with an attached ProxyTuningLogitsProcessor gives the base's own logits: processors "
            "act in generate() alone. Log-likelihoods and losses of this model are not steered; to score, compose the "
            "models with proxytune.wrap.",
            SteeringWarning,
            stacklevel=4,
        )


# What asks for other than the logits of all positions.
_PARTS = ("logits_to_keep", "output_hidden_states", "output_attentions")


def _is_set(kwargs: dict[str, Any], names: tuple[str, ...]) -> bool:
    return any(isinstance(kwargs.get(name), torch.Tensor) or bool(kwargs.get(name)) for name in names)


class CompanionPrefetch:
    """Replaces a steered model's `prepare_inputs_for_generation`, to start the companions before the base.

    The method runs right before every forward pass of the base, with the whole prefix and beams in their new order,
    which a hook on the module would not see. The companions run the same step there, and the processor later finds
    their logits cached. If the prefix was another, or the method was not called, they run when the processor needs
    them.
    """

    def __init__(self, processor: _Steering, notice: ScoringNotice) -> None:
        self.processor, self.notice = processor, notice

    def __call__(
        self, original: Callable[..., dict[str, Any]], input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the inputs of a forward pass for the prefixes `[B, T]`, and start the companions."""
        inputs = original(input_ids, *args, **kwargs)
        self.notice.generating = True
        mask = kwargs.get("attention_mask")
        # Not for prompts, which may come in chunks, nor for drafts, which the companions have read already.
        # Nor with images, of whose placeholders only the processor of this generate() knows.
        step = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        step = step and not pixels_in(kwargs)
        if step and self.processor.overlap and (mask is None or mask.shape == input_ids.shape):
            self.processor.begin(input_ids, mask)
        return inputs


class AttachedProcessor(LogitsProcessor):
    """An attached processor during one `generate()`, with that call's mask and mode."""

    supports_continuous_batching = False
    shifts_logits = True

    def __init__(
        self, processor: _Steering, attention_mask: torch.Tensor | None, *, normalise: bool, images: bool = False
    ) -> None:
        self.processor = processor
        self.attention_mask = attention_mask
        self.images = images  # companions read the prompt without what the mask leaves out
        self.text: tuple[torch.Tensor, torch.Tensor | None] | None = None  # which is the same in all steps
        self.normalise = normalise  # beam search passes and expects log-probabilities

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Shift scores `[B, V]` (raw logits; log-probabilities in beam search) after the whole prefixes `[B, T]`."""
        mask = self.processor.explicit_mask(input_ids)
        if mask is None and self.attention_mask is not None:
            mask = expand_mask(self.attention_mask, input_ids)
        if self.images:
            assert mask is not None
            width = mask.shape[1]
            if self.text is None or len(self.text[0]) != len(input_ids):
                self.text = text_of(input_ids[:, :width], mask)
            text, mask = self.text
            input_ids = torch.cat([text, input_ids[:, width:]], 1)
        combined = self.processor.shifted(input_ids, scores, mask)
        return normalise_(combined) if self.normalise else combined
