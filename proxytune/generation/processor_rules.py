"""Which logits processors a loop cannot run, and why: one list for all loops."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Flag, auto

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from proxytune.errors import UnsupportedModeError
from proxytune.generation.prompt_rows import expand_to_rows, owner_of
from proxytune.models.foreign_processors import checked, given

__all__ = ["bind_to_prompts", "refuse_processors", "refuse_stateful"]


class _Trait(Flag):
    PER_ROW = auto()  # keeps state per row of the batch; ours set `per_row_state = True`
    PER_CALL = auto()  # assumes that each call is one more token of every row
    OTHER_MODEL = auto()  # runs a model on the token ids; ours set `shifts_logits = True`


_KNOWN: dict[type[LogitsProcessor], tuple[str, _Trait]] = {
    EncoderRepetitionPenaltyLogitsProcessor: ("encoder_repetition_penalty", _Trait.PER_ROW),
    EncoderNoRepeatNGramLogitsProcessor: ("encoder_no_repeat_ngram_size", _Trait.PER_ROW),
    UnbatchedClassifierFreeGuidanceLogitsProcessor: (
        "guidance_scale",
        _Trait.PER_ROW | _Trait.PER_CALL | _Trait.OTHER_MODEL,
    ),
    SynthIDTextWatermarkLogitsProcessor: ("watermarking_config", _Trait.PER_ROW | _Trait.PER_CALL),
}
"""Processor of transformers → the setting that turns it on, and its traits."""


def _first(processors: Sequence[LogitsProcessor], trait: _Trait) -> tuple[LogitsProcessor, str] | None:
    """The first processor that has the trait, and the setting that turns it on."""
    for processor in processors:
        for kind, (setting, traits) in _KNOWN.items():
            if isinstance(given(processor), kind) and trait in traits:
                return processor, setting
        if trait is _Trait.PER_ROW and getattr(processor, "per_row_state", False):
            return processor, getattr(processor, "setting", type(processor).__name__)
    return None


def bind_to_prompts(loop: str, processors: Sequence[LogitsProcessor], *, rows_move: bool = True) -> LogitsProcessorList:
    """The processors as a tree can run them: `prefix_allowed_tokens_fn` gets the number of the prompt, not of the row.

    The result has to be called inside `proxytune.generation.prompt_rows.rows_of_prompts`. If rows come, go and change
    places, the users' own processors are checked to be functions of the ids.

    Raises:
        UnsupportedModeError: If a processor keeps state per row: a tree's rows come, go and change places.
    """
    if found := _first(processors, _Trait.PER_ROW):
        processor, setting = found
        raise UnsupportedModeError.of(
            setting,
            expected=f"none with {loop}: it keeps state per row of the batch, and branches come and go",
            got=f"a {type(processor).__name__}",
            remedy="Leave it out, or custom_generate.",
        )
    return checked(map(_bound, processors), f"{loop} moves rows" if rows_move else None, flip=True)


def _bound(processor: LogitsProcessor) -> LogitsProcessor:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        return _OfPrompts(processor)
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(
        getattr(processor, "prompt_ignore_length", None), torch.Tensor
    ):
        return _PenaltyOfPrompts(processor)
    return processor


class _PenaltyOfPrompts(RepetitionPenaltyLogitsProcessor):
    """A penalty that leaves out the padding of each row's prompt; transformers 5.24 makes one for rows of a batch."""

    def __init__(self, processor: RepetitionPenaltyLogitsProcessor) -> None:
        super().__init__(processor.penalty, processor.prompt_ignore_length)
        self._padding = processor.prompt_ignore_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        of_rows = expand_to_rows(self._padding, len(input_ids))
        assert of_rows is not None, "called outside of rows_of_prompts"
        self.prompt_ignore_length = of_rows
        found: torch.Tensor = super().__call__(input_ids, scores)
        return found


class _OfPrompts(PrefixConstrainedLogitsProcessor):
    """A constraint that is called with the number of a row's prompt instead of the row."""

    def __init__(self, processor: PrefixConstrainedLogitsProcessor) -> None:
        allowed = processor._prefix_allowed_tokens_fn

        def of_prompt(row: int, input_ids: torch.Tensor) -> list[int]:
            return allowed(owner_of(row), input_ids)

        super().__init__(of_prompt, num_beams=1)


def refuse_stateful(processors: Sequence[LogitsProcessor]) -> None:
    """Raise UnsupportedModeError for processors that count their calls: drafts are evaluated repeatedly."""
    if found := _first(processors, _Trait.PER_CALL):
        processor, setting = found
        raise UnsupportedModeError.of(
            setting,
            expected="processors that depend on the text alone",
            got=f"{type(processor).__name__}, which counts its calls, while drafts are evaluated more than once",
            remedy="Leave it out, or decode without speculation.",
        )


def refuse_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Raise UnsupportedModeError for a processor that runs a model on the token ids: it would not see latent inputs."""
    if any(getattr(p, "shifts_logits", False) for p in processors):
        raise UnsupportedModeError.of(
            "latent steps",
            expected="a model whose members all get a mixture of their own embeddings",
            got="a ProxyTuningLogitsProcessor, whose companions read the token ids",
            remedy="Compose the models with proxytune.wrap.",
        )
    if found := _first(processors, _Trait.OTHER_MODEL):
        processor, setting = found
        raise UnsupportedModeError.of(
            "latent steps",
            expected=f"no {setting}: its unconditional branch reads the token ids",
            got=f"a {type(processor).__name__}",
            remedy=f"Leave {setting} out.",
        )
