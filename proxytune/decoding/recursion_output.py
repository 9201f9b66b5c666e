"""What stochastic recursion hands back: all trajectories of all prompts, and which of them was selected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from proxytune.decoding.metering import Meter
from proxytune.decoding.recursion import ValueHead

__all__ = ["RecursionOutput", "Trajectories", "measured"]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """All trajectories of all prompts. What follows a trajectory's end counts nowhere.

    Attributes:
        sequences: `[B, N, T]`, int64: prompt and generated tokens, padded at the right.
        lengths: `[B, N]`, int64: how many tokens were generated, an EOS token among them.
        mean_logprobs: `[B, N]`, float64, nats: the mean over them, of the trajectory's own noisy model, at temperature
            1 and before all processors.
        cycles: `[B, N]`, int64: the cycles that were used to predict them, in sum.
        values: `[B, N]`, float64: of the model's value head, at the state that the last token was predicted from; None
            without one.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    mean_logprobs: torch.Tensor
    cycles: torch.Tensor
    values: torch.Tensor | None = None


@dataclass
class RecursionOutput(ModelOutput):
    """What `StochasticRecursion` returns with `return_dict_in_generate`.

    Attributes:
        sequences: `[B, T]`, int64: the selected trajectories, cut to the longest; with `select=None` all of them,
            `[B · N, T]`, prompt after prompt.
        chosen: `[B]`, int64: which of its N trajectories each prompt got; None with `select=None`.
        scores: `[B, N]`, float64: what they were compared by; None with `select=None`.
        trajectories: All of them.
    """

    sequences: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    trajectories: Trajectories | None = None


def measured(texts: torch.Tensor, meter: Meter, head: ValueHead | None, prompts: int) -> Trajectories:
    """Gather what was measured, prompt after prompt.

    Args:
        texts: `[B · N, T]`, int64.
        meter: What was measured of its rows.
        head: The model's value head; None if it has none.
        prompts: B.

    Returns:
        The trajectories.
    """
    values = None
    if head is not None:
        assert meter.states is not None
        values = head(meter.states).to(texts.device, torch.float64).view(prompts, -1)
    return Trajectories(
        sequences=texts.view(prompts, -1, texts.shape[1]),
        lengths=meter.lengths.view(prompts, -1),
        mean_logprobs=(meter.logprobs / meter.lengths.clamp(min=1)).view(prompts, -1),
        cycles=meter.cycles.view(prompts, -1),
        values=values,
    )
