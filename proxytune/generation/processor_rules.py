"""Logits processors that go by the number of a row: in a tree they are led to the row's prompt, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from proxytune.errors import UnsupportedModeError
from proxytune.generation.prompt_rows import owner_of
from proxytune.methods.latent.capture import Capture

__all__ = ["led_to_prompts", "refuse_processors", "refuse_stateful"]

_REFUSED: dict[type[LogitsProcessor], str] = {
    EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    Capture: "latent steps",
}
"""Processors that keep something for each row of the batch → the setting that asks for them."""


def led_to_prompts(loop: str, processors: Sequence[LogitsProcessor]) -> LogitsProcessorList:
    """The processors as a tree can run them: a constraint of `prefix_allowed_tokens_fn` gets the number of the prompt.

    Args:
        loop: The loop's name, for the message.
        processors: The processors as `generate()` made them; they stay as they are.

    Returns:
        The processors, to be called where `proxytune.generation.prompt_rows.owners` holds.

    Raises:
        UnsupportedModeError: If one keeps something for each row: rows come, go and change places.
    """
    for processor in processors:
        for kind, setting in _REFUSED.items():
            if isinstance(processor, kind):
                raise UnsupportedModeError.of(
                    setting,
                    expected=f"none with {loop}: what it keeps belongs to rows of the batch, and branches come and go",
                    got=f"a {type(processor).__name__}",
                    remedy="Leave it out, or custom_generate.",
                )
    return LogitsProcessorList(_OfPrompts(p) if type(p) is PrefixConstrainedLogitsProcessor else p for p in processors)


class _OfPrompts(PrefixConstrainedLogitsProcessor):
    """A constraint that is asked by the number of a row's prompt, not of the row."""

    def __init__(self, processor: PrefixConstrainedLogitsProcessor) -> None:
        allowed = processor._prefix_allowed_tokens_fn

        def of_prompt(row: int, input_ids: torch.Tensor) -> list[int]:
            return allowed(owner_of(row), input_ids)

        super().__init__(of_prompt, num_beams=1)


# They take each call for one more token of every row: the one feeds it to a model, the other rolls on a context.
_STATEFUL = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "a SynthID watermark",
}


def refuse_stateful(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse processors that would silently be wrong where positions are asked again, or out of order.

    Args:
        processors: The processors.

    Raises:
        UnsupportedModeError: If there is one.
    """
    for processor in processors:
        for kind, what in _STATEFUL.items():
            if isinstance(processor, kind):
                raise UnsupportedModeError.of(
                    what,
                    expected="processors that depend on the text alone",
                    got=f"{type(processor).__name__}, which counts its calls; drafts are asked about more than once",
                    remedy="Leave it out, or decode without speculation.",
                )


def refuse_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse processors that would not know of what is fed back.

    Args:
        processors: The processors of the call.

    Raises:
        UnsupportedModeError: If one runs a model on the token ids.
    """
    if any(getattr(p, "shifts_logits", False) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="a model whose members all get a mixture of their own embeddings",
            got="a ProxyTuningLogitsProcessor, whose companions read the token ids",
            remedy="Compose the models with proxytune.wrap.",
        )
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="no guidance_scale: its unconditional branch reads the token ids",
            got="one",
            remedy="Leave guidance_scale out.",
        )
