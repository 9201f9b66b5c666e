"""Draws without replacement from rows that were measured: in two levels, or among candidates if truncated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxytune.ops.noise import TILES, TOKENS, Noise
from proxytune.ops.sampling_params import Sampling
from proxytune.ops.torch_impl.measure import CLAMP, TILE, Rows
from proxytune.ops.torch_impl.truncate import Truncation, largest, truncate

__all__ = ["Law", "draw", "law_of", "shares", "tempered"]


@dataclass(frozen=True, eq=False)
class Law:
    """What each row is drawn from, in so few numbers that the probability of any logit can be told from them.

    Attributes:
        top: `[B, 1]`, the largest logit.
        temperature: `[B, 1]`.
        log_total: `[B, 1]`: log Σ e^((z − top) / T) over what can be drawn.
        kept: The truncation's candidates and bounds; None where no row is truncated.
    """

    top: torch.Tensor
    temperature: torch.Tensor
    log_total: torch.Tensor
    kept: Truncation | None

    def pick(self, index: torch.Tensor | slice) -> Law:
        """The laws of some of the rows.

        Args:
            index: Which rows, `[N]`, int64.

        Returns:
            Those of N rows.
        """
        kept = None if self.kept is None else self.kept.pick(index)
        return Law(self.top[index], self.temperature[index], self.log_total[index], kept)

    def logprobs(self, z: torch.Tensor) -> torch.Tensor:
        """The log-probabilities of logits.

        Args:
            z: `[B, N]`, float32: combined logits.

        Returns:
            `[B, N]`, nats: −inf beside what cannot be drawn.
        """
        relative = (z - self.top) * self.temperature.reciprocal()
        logprobs = relative - self.log_total
        if self.kept is None:
            return logprobs
        # Rows that are not truncated have bounds of −inf.
        return logprobs.masked_fill_(~self.kept.keeps(z / self.temperature, relative), -torch.inf)


def law_of(
    rows: Rows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: Sampling,
) -> Law:
    """What rows are drawn from.

    Args:
        rows: The members' rows.
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.

    Returns:
        The laws; of no meaning in rows that have no distribution.
    """
    temperature, _, _, _, total = tempered(tiles, entropy, top, sampling)
    kept, log_total = None, total.log()[:, None]
    if sampling.some_truncated:
        kept = truncate(rows, tiles["groups"], top, temperature, total, sampling)
        log_total = torch.where(sampling.truncated[:, None], kept.log_kept, log_total)
    return Law(top[:, None], temperature[:, None], log_total, kept)


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
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.
        noise: The keys of the noise.
        draws: How many.

    Returns:
        "fork" `[B]` bool, "temperature" `[B]`, "kept" `[B]` int64; `[B, draws]`: "tokens" int64 (−1 where no more
        tokens are left), their logits "relative" to `top`, "draw_logprobs", "keys".
    """
    temperature, fork, mass, relative, total = tempered(tiles, entropy, top, sampling)

    # A row goes its own way, whatever the others in its batch do.
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


def shares(
    rows: Rows,
    tiles: dict[str, torch.Tensor],
    entropy: torch.Tensor | None,
    top: torch.Tensor,
    sampling: Sampling,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of given tokens under the distribution drawn from, and of all others together.

    Args:
        rows: The members' rows.
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.
        ids: `[B, K]`, int64; −1, or V and more, for none. A token may be given twice.

    Returns:
        `[B, K]`, nats: −inf beside tokens that cannot be drawn; `[B]`, nats: the logarithm of the mass of the tokens
        that are not among `ids`. It is summed, not what is missing to 1, so that it keeps its digits where it is small.
    """
    law = law_of(rows, tiles, entropy, top, sampling)
    ids = ids.masked_fill((ids < 0) | (ids > rows.width), rows.width)
    given = torch.zeros(rows.count, rows.width + 1, dtype=torch.bool, device=top.device).scatter_(1, ids, True)
    choices = []
    if law.kept is not None:
        others = law.kept.kept & ~given.gather(1, law.kept.ids.clamp(max=rows.width))
        choices.append(law.kept.relative.masked_fill(~others, -torch.inf).logsumexp(1))
    if not sampling.all_truncated:
        columns = torch.arange(rows.width, device=top.device).expand(rows.count, -1)
        relative = (rows.at(columns) - law.top) * law.temperature.reciprocal()
        choices.append(relative.masked_fill_(given[:, :-1], -torch.inf).logsumexp(1))
    rest = choices[0] if len(choices) == 1 else torch.where(sampling.truncated, choices[0], choices[1])
    return law.logprobs(rows.at(ids)), rest - law.log_total[:, 0]


def tempered(
    tiles: dict[str, torch.Tensor], entropy: torch.Tensor | None, top: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """At the temperature of each row: that, whether it is a fork's, and the masses.

    Args:
        tiles: What `proxytune.ops.torch_impl.measure.measure` gave.
        entropy: `[B]`, nats; None where no temperature depends on it.
        top: `[B]`, the largest logit.
        sampling: The settings.

    Returns:
        The temperature `[B]`; whether it is a fork's `[B]`; the tiles' own masses `[B, tiles]`, each relative to its
        maximum; the maxima relative to the row's, `[B, tiles]`; the total mass `[B]`. Where no row's draw depends on
        the last three they are None, None and 0.
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
    if mass is None:
        return temperature, fork, None, None, torch.zeros_like(top)
    relative = (tiles["max"] - top[:, None]) * temperature.reciprocal()[:, None]  # [B, tiles]
    return temperature, fork, mass, relative, (mass * relative.clamp(min=CLAMP).exp()).sum(1)


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
    key, best = largest(key, draws)
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
