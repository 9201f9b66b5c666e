"""A list of logits processors that looks once at what each kind of them takes, instead of at every token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable
from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList

__all__ = ["ProcessorList"]


class ProcessorList(LogitsProcessorList):
    """As transformers' own, which reads every processor's signature in every call."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Call the processors in order on scores `[B, V]` after ids `[B, T]`."""
        if not all(_takes_scores_alone(cast(Hashable, type(processor))) for processor in self):
            processed: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
            return processed
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


@functools.cache
def _takes_scores_alone(kind: Hashable) -> bool:
    """Whether processors of a class take ids and scores, and nothing else."""
    assert isinstance(kind, type)
    return issubclass(kind, LogitsProcessor) and len(inspect.signature(kind.__call__).parameters) == 3
