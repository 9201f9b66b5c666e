"""Draws without replacement from rows that were measured: in two levels, or among candidates if truncated."""

from __future__ import annotations

import torch

from proxytune.noise import TILES, TOKENS, Noise
from proxytune.rows import CLAMP, GROUP, TILE, Rows
from proxytune.sampling import Sampling

__all__ = ["draw", "mean_of_largest"]


def draw(
    rows: Rows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: Sampling,
    noise: Noise,
    draws: int,
) -> dict[str, torch.Tensor]:
    """Draw tokens without replacement.

    Args:
        rows: The members' rows.
        tiles: What `proxytune.rows.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.
        noise: The keys of the noise.
        draws: How many.

    Returns:
        "fork" `[B]` bool, "temperature" `[B]`, "kept" `[B]` int64; `[B, draws]`: "tokens" int64 (−1 where no more
        tokens are left), their logits "relative" to `top`, "draw_logprobs", "keys".
    """
    temperature, mass = sampling.temperature, tiles.get("mass")
    fork = torch.zeros_like(top, dtype=torch.bool)
    if sampling.fork_threshold is not None:
        assert entropy is not None
        assert sampling.fork_temperature is not None
        fork = entropy > sampling.fork_threshold  # NaN is no fork
        temperature = torch.where(fork, sampling.fork_temperature, temperature)
        if mass is not None:
            mass = torch.where(fork[:, None], tiles["fork mass"], mass)
    total = torch.zeros_like(top)  # where no row's draw depends on it, it was not measured
    if mass is not None:
        relative = (tiles["max"] - top[:, None]) * temperature.reciprocal()[:, None]  # [B, tiles]
        total = (mass * relative.clamp(min=CLAMP).exp()).sum(1)

    # A row goes its own way, whatever the others in its batch do.
    choices = []
    if sampling.some_truncated:
        choices.append(_draw_truncated(rows, tiles["groups"], top, temperature, total, sampling, noise, draws))
    if not sampling.all_truncated:
        assert mass is not None
        plain = _draw_plain(rows, mass, relative, top, temperature.reciprocal(), total, noise, draws)
        choices.append(plain | {"kept": tiles["live"].sum(1)} if "live" in tiles else plain)
    out = choices[0]
    if len(choices) == 2:
        own = sampling.truncated
        out = {k: torch.where(own[:, None] if x.ndim == 2 else own, out[k], x) for k, x in choices[1].items()}
    out.setdefault("kept", torch.zeros_like(fork, dtype=torch.int64))  # not asked for
    return out | {"fork": fork, "temperature": temperature.clone()}


def _draw_plain(
    rows: Rows,
    mass: torch.Tensor,
    relative: torch.Tensor,
    top: torch.Tensor,
    inverse: torch.Tensor,
    total: torch.Tensor,
    noise: Noise,
    draws: int,
) -> dict[str, torch.Tensor]:
    """Gumbel-top-k in two levels: the best tiles by their perturbed mass, then the best tokens inside them.

    The largest perturbed log-probability of a tile's tokens is itself a Gumbel variate at the tile's log-mass (Maddison
    et al. 2014, "A* sampling"); the tokens' variates are then conditioned on that maximum (Kool et al. 2019,
    arXiv 1903.06059, appendix B.3). The n best tokens lie in the n best tiles.
    """
    log_total = total.log()[:, None]
    device = top.device
    count = mass.shape[1]
    log_mass = torch.where(mass > 0, mass.log() + relative, -torch.inf) - log_total
    tile_keys = log_mass + noise.gumbel(torch.arange(count, device=device)[None], TILES)  # [B, tiles]
    tile_key, tile = tile_keys.topk(min(draws, count), dim=1)  # [B, n]
    ids = (tile[..., None] * TILE + torch.arange(TILE, device=device)).flatten(1)  # [B, n · TILE]
    rel = rows.at(ids).sub_(top[:, None])
    logp = (rel * inverse[:, None] - log_total).unflatten(1, (-1, TILE))  # [B, n, TILE]
    perturbed = logp + noise.gumbel(ids, TOKENS).unflatten(1, (-1, TILE))
    key = _conditioned(perturbed, tile_key).flatten(1)
    key, best = _largest(key, draws)
    found = key > -torch.inf
    return {
        "tokens": torch.where(found, ids.gather(1, best), -1),
        "relative": rel.gather(1, best).masked_fill(~found, -torch.inf),
        "draw_logprobs": logp.flatten(1).gather(1, best).masked_fill(~found, -torch.inf),
        "keys": key,
    }


def _conditioned(perturbed: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Gumbel variates of a set, given that their maximum is another one: `−log(e^−K − e^−Z + e^−G)`, kept stable.

    Args:
        perturbed: G, `[..., n]`.
        maximum: K, `[...]`.

    Returns:
        `[..., n]`, in the same order; the largest is exactly K.
    """
    largest = perturbed.amax(-1, keepdim=True)
    gap = (largest - perturbed).nan_to_num(nan=torch.inf)  # ≥ 0; all −inf have no say
    # log(1 − e^−gap), by its series where the difference would cancel.
    small = gap * (1.0 - gap * (0.5 - gap * (1.0 / 6.0)))
    log1mexp = torch.where(gap < 0.015625, small, 1.0 - torch.exp(-gap)).log()
    v = maximum[..., None] - perturbed + log1mexp
    x = torch.exp(-v.abs())
    softplus = v.clamp(min=0.0) + torch.where(x < 0.015625, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), (1.0 + x).log())
    key = torch.where(gap == 0.0, maximum[..., None], maximum[..., None] - softplus)
    return key.masked_fill(perturbed == -torch.inf, -torch.inf)


def _largest(keys: torch.Tensor, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `draws` largest, filled up with −inf where there are fewer columns."""
    missing = draws - keys.shape[1]
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing), value=-torch.inf)
    if draws == 1:
        value, index = keys.max(1, keepdim=True)  # the first of equal ones, as in the kernel
        return value, index
    value, index = keys.topk(draws, dim=1)
    return value, index


# --- truncation: only candidates are looked at ----------------------------------------------------------------------


def mean_of_largest(rows: Rows, groups: torch.Tensor, top: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of the largest logits of each row, relative to the largest.

    Args:
        rows: The members' rows.
        groups: `[B, groups]`, the maxima of the groups.
        top: `[B]`, the largest logit.
        count: How many; where fewer are above −inf, these.

    Returns:
        `[B]`, float32.
    """
    # The n largest tokens lie in the n groups with the largest maxima.
    best = groups.topk(min(count, groups.shape[1]), dim=1).indices.sort(1).values
    z, _ = _largest(rows.at(_members_of(best)), count)
    real = z > -torch.inf
    return (z - top[:, None]).masked_fill(~real, 0.0).sum(1) / real.sum(1)


def _members_of(groups: torch.Tensor) -> torch.Tensor:
    """Group numbers `[B, n]` → the columns in them, `[B, n · GROUP]`."""
    return (groups[..., None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)


def _draw_truncated(
    rows: Rows,
    groups: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    total: torch.Tensor,
    sampling: Sampling,
    noise: Noise,
    draws: int,
) -> dict[str, torch.Tensor]:
    k, p = sampling.top_k[:, None], sampling.top_p[:, None]  # [B, 1]
    inverse = temperature.reciprocal()[:, None]
    on_cpu = rows.device.type == "cpu"
    take = sampling.truncated.long() * torch.where(sampling.top_k > 0, sampling.top_k, 32)  # groups, per row
    while True:
        if on_cpu:
            ids, floor = _candidates(groups, take, temperature)
        else:
            ids, floor = torch.arange(rows.width, device=top.device).expand(rows.count, -1), None
        z = rows.at(ids)
        # The order of transformers: ties are those of the logits divided by T, as rounded.
        s = z / temperature[:, None]
        if floor is None:
            s, order = s.sort(dim=1, descending=True, stable=True)
        else:
            above = (s >= (floor / temperature)[:, None]) & (s > -torch.inf)
            s, order = s.masked_fill_(~above, -torch.inf).topk(max(1, int(above.sum(1).max())), dim=1)
        ids, z = ids.gather(1, order), z.gather(1, order)
        real = s > -torch.inf
        relative = (z - top[:, None]) * inverse
        e = relative.clamp(min=CLAMP).exp() * real
        reached = e.cumsum(1)  # one after the other, so that a row's sums do not depend on the batch's width
        if floor is None:
            break
        # Whether the candidates are enough is seen afterwards; if not, more groups.
        found = real.sum(1)
        nothing_below = (floor - top) * inverse[:, 0] < sampling.log_min_p
        enough = torch.where(
            sampling.top_k > 0,
            (found >= sampling.top_k) | (nothing_below & (sampling.top_p == 1)),
            nothing_below | ((reached[:, -1] >= sampling.top_p * total) & (sampling.top_p < 1)),
        )
        enough |= ~sampling.truncated | (floor == -torch.inf) | ~(top < torch.inf)
        if enough.all():
            break
        take = torch.where(enough, take, take * 4)

    lowest = s.gather(1, (k.long() - 1).clamp(min=0, max=s.shape[1] - 1))
    lowest = torch.where(k > 0, lowest, -torch.inf)  # [B, 1]
    inside = real & (s >= lowest)
    total_inside = torch.where(k > 0, (e * inside).cumsum(1)[:, -1:], total[:, None])
    reaching = (reached >= p * total_inside) & inside & (p < 1)
    at = reaching.int().argmax(1, keepdim=True)  # the first
    nucleus = torch.where(reaching.gather(1, at), s.gather(1, at), -torch.inf)
    kept = inside & (s >= nucleus) & (relative >= sampling.log_min_p[:, None])

    log_kept = (e * kept).cumsum(1)[:, -1:].log()
    logp = relative - log_kept
    key, best = _largest((logp + noise.gumbel(ids, TOKENS)).masked_fill(~kept, -torch.inf), draws)
    best = best.clamp(max=ids.shape[1] - 1)
    drawn = key > -torch.inf
    return {
        "tokens": torch.where(drawn, ids.gather(1, best), -1),
        "relative": (z - top[:, None]).gather(1, best).masked_fill(~drawn, -torch.inf),
        "draw_logprobs": logp.gather(1, best).masked_fill(~drawn, -torch.inf),
        "keys": key,
        "kept": kept.sum(1),
    }


def _candidates(
    groups: torch.Tensor, take: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the best groups, and a bound of the logits, from which on none is missing in them.

    Args:
        groups: `[B, groups]`.
        take: `[B]`, how many groups at least.
        temperature: `[B]`; what ties with the bound after the division by it is taken as well.

    Returns:
        Columns `[B, n]` and the bound `[B]`, which is −inf where every group is taken.
    """
    count = groups.shape[1]
    take = take.clamp(max=count)
    most = max(1, int(take.max()))
    best = groups.topk(most, dim=1).values
    floor = best.gather(1, (take[:, None] - 1).clamp(min=0))[:, 0]
    floor = torch.where(take >= count, -torch.inf, floor)
    t = temperature[:, None]
    live = (groups / t >= floor[:, None] / t) & (groups > -torch.inf)
    width = max(1, int(live.sum(1).max()))
    # In the order of the columns; rows with fewer live groups are filled up with columns past the end.
    number = torch.arange(count, device=groups.device).masked_fill(~live, count)
    return _members_of(number.topk(width, dim=1, largest=False).values.sort(1).values), floor
