"""What `step` and `verify` return, and the names of `step`'s outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["OF_DRAWS", "OUTPUTS", "StepOutput", "VerifyOutput"]


@dataclass(frozen=True, eq=False)
class StepOutput:
    """Outputs of `step`, None for those not in `want`. B rows, N draws; float32 unless a dtype is given.

    Attributes:
        tokens: `[B, N]`, int64: the draws, largest key first; without `sampling` the argmax. −1 in rows without a
            distribution, and where fewer than N tokens can be drawn.
        logprobs: `[B, N]`, nats: log-probability of the token under the combined distribution (temperature 1, no
            truncation). −inf for a draw after the last token that can be drawn; NaN in rows without a distribution.
        draw_logprobs: `[B, N]`, nats: under the distribution drawn from; −inf and NaN likewise.
        keys: `[B, N]`, descending: `draw_logprobs` + Gumbel. The (k+1)-th is the κ of Kool et al. 2019 (arXiv
            1903.06059), from which the weights of k draws without replacement follow.
        lse: `[B]`: log Σ exp(combined logits).
        entropy: `[B]`, nats, at temperature 1 over all tokens.
        varentropy: `[B]`, nats²: Σ p (log p + H)².
        argmax: `[B]`, int64: the first of the largest.
        kl: `[B]`, nats: KL(combined ‖ base).
        temperature: `[B]`: the one used.
        fork: `[B]`, bool: entropy above the fork threshold.
        confidence: `[B]`, nats: −mean log p of the 20 most probable tokens (DeepConf, arXiv 2508.15260), or of all
            unmasked ones if fewer; larger is more confident. More than 5,000 nats below the largest logit is masked.
        kept: `[B]`, int64: how many tokens could have been drawn.
        scores: `[B, V]`: the combined logits.
    """

    tokens: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    draw_logprobs: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    varentropy: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    fork: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    @classmethod
    def holding(cls, found: Mapping[str, torch.Tensor]) -> StepOutput:
        """An output of what was found, by name, without a call for each field: a class holds its fields' defaults."""
        out = object.__new__(cls)
        vars(out).update(found)
        return out


@dataclass(frozen=True, eq=False)
class VerifyOutput:
    """Outputs of `verify`, for B rows and up to K drafts.

    Attributes:
        tokens: `[B, K + 1]`, int64: the accepted drafts, the token drawn after them (−1 without a distribution), then
            −1.
        accepted: `[B]`, int64: how many drafts were accepted, 0 to K.
    """

    tokens: torch.Tensor
    accepted: torch.Tensor


OF_DRAWS = ("draw_logprobs", "keys", "temperature", "fork", "kept")


"""Outputs that require `sampling`."""


OUTPUTS = (
    "tokens", "logprobs", *OF_DRAWS, "lse", "entropy", "varentropy", "argmax", "kl", "confidence", "scores",
)  # fmt: skip


"""The names that `want` can hold."""
