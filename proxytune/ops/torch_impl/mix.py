"""`proxytune.ops.mix` in torch: the sum in the order of the candidates, in float32."""

from __future__ import annotations

import torch

from proxytune.ops.noise import COORDINATES, LATENT, Noise, slotted

__all__ = []


def mix_rows(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    noise: Noise | None,
) -> torch.Tensor:
    wide = torch.promote_types(table.dtype, torch.float32)
    own = table.index_select(0, tokens)  # [B, D]
    by_candidate = weights.to(wide).t()[..., None]  # [K, B, 1]
    terms = table.index_select(0, ids.t().flatten()).view(*by_candidate.shape[:2], -1).to(wide)
    # −0, not 0, is the neutral element: x + −0 is x for every x, but −0 + 0 is 0.
    terms = terms.mul_(by_candidate).masked_fill_(by_candidate == 0, -0.0)
    x = terms[0]
    for term in terms[1:]:  # not sum(), whose order is its own
        x = x + term
    if noise is not None:
        coordinate = slotted(COORDINATES, torch.arange(table.shape[1], device=table.device))
        size = (_squares(x) / table.shape[1]).sqrt()
        x = x + sigma * size * noise.normal(coordinate[None], LATENT)
    mixed = x.to(table.dtype)
    taken = mixed.isfinite().all(1)
    if soft is not None:
        taken = taken & soft
    return torch.where(taken[:, None], mixed, own)


def _squares(x: torch.Tensor) -> torch.Tensor:
    # Pairwise by halves, since on some devices the order of sum() depends on the batch.
    width = x.shape[1]
    x = torch.nn.functional.pad(x.square(), (0, (1 << (width - 1).bit_length()) - width))
    while x.shape[1] > 1:
        left, right = x.chunk(2, 1)
        x = left + right
    return x
