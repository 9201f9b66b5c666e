"""What `ProxyTuningLogitsProcessor.attach` puts on a model, and what it becomes during one `generate()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.prompt_rows import expand_mask
from proxytune.models.assisted import refuse_self_speculation
from proxytune.ops import normalise_

__all__ = ["AttachedProcessor", "CompanionPrefetch", "SteeredProcessors", "refuse_no_ids"]


class _Steering(Protocol):
    """What is read of a `ProxyTuningLogitsProcessor`."""

    overlap: bool

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None: ...
    def read_in_chunks(self, size: int | None) -> None: ...
    def explicit_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None: ...
    def shifted(
        self, input_ids: torch.Tensor, scores: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor: ...


def refuse_no_ids(length: int | None) -> None:
    """Refuse a prefix without ids.

    Args:
        length: Its length; None if it is not known yet.

    Raises:
        InputError: If it is 0.
    """
    if length == 0:
        raise InputError.of(
            "input_ids",
            expected="the prompt's token ids, which the companions read",
            got="none: generate() was given inputs_embeds only, or an empty prompt",
            remedy="Pass input_ids.",
        )


class SteeredProcessors:
    """Replaces a steered model's `_get_logits_processor`."""

    changes_logits = True

    def __init__(self, processor: _Steering) -> None:
        self.processor = processor

    def __call__(
        self,
        original: Callable[..., LogitsProcessorList],
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """Build the processors of one `generate()`, the shift first.

        Args:
            original: The method.
            generation_config: The settings of the call.
            input_ids_seq_length: The length of the prompts, in tokens.
            *args: As in transformers.
            model_kwargs: What the model will be called with; has the mask, expanded for beams.
            **kwargs: As in transformers.

        Returns:
            The processors.

        Raises:
            InputError: If the ids are missing or not the whole prefix, or the shift would be added twice.
            UnsupportedModeError: If the mode would run the base unsteered (guidance, drafting with parts of itself).
        """
        processors = original(generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs)
        if any(isinstance(p, AttachedProcessor) and p.processor is self.processor for p in processors):
            return processors  # the model drafts for itself, and was handed its own processors
        if any(getattr(p, "shifts_logits", False) for p in processors):
            raise InputError.of(
                "logits_processor",
                expected="no other processor of this kind on a model that one is attached to",
                got="one: the shifts would add up",
                remedy="Leave it out of logits_processor, or detach() the attached one.",
            )
        if not generation_config.is_assistant:
            processors = LogitsProcessorList(
                p.for_call(generation_config, processors) if hasattr(p, "for_call") else p for p in processors
            )
        processors.insert(0, self._steering(generation_config, input_ids_seq_length, model_kwargs or {}))
        return processors

    def _steering(
        self, generation_config: GenerationConfig, length: int | None, model_kwargs: dict[str, Any]
    ) -> AttachedProcessor:
        """Take from a `generate()` that starts what its steps will not tell, and refuse what would go wrong."""
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
        past = model_kwargs.get("past_key_values")
        seen = length or 0
        # generate() drops a mask of ones, but remembers how long it was.
        covered = getattr(generation_config, "_mask_length", seen) if mask is None else mask.shape[1]
        if covered != seen or (past is not None and seen <= int(past.get_seq_length())):
            raise InputError.of(
                "input_ids",
                expected="the whole prefix, with a cache too: the companions read it from the ids",
                got=f"only the {seen} new ids",
                remedy="Pass all ids; generate() forwards through the base only those that the cache has not seen.",
            )
        self.processor.read_in_chunks(generation_config.prefill_chunk_size)
        return AttachedProcessor(self.processor, mask, normalise=generation_config.num_beams > 1)


class CompanionPrefetch:
    """Replaces a steered model's `prepare_inputs_for_generation`.

    It is called right before every forward pass of the base, with the whole prefix, beams in their new order, which a
    hook on the module would not see. So the companions begin with the same step there; the processor asks them for it
    afterwards, and finds it remembered. Where this was the wrong prefix, or came not at all, they run when asked.
    """

    def __init__(self, processor: _Steering) -> None:
        self.processor = processor

    def __call__(
        self, original: Callable[..., dict[str, Any]], input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the inputs of a forward pass, and let the companions begin.

        Args:
            original: The method.
            input_ids: The whole prefix, `[B, T]`, int64.
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            The inputs.

        Raises:
            InputError: As `ProxyTuningLogitsProcessor`.
        """
        inputs = original(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        # Not for prompts, which may come in chunks, nor for drafts, about which the companions have been asked already.
        step = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        if step and self.processor.overlap and (mask is None or mask.shape == input_ids.shape):
            self.processor.begin(input_ids, mask)
        return inputs


class AttachedProcessor(LogitsProcessor):
    """An attached processor during one `generate()`: with that call's mask, and as its mode needs it."""

    supports_continuous_batching = False
    shifts_logits = True

    def __init__(self, processor: _Steering, attention_mask: torch.Tensor | None, *, normalise: bool) -> None:
        self.processor = processor
        self.attention_mask = attention_mask
        self.normalise = normalise  # beam search hands over log-probabilities, and wants such back

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Shift the scores of one step.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`, float32: raw logits, or log-probabilities in beam search.

        Returns:
            `[B, V]`, float32, of the same kind.

        Raises:
            InputError: As `ProxyTuningLogitsProcessor`.
        """
        mask = self.processor.explicit_mask(input_ids)
        if mask is None and self.attention_mask is not None:
            mask = expand_mask(self.attention_mask, input_ids)
        combined = self.processor.shifted(input_ids, scores, mask)
        return normalise_(combined) if self.normalise else combined
