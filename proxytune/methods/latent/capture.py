"""The logits processors that pass the scores of a `generate()` to its latent steps."""

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
from proxytune.models.foreign_processors import given

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
"""The processors that generate() puts at the end of the list; some truncate."""


def with_capture(processors: Sequence[LogitsProcessor], steps: LatentSteps) -> LogitsProcessorList:
    """A new list of processors that passes the scores to `steps`, before the warpers and at the end."""
    first = len(processors)
    while first and isinstance(given(processors[first - 1]), _WARPERS):
        first -= 1
    return LogitsProcessorList([*processors[:first], SpanCloser(steps), *processors[first:], Capture(steps)])


class SpanCloser(LogitsProcessor):
    """Forces the end of a thinking span that a cold stop has ended; stands before the warpers."""

    supports_continuous_batching = False

    def __init__(self, steps: LatentSteps) -> None:
        self.steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Force the tokens that are due in scores `[B, V]`."""
        return self.steps.write(input_ids, scores)


class Capture(LogitsProcessor):
    """Passes the scores of each step to the latent steps; stands last."""

    supports_continuous_batching = False
    per_row_state = True
    setting = "latent steps"

    def __init__(self, steps: LatentSteps) -> None:
        self.steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Capture the distribution of a step; the scores stay as they are."""
        self.steps.capture(input_ids, scores)
        return scores


class EarlyCapture(Capture):
    """`SpanCloser` and `Capture` in one, for a place before the given warpers."""

    def __init__(self, steps: LatentSteps, warpers: Sequence[LogitsProcessor]) -> None:
        """Take the warpers that come later in the list."""
        super().__init__(steps)
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Force the tokens that are due, and capture the distribution that the warpers will make of the scores."""
        scores = self.steps.write(input_ids, scores)
        self.steps.capture(input_ids, self.warpers(input_ids, scores))
        return scores
