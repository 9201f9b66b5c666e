"""Plant next tokens in random models, so that the expert agrees with the composition at a given rate.

Each token has a successor. Embeddings are made so large that the last hidden state is the last token's embedding,
whatever the layers add; the head maps it to the successor. So the composed text is known, far from ties in any dtype,
and runs through all ids before it repeats. For a share of the tokens, expert and antiexpert have the same wrong
successor, which cancels in the sum: there the expert's draft is rejected. For another share the base is less sure of
the successor than elsewhere, which opens a gate. The rest of a pass, and its time, is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from proxytune.errors import InputError

__all__ = ["plant", "successors", "unsure_tokens"]

_LOUD = 100.0
"""Standard deviation of the embeddings; layers with usual random weights add only a few units."""
_SURE = 30.0
"""The planted token's logit, in nats; the others' are near 0."""
_LESS_SURE = 20.0
"""The planted token's logit where the base is unsure: still the most probable by far, at a larger entropy."""
_BLOCK = 40
"""Tokens in a row over which the rate is met as closely as possible, so that short texts have it too."""


def successors(width: int, rate: float, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token after each of V = `width` ids, by composition and expert; they agree on the share `rate`.

    Returns:
        Two `[V]`, int64: the first is one cycle through all ids.

    Raises:
        InputError: If the rate is outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise InputError.of("rate", expected="a share in [0, 1]", got=repr(rate), remedy="Pass e.g. 0.7.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(width, generator=generator)
    blocks = [torch.randperm(_BLOCK, generator=generator) for _ in range(-(-width // _BLOCK))]
    # The same for every rate: a higher rate agrees wherever a lower one does.
    coins = (torch.cat(blocks)[:width] + 0.5) / _BLOCK
    right, expert = torch.empty_like(order), torch.empty_like(order)
    right[order] = order.roll(-1)
    expert[order] = torch.where(coins < rate, order.roll(-1), order.roll(-2))
    return right, expert


def unsure_tokens(width: int, share: float, *, seed: int) -> torch.Tensor:
    """The ids of V = `width` after which the base is unsure: `[V]`, bool; the share of any 40 tokens in a row."""
    block = torch.randperm(_BLOCK, generator=torch.Generator().manual_seed(seed + 1))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))  # that of the text
    unsure = torch.empty(width, dtype=torch.bool)
    unsure[order] = (block.repeat(-(-width // _BLOCK))[:width] + 0.5) / _BLOCK < share
    return unsure


@torch.no_grad()
def plant(models: Mapping[str, PreTrainedModel], rate: float, *, unsure: float = 0.0, seed: int = 0) -> None:
    """Plant next tokens in base, expert and antiexpert, in place. May be called again with another rate.

    `unsure` is the share of tokens at which the base's entropy is larger than at the others.

    Raises:
        InputError: If the rate is outside [0, 1], or a head is tied.
    """
    tables = {role: model.get_input_embeddings().weight for role, model in models.items()}
    heads = {role: model.get_output_embeddings().weight for role, model in models.items()}
    for role, table in tables.items():
        if heads[role] is table:
            raise InputError.of(
                f"the {role}", expected="an untied head", got="a tied head", remedy="Build it with tied=False."
            )
    width = min(len(table) for table in tables.values())
    right, expert = successors(width, rate, seed=seed)
    for i, (role, table) in enumerate(tables.items()):
        if table.std() < _LOUD / 2:  # not planted yet
            generator = torch.Generator(table.device).manual_seed(seed + i)
            table.normal_(std=_LOUD, generator=generator)
        follows = (right if role == "base" else expert).to(table.device)
        sure = torch.full((width, 1), _SURE)
        if role == "base":
            sure[unsure_tokens(width, unsure, seed=seed)] = _LESS_SURE
        head = heads[role].zero_()
        head.index_add_(0, follows, table[:width] * (sure / _LOUD / table.shape[1]).to(table))
