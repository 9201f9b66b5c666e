"""Which of `generate()`'s logits processors become part of the fused step, and which have to run before it.

transformers lists penalties and constraints first, then the user's processors, then the warpers. What `SamplingParams`
supports is at the end of that list, in the same order: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from proxytune.models.assisted import TailMask
from proxytune.models.processor_list import ProcessorList
from proxytune.ops.sampling_params import LEAST_TEMPERATURE, SamplingParams

__all__ = ["ProcessorPlan", "plan_processors"]

_SETTINGS: dict[type[LogitsProcessor], str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""Warper → its setting, in the order in which `SamplingParams` applies them."""
_ORDER = tuple(_SETTINGS)


@dataclass(frozen=True, eq=False)
class ProcessorPlan:
    """A list of processors in three parts, which together do what the list does.

    Attributes:
        usable: How many ids a `TailMask` at the front leaves; None without one.
        before: Processors that run unchanged, on the combined logits.
        warpers: Processors that became settings of the draw.
        do_sample: Whether tokens are sampled.
    """

    usable: int | None
    before: LogitsProcessorList
    warpers: LogitsProcessorList
    do_sample: bool

    def sampling(self, rows: int, width: int, device: torch.device, **more: Any) -> SamplingParams:
        """The warpers as settings for `rows` rows of `width` columns. Waits for the device: call it before the loop."""
        settings: dict[str, Any] = {_SETTINGS[type(w)]: _value(w) for w in self.warpers}
        if "top_k" in settings:
            settings["top_k"] = min(settings["top_k"], width)  # as the warper does
        return SamplingParams.of(rows, **settings, **more, device=device)


def plan_processors(processors: Sequence[LogitsProcessor], do_sample: bool) -> ProcessorPlan:
    """Split a list of processors: its longest tail that settings of a draw can express, and the rest.

    Without `do_sample` nothing is drawn, so warpers that the user added run unchanged.
    """
    rest = list(processors)
    # A `TailMask` at the front equals fewer columns; elsewhere it corrects the processor before it.
    usable = rest.pop(0).width if rest and type(rest[0]) is TailMask else None
    warpers: list[LogitsProcessor] = []
    allowed = len(_ORDER)
    while do_sample and rest and _translatable(rest[-1]) and _ORDER.index(type(rest[-1])) < allowed:
        allowed = _ORDER.index(type(rest[-1]))
        warpers.insert(0, rest.pop())
    return ProcessorPlan(usable, ProcessorList(rest), ProcessorList(warpers), do_sample)


def _translatable(processor: LogitsProcessor) -> bool:
    # Exact classes only: a subclass may do anything. Nor does a step support min_tokens_to_keep > 1 (beams) or a
    # filter_value other than −inf.
    if type(processor) not in _SETTINGS:
        return False
    if getattr(processor, "min_tokens_to_keep", 1) != 1 or getattr(processor, "filter_value", -torch.inf) != -torch.inf:
        return False
    name, value = _SETTINGS[type(processor)], _value(processor)
    if name == "top_k":
        return value < 2**31
    # A float64 setting of the warper may be 0 or infinite in the step's float32.
    rounded = float(torch.tensor(value, dtype=torch.float32))
    if name == "temperature":
        return LEAST_TEMPERATURE <= rounded <= torch.finfo(torch.float32).max
    return name == "min_p" or 0 < rounded <= 1


def _value(warper: LogitsProcessor) -> Any:
    return getattr(warper, _SETTINGS[type(warper)])
