"""What transformers asks of the composed model beside its logits.

The inputs of a step, masks and caches for `generate()`; the parts that `PreTrainedModel` takes one model to have; and
the refusal of what could only go wrong silently.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from proxytune.cache import adopt
from proxytune.errors import InputError, UnsupportedModeError

__all__ = ["ComposedGenerationMixin", "TailMask", "refuse_arguments", "refuse_continuous_batching"]


class TailMask(LogitsProcessor):
    """Gives −inf to the ids past a width.

    The composed logits have −inf there anyway. This is for the drafts of assisted decoding, to which `generate()` hands
    the same processors: a draft must not propose an id that some member cannot embed.
    """

    supports_continuous_batching = False

    def __init__(self, width: int) -> None:
        """Set the width.

        Args:
            width: The number of ids that stay.
        """
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the tail.

        Args:
            input_ids: `[B, T]`; not looked at.
            scores: `[B, V]`.

        Returns:
            `[B, V]`, a new tensor if there is a tail.
        """
        if scores.shape[-1] <= self.width:
            return scores
        masked = scores.clone()
        masked[:, self.width :] = -torch.inf
        return masked


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for `init_continuous_batching`: paged caches hold one model's layers, and drop processors silently.

    Args:
        *args: Ignored.
        **kwargs: Ignored.

    Raises:
        UnsupportedModeError: Always; so also from `generate_batch` and `cache_implementation="paged"`.
    """
    raise UnsupportedModeError.of(
        "continuous batching",
        expected="generate() with a dynamic or static cache",
        got="generate_batch or a paged cache, which would run one model without the others",
        remedy="Use generate() with a left-padded batch.",
    )


def refuse_arguments(**given: Any) -> None:
    """Refuse forward arguments that the composition cannot serve.

    Args:
        **given: Name → value; None and False are as good as not given.

    Raises:
        InputError: If any other value is given.
    """
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name == "inputs_embeds":
            raise InputError.of(
                "inputs_embeds",
                expected="input_ids: the members do not share an embedding space",
                got="embeddings of one of them",
                remedy="Pass the token ids.",
            )
        raise InputError.of(
            name,
            expected="no such argument: logits are combined, hidden states and attentions are not",
            got=f"{name}={value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}",
            remedy="Ask the member itself, e.g. model.base(...).",
        )


class ComposedGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model that is composed of several, the base among them.

    Its name has to end like `GenerationMixin`: `can_generate()`, which pipelines ask, looks for that in the bases.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a step of `generate()`; the members build their own masks, so the 2-D mask is kept as it is.

        Args:
            input_ids: `[B, T]`.
            next_sequence_length: How many of the last ids are new; None for all.
            past_key_values: The composite cache.
            attention_mask: `[B, T]`.
            inputs_embeds: Refused.
            is_first_iteration: Whether this is a prompt.
            **kwargs: What else `generate()` hands over.

        Returns:
            The keyword arguments of `forward`.

        Raises:
            InputError: If `inputs_embeds` is given.
        """
        refuse_arguments(inputs_embeds=inputs_embeds)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        # For the stop strings; generate() hands it on with the model's arguments.
        kwargs.pop("tokenizer", None)
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None:
            position_ids = position_ids[..., -input_ids.shape[1] :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "is_first_iteration": is_first_iteration,
            **kwargs,
        }

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # Called only if the caller gave no mask. transformers then takes padding that is also EOS for text.
        pad, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
        if (
            inputs_tensor.ndim == 2
            and inputs_tensor.shape[0] > 1
            and pad is not None
            and eos is not None
            and bool(torch.isin(pad, eos))
            and bool((inputs_tensor[:, 0] == pad).any())
        ):
            raise InputError.of(
                "attention_mask",
                expected="a mask with a batch in which some prompt starts with the padding token",
                got=f"none, and the padding token ({int(pad)}) is also an EOS token, so that padding cannot be told "
                "from text",
                remedy="Pass the attention_mask that the tokenizer returns.",
            )
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.usable_ids < self.config.vocab_size:
            processors.insert(0, TailMask(self.usable_ids))
        return processors

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Before anything else sees the cache: assisted decoding asks its layers to record their past.
        if (cache := model_kwargs.get("past_key_values")) is not None:
            adopt(cache, self.config.member_configs, self.cache_owner)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _get_static_cache_init_shape(self) -> None:
        # Members differ in head counts and sizes, so each layer initialises itself at its first update.
        return None

    init_continuous_batching = staticmethod(refuse_continuous_batching)

    # --- what PreTrainedModel takes one model to have -----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The base's device; logits are returned there."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype; logits are float32 all the same."""
        return self.base.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The base's input embedding.

        Returns:
            The module.
        """
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's output embedding; its logits alone are not this model's.

        Returns:
            The module.
        """
        return self.base.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: each member has tied its own weights.

        Args:
            *args: Ignored.
            **kwargs: Ignored.
        """

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the attention implementation of all members.

        Args:
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        for member in self._members:
            member.model.set_attn_implementation(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: ids added to one member mean nothing to the others.

        Args:
            *args: Ignored.
            **kwargs: Ignored.

        Raises:
            UnsupportedModeError: Always.
        """
        raise UnsupportedModeError.of(
            "resize_token_embeddings",
            expected="members whose vocabularies agree",
            got="a request to change the base's alone",
            remedy="Resize every member before wrapping them.",
        )
