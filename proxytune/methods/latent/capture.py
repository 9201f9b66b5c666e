"""The logits processors that show the scores of a `generate()` to its latent steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from proxytune.methods.latent.steps import LatentSteps

__all__ = ["Capture", "EarlyCapture", "SpanCloser", "with_capture"]

_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TopHLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)
"""What generate() puts at the end of the list; some of it truncates."""


def with_capture(processors: Sequence[LogitsProcessor], feedback: LatentSteps) -> LogitsProcessorList:
    """A list of processors with what shows the scores to a generation's latent steps.

    Args:
        processors: The processors and warpers.
        feedback: The latent steps.

    Returns:
        A new list.
    """
    first = len(processors)
    while first and isinstance(processors[first - 1], _WARPERS):
        first -= 1
    return LogitsProcessorList([*processors[:first], SpanCloser(feedback), *processors[first:], Capture(feedback)])


class SpanCloser(LogitsProcessor):
    """Writes the end of a thinking span that a cold stop has ended; stands before the warpers."""

    supports_continuous_batching = False

    def __init__(self, feedback: LatentSteps) -> None:
        """Stand before the warpers.

        Args:
            feedback: The generation's latent steps.
        """
        self.feedback = feedback

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Write what is due.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            scores: `[B, V]`, float32.

        Returns:
            `[B, V]`.
        """
        return self.feedback.write(input_ids, scores)


class Capture(LogitsProcessor):
    """Shows the scores of each step to the latent steps of a generation; stands last."""

    supports_continuous_batching = False
    per_row_state = True
    setting = "latent steps"

    def __init__(self, feedback: LatentSteps) -> None:
        """Stand at the end of a list of processors.

        Args:
            feedback: The generation's latent steps.
        """
        self.feedback = feedback

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the distribution of a step.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            scores: `[B, V]`, float32.

        Returns:
            The scores.
        """
        self.feedback.capture(input_ids, scores)
        return scores


class EarlyCapture(Capture):
    """Both in one, for a place before warpers that are told."""

    def __init__(self, feedback: LatentSteps, warpers: Sequence[LogitsProcessor]) -> None:
        """Stand before the warpers.

        Args:
            feedback: The generation's latent steps.
            warpers: The warpers that come later in the list.
        """
        super().__init__(feedback)
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Write what is due, and keep the distribution that the warpers will make of it.

        Args:
            input_ids: The whole texts, `[B, T]`, int64.
            scores: `[B, V]`, float32.

        Returns:
            `[B, V]`.
        """
        scores = self.feedback.write(input_ids, scores)
        self.feedback.capture(input_ids, self.warpers(input_ids, scores))
        return scores
