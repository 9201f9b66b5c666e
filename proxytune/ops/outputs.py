"""What a decoding step can be asked for, or the verification of drafts, and what each of it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["OF_DRAWS", "OUTPUTS", "StepOutput", "VerifyOutput"]


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a step found; None for what was not asked for. B rows, N draws; float32 where no dtype is given.

    Attributes:
        tokens: `[B, N]`, int64: the draws in the order of their keys; the argmax without `sampling`. −1 in a row that
            has no distribution, and where fewer than N tokens are left.
        logprobs: `[B, N]`, nats: log-probability of the token under the combined distribution itself (temperature 1,
            nothing truncated). −inf beside a draw that found no token.
        draw_logprobs: `[B, N]`, nats: under the distribution drawn from.
        keys: `[B, N]`: `draw_logprobs` + Gumbel; descending. The (k+1)-th is the κ of Kool et al. 2019
            (arXiv 1903.06059), from which the weights of k draws without replacement follow.
        lse: `[B]`: log Σ exp(combined logits).
        entropy: `[B]`, nats, at temperature 1 over all tokens.
        varentropy: `[B]`, nats²: Σ p (log p + H)².
        argmax: `[B]`, int64: the first of the largest.
        kl: `[B]`, nats: KL(combined ‖ base).
        temperature: `[B]`: the one used.
        fork: `[B]`, bool: entropy above the fork threshold.
        confidence: `[B]`, nats: −mean log p of the 20 most probable tokens (DeepConf, arXiv 2508.15260), of those that
            are not masked where fewer are left; larger is more confident.
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


@dataclass(frozen=True, eq=False)
class VerifyOutput:
    """What became of drafted tokens. B rows, K drafts at most.

    Attributes:
        tokens: `[B, K + 1]`, int64: the accepted drafts, then the token that was drawn after them (−1 where there is no
            distribution to draw from), then −1.
        accepted: `[B]`, int64: how many drafts were accepted, 0 to K.
    """

    tokens: torch.Tensor
    accepted: torch.Tensor


OF_DRAWS = ("draw_logprobs", "keys", "temperature", "fork", "kept")


"""Outputs that only a draw has."""


OUTPUTS = (
    "tokens", "logprobs", *OF_DRAWS, "lse", "entropy", "varentropy", "argmax", "kl", "confidence", "scores",
)  # fmt: skip


"""The names that `want` can hold."""
