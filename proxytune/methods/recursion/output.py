"""What `RecursionDecoding` returns: all trajectories of all prompts, and which of them was selected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from proxytune.methods.recursion.adapters import ValueHead
from proxytune.methods.recursion.meter import Meter

__all__ = ["RecursionOutput", "Trajectories", "measured"]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """All trajectories of all prompts. What follows a trajectory's end counts nowhere.

    Attributes:
        sequences: `[B, N, T]`, int64: prompt and generated tokens, padded at the right with the padding token, or with
            the trajectory's last token if the call has none.
        lengths: `[B, N]`, int64: number of generated tokens, an EOS token included.
        mean_logprobs: `[B, N]`, float64, nats: their mean log-probability under the trajectory's own noisy model, at
            temperature 1 and before all processors.
        cycles: `[B, N]`, int64: cycles used to predict them, summed.
        values: `[B, N]`, float64: the model's value head at the state that the last token was predicted from; None
            without a value head.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    mean_logprobs: torch.Tensor
    cycles: torch.Tensor
    values: torch.Tensor | None = None


@dataclass
class RecursionOutput(ModelOutput):
    """What `RecursionDecoding` returns with `return_dict_in_generate`.

    Attributes:
        sequences: `[B, T]`, int64: the selected trajectories, cut to the longest and padded as those are; with
            `select=None` all of them, `[B · N, T]`, prompt after prompt.
        chosen: `[B]`, int64: the index of the selected trajectory of each prompt; None with `select=None`. Among equal
            scores, also if all are −inf, it has the highest mean log-probability.
        scores: `[B, N]`, float64: what they were compared by; in a vote how many of the N have the same answer, −inf
            without an answer. None with `select=None`.
        trajectories: All of them.
    """

    sequences: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    trajectories: Trajectories | None = None


def measured(
    texts: torch.Tensor,
    meter: Meter,
    head: ValueHead | None,
    prompts: int,
    *,
    length: int,
    pad: torch.Tensor | None,
) -> Trajectories:
    """Gather what the meter measured for `texts` `[B · N, T]`, whose first `length` columns are the prompt."""
    values = None
    if head is not None:
        assert meter.states is not None
        values = head(meter.states).to(texts.device, torch.float64).view(prompts, -1)
    return Trajectories(
        sequences=_padded(texts, length + meter.lengths, pad).view(prompts, -1, texts.shape[1]),
        lengths=meter.lengths.view(prompts, -1),
        mean_logprobs=(meter.logprobs / meter.lengths.clamp(min=1)).view(prompts, -1),
        cycles=meter.cycles.view(prompts, -1),
        values=values,
    )


def _padded(texts: torch.Tensor, ends: torch.Tensor, pad: torch.Tensor | None) -> torch.Tensor:
    """Texts `[R, T]` with what follows their ends `[R]` replaced by `pad`, or by the last token if that is None."""
    last = texts.gather(1, (ends - 1).clamp(min=0)[:, None])
    filler = last if pad is None else pad.to(texts.device)
    return torch.where(torch.arange(texts.shape[1], device=texts.device) < ends[:, None], texts, filler)
