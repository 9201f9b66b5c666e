"""Draws without replacement from measured rows: in two levels, or among the candidates of a truncation."""

from __future__ import annotations

import math

import numpy as np

from proxytune.ops.noise import TILES, TOKENS, Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import (
    Array,
    as_long,
    as_tensor,
    at_least,
    clone,
    count_up,
    exp,
    filled,
    joined,
    largest,
    log,
    peak,
    take,
    where,
)  # fmt: skip
from proxytune.ops.torch_impl.distribution import tempered
from proxytune.ops.torch_impl.measure import settings_of
from proxytune.ops.torch_impl.rows import TILE, MemberRows
from proxytune.ops.torch_impl.truncate import Truncation, truncated

__all__ = ["best_of", "draw"]


def draw(
    rows: MemberRows,
    tiles: dict[str, Array],
    entropy: Array | None,
    top: Array,
    sampling: SamplingParams,
    noise: Noise,
    draws: int,
) -> dict[str, Array]:
    """Draw tokens without replacement; arguments as for `proxytune.ops.torch_impl.distribution.distribution_of`.

    Returns:
        "fork" `[B]` bool, "temperature" `[B]`, "kept" `[B]` int64; `[B, draws]`: "tokens" int64 (−1 where no token is
        left), their logits "relative" to `top`, "draw_logprobs", "keys".
    """
    temperature, fork, mass, relative, total = tempered(rows, tiles, entropy, top, sampling)

    # Whether a row is truncated decides its path, so that its result does not depend on the other rows.
    choices = []
    if sampling.some_truncated:

        def use(kept: Truncation) -> dict[str, Array]:
            which = kept.index
            own = noise if isinstance(which, slice) else noise.pick(as_tensor(which))
            return _draw_truncated(kept, top[which][:, None], temperature[which][:, None], own, draws)

        choices.append(truncated(rows, tiles["groups"], top, temperature, total, sampling, use))
    if not sampling.all_truncated:
        assert mass is not None
        assert relative is not None
        plain = _draw_plain(rows, mass, relative, top, 1.0 / temperature, total, noise, draws)
        choices.append(plain | {"kept": tiles["live"].sum(1)} if "live" in tiles else plain)
    out = choices[0]
    if len(choices) == 2:
        own = settings_of(rows, sampling).truncated
        out = {k: where(own[:, None] if x.ndim == 2 else own, out[k], x) for k, x in choices[1].items()}
    out.setdefault("kept", fork * 0)  # not asked for
    return out | {"fork": fork, "temperature": clone(temperature)}


def _draw_plain(
    rows: MemberRows,
    mass: Array,
    relative: Array,
    top: Array,
    inverse: Array,
    total: Array,
    noise: Noise,
    draws: int,
) -> dict[str, Array]:
    """Gumbel-top-k in two levels: the best tiles by perturbed mass, then the best tokens in them.

    The largest perturbed log-probability in a tile is itself a Gumbel variate at the tile's log-mass (Maddison et al.
    2014, "A* sampling"); the tokens' variates are then conditioned on that maximum (Kool et al. 2019, arXiv 1903.06059,
    appendix B.3). The n best tokens lie in the n best tiles.
    """
    log_total = log(total)[:, None]
    count = mass.shape[1]
    log_mass = where(mass > 0, log(mass) + relative, -math.inf) - log_total
    tile_keys = log_mass + noise.gumbel(count_up(count, mass)[None], TILES)  # [B, tiles]
    tile_key, tile = largest(tile_keys, min(draws, count))  # [B, n]
    # Past the end of a row there is nothing to draw; noise for it would only take time.
    span = TILE if count > 1 else min(TILE, rows.width)
    ids = (tile[..., None] * TILE + count_up(span, mass)).reshape(len(tile), -1)  # [B, n · span]
    rel = rows.at(ids) - top[:, None]
    logp = rel * inverse[:, None] - log_total
    perturbed = logp + noise.gumbel(ids, TOKENS)
    if draws == 1:
        key, best = largest(perturbed, 1)
        key = filled(tile_key, ~(key > -math.inf), -math.inf)  # the best token's is the tile's
    else:
        key = _conditioned(perturbed.reshape(*tile.shape, span), tile_key).reshape(perturbed.shape)
        key, best = largest(key, draws)
    return _drawn(key, best, ids, rel, logp)


def _drawn(key: Array, best: Array, ids: Array, relative: Array, logprobs: Array) -> dict[str, Array]:
    """The tokens at `best`; −1 and −inf where the key is −inf."""
    none = ~(key > -math.inf)
    if isinstance(none, np.ndarray) and not none.any():
        tokens, relative, logprobs = as_long(take(ids, best)), take(relative, best), take(logprobs, best)
    else:
        at = filled(best, best >= ids.shape[1], 0)
        tokens = filled(as_long(take(ids, at)), none, -1)
        relative, logprobs = (filled(take(x, at), none, -math.inf) for x in (relative, logprobs))
    return {"tokens": tokens, "relative": relative, "draw_logprobs": logprobs, "keys": key}


def _conditioned(perturbed: Array, maximum: Array) -> Array:
    """Gumbel variates G `[..., n]` conditioned on their maximum K `[...]`: `−log(e^−K − e^−Z + e^−G)`, Z = max G.

    Numerically stable. The order is kept, and the largest is exactly K.
    """
    absent = perturbed == -math.inf
    gap = filled(peak(perturbed)[..., None] - perturbed, absent, math.inf)  # ≥ 0
    # log(1 − e^−gap), by its series where the difference would cancel.
    small = gap * (1.0 - gap * (0.5 - gap * (1.0 / 6.0)))
    log1mexp = log(where(gap < 0.015625, small, 1.0 - exp(-gap)))
    v = maximum[..., None] - perturbed + log1mexp
    x = exp(-abs(v))
    softplus = at_least(v, 0.0) + where(x < 0.015625, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), log(1.0 + x))
    return filled(where(gap == 0.0, maximum[..., None], maximum[..., None] - softplus), absent, -math.inf)


_AT_ONCE = 16_384
"""Tokens of a row that get noise at once: on the CPU more would only take memory."""


def best_of(ids: Array, logprobs: Array, relative: Array, noise: Noise, draws: int, word: int = 0) -> dict[str, Array]:
    """The `draws` largest of `[b, n]` log-probabilities with the noise of the ids added; see `draw` for the result."""
    step = _AT_ONCE if isinstance(logprobs, np.ndarray) else logprobs.shape[1]
    parts = []
    for start in range(0, logprobs.shape[1], step):
        there = slice(start, start + step)
        own = ids[:, there]
        key, best = largest(logprobs[:, there] + noise.gumbel(own, TOKENS, word), draws)
        parts.append(_drawn(key, best, own, relative[:, there], logprobs[:, there]))
    if len(parts) == 1:
        return parts[0]
    every = {name: joined([part[name] for part in parts], 1) for name in parts[0]}
    _, best = largest(every["keys"], draws)
    return {name: take(x, best) for name, x in every.items()}


def _draw_truncated(kept: Truncation, top: Array, temperature: Array, noise: Noise, draws: int) -> dict[str, Array]:
    ids, z = kept.tokens()
    relative = z - top
    logp = relative * (1.0 / temperature) - kept.log_kept  # −inf at what is not kept
    return best_of(ids, logp, relative, noise, draws) | {"kept": kept.kept}
