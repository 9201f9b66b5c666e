"""Draws without replacement from measured rows: in two levels, or among the candidates of a truncation."""

from __future__ import annotations

import torch

from proxytune.ops.noise import TILES, TOKENS, Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.distribution import tempered
from proxytune.ops.torch_impl.rows import TILE, MemberRows
from proxytune.ops.torch_impl.truncate import Truncation, largest, truncate

__all__ = ["draw"]


def draw(
    rows: MemberRows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: SamplingParams,
    noise: Noise,
    draws: int,
) -> dict[str, torch.Tensor]:
    """Draw tokens without replacement; arguments as for `proxytune.ops.torch_impl.distribution.distribution_of`.

    Returns:
        "fork" `[B]` bool, "temperature" `[B]`, "kept" `[B]` int64; `[B, draws]`: "tokens" int64 (−1 where no token is
        left), their logits "relative" to `top`, "draw_logprobs", "keys".
    """
    temperature, fork, mass, relative, total = tempered(tiles, entropy, top, sampling)

    # Whether a row is truncated decides its path, so that its result does not depend on the other rows.
    choices = []
    if sampling.some_truncated:
        kept = truncate(rows, tiles["groups"], top, temperature, total, sampling)
        choices.append(_draw_truncated(kept, top, noise, draws))
    if not sampling.all_truncated:
        assert mass is not None
        assert relative is not None
        plain = _draw_plain(rows, mass, relative, top, temperature.reciprocal(), total, noise, draws)
        choices.append(plain | {"kept": tiles["live"].sum(1)} if "live" in tiles else plain)
    out = choices[0]
    if len(choices) == 2:
        own = sampling.truncated
        out = {k: torch.where(own[:, None] if x.ndim == 2 else own, out[k], x) for k, x in choices[1].items()}
    out.setdefault("kept", torch.zeros_like(fork, dtype=torch.int64))  # not asked for
    return out | {"fork": fork, "temperature": temperature.clone()}


def _draw_plain(
    rows: MemberRows,
    mass: torch.Tensor,
    relative: torch.Tensor,
    top: torch.Tensor,
    inverse: torch.Tensor,
    total: torch.Tensor,
    noise: Noise,
    draws: int,
) -> dict[str, torch.Tensor]:
    """Gumbel-top-k in two levels: the best tiles by perturbed mass, then the best tokens in them.

    The largest perturbed log-probability in a tile is itself a Gumbel variate at the tile's log-mass (Maddison et al.
    2014, "A* sampling"); the tokens' variates are then conditioned on that maximum (Kool et al. 2019, arXiv 1903.06059,
    appendix B.3). The n best tokens lie in the n best tiles.
    """
    log_total = total.log()[:, None]
    device = top.device
    count = mass.shape[1]
    log_mass = torch.where(mass > 0, mass.log() + relative, -torch.inf) - log_total
    tile_keys = log_mass + noise.gumbel(torch.arange(count, device=device)[None], TILES)  # [B, tiles]
    tile_key, tile = tile_keys.topk(min(draws, count), dim=1)  # [B, n]
    # Past the end of a row there is nothing to draw; noise for it would only take time.
    span = TILE if count > 1 else min(TILE, rows.width)
    ids = (tile[..., None] * TILE + torch.arange(span, device=device)).flatten(1)  # [B, n · span]
    rel = rows.at(ids).sub_(top[:, None])
    logp = (rel * inverse[:, None] - log_total).unflatten(1, (-1, span))  # [B, n, span]
    perturbed = logp + noise.gumbel(ids, TOKENS).unflatten(1, (-1, span))
    key = _conditioned(perturbed, tile_key).flatten(1)
    key, best = largest(key, draws)
    found = key > -torch.inf
    return {
        "tokens": torch.where(found, ids.gather(1, best), -1),
        "relative": rel.gather(1, best).masked_fill(~found, -torch.inf),
        "draw_logprobs": logp.flatten(1).gather(1, best).masked_fill(~found, -torch.inf),
        "keys": key,
    }


def _conditioned(perturbed: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Gumbel variates G `[..., n]` conditioned on their maximum K `[...]`: `−log(e^−K − e^−Z + e^−G)`, Z = max G.

    Numerically stable. The order is kept, and the largest is exactly K.
    """
    largest = perturbed.amax(-1, keepdim=True)
    gap = (largest - perturbed).nan_to_num(nan=torch.inf)  # ≥ 0; NaN where all are −inf
    # log(1 − e^−gap), by its series where the difference would cancel.
    small = gap * (1.0 - gap * (0.5 - gap * (1.0 / 6.0)))
    log1mexp = torch.where(gap < 0.015625, small, 1.0 - torch.exp(-gap)).log()
    v = maximum[..., None] - perturbed + log1mexp
    x = torch.exp(-v.abs())
    softplus = v.clamp(min=0.0) + torch.where(x < 0.015625, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), (1.0 + x).log())
    key = torch.where(gap == 0.0, maximum[..., None], maximum[..., None] - softplus)
    return key.masked_fill(perturbed == -torch.inf, -torch.inf)


def _draw_truncated(kept: Truncation, top: torch.Tensor, noise: Noise, draws: int) -> dict[str, torch.Tensor]:
    logp = kept.relative - kept.log_kept
    key, best = largest((logp + noise.gumbel(kept.ids, TOKENS)).masked_fill(~kept.kept, -torch.inf), draws)
    best = best.clamp(max=kept.ids.shape[1] - 1)
    drawn = key > -torch.inf
    return {
        "tokens": torch.where(drawn, kept.ids.gather(1, best), -1),
        "relative": (kept.z - top[:, None]).gather(1, best).masked_fill(~drawn, -torch.inf),
        "draw_logprobs": logp.gather(1, best).masked_fill(~drawn, -torch.inf),
        "keys": key,
        "kept": kept.kept.sum(1),
    }
