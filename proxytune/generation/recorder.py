"""Scores, logits and states that `generate()` was asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

__all__ = ["OutputRecorder"]


class OutputRecorder:
    """The scores, logits and states of each step, as far as they were asked for.

    Attributes:
        scores: `[B, V]` for each step, float32, after all processors; None if not asked for.
        logits: `[B, V]` for each step, float32, before any; None if not asked for.
    """

    def __init__(self, generation_config: Any) -> None:
        """See what is asked for.

        Args:
            generation_config: The settings.
        """
        asked = generation_config.return_dict_in_generate

        def empty(wanted: bool | None) -> tuple[Any, ...] | None:
            return () if asked and wanted else None

        self.scores = empty(generation_config.output_scores)
        self.logits = empty(generation_config.output_logits)
        self._attentions = empty(generation_config.output_attentions)
        self._hidden_states = empty(generation_config.output_hidden_states)

    @property
    def asked(self) -> bool:
        """Whether scores or logits were asked for."""
        return self.scores is not None or self.logits is not None

    def add(self, outputs: Any) -> None:
        """Keep the states of a forward pass.

        Args:
            outputs: What the model returned.
        """
        if self._attentions is not None:
            self._attentions += (outputs.attentions,)
        if self._hidden_states is not None:
            self._hidden_states += (outputs.hidden_states,)

    def output(self, sequences: torch.Tensor, cache: Any) -> GenerateDecoderOnlyOutput:
        """What `generate()` returns.

        Args:
            sequences: `[B, T + new]`, int64.
            cache: The cache; None if there is none.

        Returns:
            The output of transformers' own loop.
        """
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.scores,
            logits=self.logits,
            attentions=self._attentions,
            hidden_states=self._hidden_states,
            past_key_values=cache,
        )
