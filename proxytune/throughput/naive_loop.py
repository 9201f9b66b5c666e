"""Proxy-tuning as first published (Liu et al. 2024, arXiv 2401.08565): three whole models, one after the other.

The bench's reference point, not part of the product. Each model keeps its own cache and computes the head for all
positions of the prompt; the members run in sequence, warping sorts the whole vocabulary, and the draw goes through a
softmax in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from proxytune.models.members.cache_name import CACHE, cache_of

__all__ = ["naive_generate"]


@torch.no_grad()
def naive_generate(
    models: Sequence[PreTrainedModel],
    alpha: float,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    on_token: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Generate by three forward passes in sequence per token.

    Args:
        models: Base, expert and antiexpert.
        alpha: Strength α of the shift.
        input_ids: `[B, T]`, int64, without padding.
        config: `max_new_tokens`, `do_sample`, `temperature`, `top_k` and `top_p` are read; no row ends early.
        on_token: Called after each token.

    Returns:
        `[B, T + new]`, int64.
    """
    mask = torch.ones_like(input_ids)  # [B, T]
    caches: list[object] = [None] * len(models)
    inputs = input_ids
    for _ in range(config.max_new_tokens or 0):
        last = []
        for i, model in enumerate(models):
            out = model(input_ids=inputs, attention_mask=mask, **{CACHE: caches[i]}, use_cache=True)
            caches[i] = cache_of(out)
            last.append(out.logits[:, -1, :])  # [B, V_i]
        base, expert, antiexpert = last
        shared = min(expert.shape[-1], base.shape[-1])
        logits = base.float()  # [B, V]
        logits[:, :shared] += alpha * (expert[:, :shared] - antiexpert[:, :shared])
        if config.do_sample:
            probabilities = nn.functional.softmax(_warped(logits, config), dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1)  # [B, 1]
        else:
            tokens = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        inputs = tokens
        on_token()
    return input_ids


def _warped(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Temperature, top-k and top-p in this order, as transformers applies them."""
    logits = logits / config.temperature
    if config.top_k:
        least = torch.topk(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p is not None and config.top_p < 1.0:
        ordered, order = torch.sort(logits, descending=False)
        removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - config.top_p
        removed[:, -1:] = False
        logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return logits
