"""Which modes of `generate()` a method supports; the others would be silently wrong, so they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from proxytune.errors import UnsupportedModeError
from proxytune.models.adapter_names import names_on

__all__ = ["refuse_adapter_names", "refuse_modes"]


def refuse_modes(loop: str, model: Any, generation_config: Any, assistant_model: Any, *, beams: bool = False) -> None:
    """Raise UnsupportedModeError unless the call is greedy decoding or sampling (with `beams` also beam search).

    Encoder-decoders are refused too.
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


def refuse_adapter_names(loop: str, model: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModeError for an adapter per row, of a composed model's base or by PEFT's `generate()`.

    So for aLoRA, which PEFT applies to each row from a position of its own on.
    """
    names, on = model_kwargs.get("adapter_names"), names_on(model)
    if names is not None or on:
        for module, number in on:  # PEFT would leave them there after an error
            del module._forward_pre_hooks[number]
        raise UnsupportedModeError.of(
            "adapter_names",
            expected=f"none with {loop}, which runs parts of the model on other rows than the prompts'",
            got="an adapter, or an offset of aLoRA, for each row of a PEFT model"
            if names is None
            else ", ".join(names),
            remedy="Use one adapter per call, set_adapter(name) of the PEFT model, or another loop.",
        )
