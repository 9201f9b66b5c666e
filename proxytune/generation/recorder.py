"""Collects the scores, logits and states that `generate()` was asked to return."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from proxytune.models.members.cache_name import CACHE

__all__ = ["OutputRecorder"]


class OutputRecorder:
    """The requested scores, logits and states of each step.

    Attributes:
        scores: `[B, V]` for each step, float32, after all processors; None if not requested.
        logits: `[B, V]` for each step, float32, before any processor; None if not requested.
    """

    def __init__(self, generation_config: Any) -> None:
        as_dict = generation_config.return_dict_in_generate

        def empty(wanted: bool | None) -> tuple[Any, ...] | None:
            return () if as_dict and wanted else None

        self.scores = empty(generation_config.output_scores)
        self.logits = empty(generation_config.output_logits)
        self._attentions = empty(generation_config.output_attentions)
        self._hidden_states = empty(generation_config.output_hidden_states)

    @property
    def asked(self) -> bool:
        """Whether scores or logits were requested."""
        return self.scores is not None or self.logits is not None

    def add(self, outputs: Any) -> None:
        """Keep the attentions and hidden states of a forward pass."""
        if self._attentions is not None:
            self._attentions += (outputs.attentions,)
        if self._hidden_states is not None:
            self._hidden_states += (outputs.hidden_states,)

    def output(self, sequences: torch.Tensor, cache: Any) -> GenerateDecoderOnlyOutput:
        """The output of transformers' own loop, for sequences `[B, T + new]`."""
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.scores,
            logits=self.logits,
            attentions=self._attentions,
            hidden_states=self._hidden_states,
            **{CACHE: cache},
        )
