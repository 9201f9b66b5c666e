"""Which modes of `generate()` a method can do; the others are refused, where they would be silently wrong."""

from __future__ import annotations

from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from proxytune.errors import UnsupportedModeError

__all__ = ["refuse_modes"]


def refuse_modes(loop: str, model: Any, generation_config: Any, assistant_model: Any, *, beams: bool = False) -> None:
    """Refuse what a method of greedy decoding and sampling, and maybe beam search, cannot do.

    Args:
        loop: Its name, for the message.
        model: The model.
        generation_config: The settings of the call.
        assistant_model: What was given as the assistant.
        beams: Whether it can do beam search too.

    Raises:
        UnsupportedModeError: For encoder-decoders and for every other mode.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModeError.of(
            loop,
            expected="a decoder-only model",
            got=f"{type(model).__name__}, an encoder-decoder",
            remedy="Decode without it.",
        )
    mode = generation_config.get_generation_mode(assistant_model)
    allowed = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
    if mode not in (allowed | {GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE} if beams else allowed):
        raise UnsupportedModeError.of(
            loop,
            expected="greedy decoding, sampling or beam search" if beams else "greedy decoding or sampling",
            got=f"settings for {mode.value.replace('_', ' ')}",
            remedy=f"Leave {loop} out, or the settings that ask for it (num_beams, assistant_model, "
            "prompt_lookup_num_tokens, penalty_alpha, …).",
        )
