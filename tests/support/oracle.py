"""What one decoding decision should be, in numpy: float64, integers, and one row at a time where that is clearer.

It shares nothing with proxytune but the contract: the words of Philox-4x32-10 (Salmon et al. 2011), the counter
`(index, position, row, branch · 4 + stream)`, tiles of 1024 columns, and the rules of `proxytune.ops.step`. Only two
things are done in float32, because the contract says so: the combination of the members, and the division of a logit by
the temperature before tokens are ordered (which decides what ties).

Besides each value comes its `slack`: how far a float32 computation may be off, from the sizes of the terms it has to
add up, in units of 2⁻²⁴. And besides each draw, whether it is `sure`: whether the runner-up was far enough behind that
float32 noise cannot have changed the winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TILE = 1024
TOKENS, TILES = 0, 1
UNIT = 2.0**-24
# Keys closer than this may change places. Float32 keys near 10 are off by about 1e-6, the variates they are made of by
# as much, and a conditioned key by several of these: two orders of magnitude of room, and still only one draw in 10⁴.
CLOSE = 1e-4
# The cumulated mass of float32 exponentials against top-p, and a log-ratio of theirs against min-p.
NEAR = 1e-6

Array = np.ndarray[Any, np.dtype[Any]]


# --- noise -----------------------------------------------------------------------------------------------------------


def philox(seed: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Array, Array, Array, Array]:
    """Four 32-bit words, as uint64; the arguments broadcast, the seed may be negative."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    key = np.asarray(seed, dtype=np.int64).view(np.uint64)
    k0, k1 = key & low, key >> shift
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.int64).astype(np.uint64) for c in (c0, c1, c2, c3))
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (right >> shift) ^ x1 ^ k0, right & low, (left >> shift) ^ x3 ^ k1, left & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    x0, x1, x2, x3 = np.broadcast_arrays(x0, x1, x2, x3)
    return x0, x1, x2, x3


def gumbel(words: Array) -> Array:
    """Gumbel variates −log(−log(1 − u)) at u = (r + ½)/2³², in float64, which holds u exactly."""
    u = (words.astype(np.float64) + 0.5) / 2.0**32
    return -np.log(-np.log1p(-u))


def blur(variates: Array) -> Array:
    """How far a float32 variate may be off: its own rounding, and that of 1 − u relative to E = e^−g.

    Below u = 1/64 the series in u takes over, which loses nothing: hence the bound.
    """
    return UNIT * (8 + 2 * abs(variates) + 2 * np.exp(np.minimum(variates, np.log(64.0))))


@dataclass(frozen=True)
class Keys:
    """`[B]` each: seed, row, position, branch."""

    seed: Array
    row: Array
    position: Array
    branch: Array

    def gumbel(self, row: int, index: Array, stream: int) -> Array:
        last = int(self.branch[row]) * 4 + stream
        return gumbel(philox(self.seed[row], index, self.position[row], self.row[row], last)[0])


# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """`[B]` each, float64 of float32 values; top-k 0, top-p 1, min-p 0 are off, and so is a threshold of None."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    fork_threshold: Array | None = None
    fork_temperature: Array | None = None


# --- the combination -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """How the members are added: weights `[B, M]`, offsets `[B, M]`, and floors `[B]` of the member `floored_by`."""

    weights: Array
    offsets: Array
    floors: Array
    floored_by: int = 0


def combine(members: Sequence[Array], how: Array | Sum, dtype: Any = np.float32) -> Array:
    """`[B, V]`: the base's weighted logits plus the companions' where all that have a weight have an opinion.

    `how` may be the weights alone.
    """
    base = members[0].astype(dtype)
    rows, width = base.shape
    if not isinstance(how, Sum):
        how = Sum(how, np.zeros(how.shape, np.float32), np.full(rows, -np.inf, np.float32))
    out = np.empty((rows, width), dtype)

    def as_wide(x: Array) -> Array:
        there = np.full(width, -np.inf, dtype)
        n = min(width, len(x))
        there[:n] = x[:n]
        return there

    with np.errstate(all="ignore"):
        for b in range(rows):
            offsets = [dtype(0 if x == -np.inf else np.nan if x == np.inf else x) for x in how.offsets[b]]
            own, scale = base[b], dtype(how.weights[b, 0])
            z = own.copy() if scale == 1 else scale * own
            z = z - (scale * offsets[0] if scale else dtype(0))
            z[np.isneginf(own)] = -np.inf
            z[~(own < np.inf)] = np.nan
            delta, offset = np.zeros(width, dtype), dtype(0)
            silent = np.isneginf(own)
            for x, w, of_one in zip(members[1:], how.weights[b, 1:], offsets[1:], strict=True):
                if w == 0:
                    continue
                there = as_wide(x[b])
                silent |= np.isneginf(there)
                delta = delta + dtype(w) * there
                offset = offset + dtype(w) * of_one
            delta = delta - offset
            delta[~np.isfinite(delta)] = np.nan
            z = np.where(silent, z, z + delta)
            z = np.where(np.isneginf(own), -np.inf, z)
            if how.floors[b] != -np.inf:
                floored = as_wide(members[how.floored_by][b])
                z[(floored < how.floors[b]) & (z < np.inf)] = -np.inf
                z[~(floored < np.inf) | np.isnan(how.floors[b])] = np.nan
            out[b] = z
    return out


# --- truth -----------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What `decide` found.

    Attributes:
        values: By the name of the output; NaN, −1 and so on as the contract says.
        slack: `[B]` or `[B, V]`, by the name of the output: how far float32 may be off.
        bad: `[B]`: NaN or +inf. dead: `[B]`: nothing but −inf.
        kept: `[B, V]`, bool: what can be drawn. least, most: the same sets with the boundaries of top-p and min-p moved
            by `NEAR` inwards and outwards; what float32 keeps lies between them.
        logp, draw_logp, keys: `[B, V]`, of every token.
        sure: `[B, N]`: the drawn token is that one, whatever float32 rounds.
    """

    values: dict[str, Array]
    slack: dict[str, Array]
    bad: Array
    dead: Array
    kept: Array
    least: Array
    most: Array
    logp: Array
    draw_logp: Array
    keys: Array
    sure: Array
    combined: Array = field(repr=False)


def decide(
    members: Sequence[Array], how: Array | Sum, settings: Settings | None, keys: Keys | None, draws: int
) -> Truth:
    """Everything that `step` can be asked for.

    Args:
        members: `[B, V_i]`, float32 values, the base first.
        how: As in `combine`.
        settings: None for the argmax.
        keys: The keys of the noise.
        draws: N.

    Returns:
        The truth, with what float32 may miss of it.
    """
    z32 = combine(members, how)
    rows, width = z32.shape
    bad = ~(z32 < np.inf).all(1)
    dead = np.isneginf(z32).all(1)
    v: dict[str, Array] = {"scores": z32}
    s: dict[str, Array] = {}
    for name in ("lse", "entropy", "varentropy", "kl", "confidence"):
        v[name], s[name] = np.full(rows, np.nan), np.zeros(rows)
    for name in ("temperature",):
        v[name] = np.full(rows, np.nan)
    for name in ("logprobs", "draw_logprobs", "keys"):
        v[name] = np.full((rows, draws), np.nan)
        s[name] = np.zeros((rows, width))
    v["argmax"] = np.full(rows, -1)
    v["kept"] = np.zeros(rows, np.int64)
    v["fork"] = np.zeros(rows, bool)
    v["tokens"] = np.full((rows, draws), -1)
    t = Truth(
        v,
        s,
        bad,
        dead,
        *(np.zeros((rows, width), bool) for _ in range(3)),
        *(np.full((rows, width), -np.inf) for _ in range(3)),
        sure=np.ones((rows, draws), bool),
        combined=z32,
    )
    v["lse"][dead] = -np.inf
    for b in np.flatnonzero(~(bad | dead)):
        z = z32[b].astype(np.float64)
        _statistics(t, b, z, members[0][b].astype(np.float64))
        if settings is None:
            v["tokens"][b, 0] = v["argmax"][b]
            v["logprobs"][b, 0] = t.logp[b, v["argmax"][b]]
            continue
        assert keys is not None
        temperature = settings.temperature[b]
        if settings.fork_threshold is not None:
            assert settings.fork_temperature is not None
            v["fork"][b] = v["entropy"][b] > settings.fork_threshold[b]
            if v["fork"][b]:
                temperature = settings.fork_temperature[b]
        v["temperature"][b] = temperature
        k, p, m = int(settings.top_k[b]), settings.top_p[b], settings.min_p[b]
        if k or p < 1 or m > 0:
            _truncated(t, b, z32[b], temperature, k, p, m, keys, draws)
        else:
            _plain(t, b, z, temperature, keys, draws)
        _settle(t, b, draws)
    return t


def _statistics(t: Truth, b: int, z: Array, base: Array) -> None:
    v, s = t.values, t.slack
    live = z > -np.inf
    zl, bl = z[live], base[live]
    top = zl.max()
    v["argmax"][b] = int(np.flatnonzero(z == top)[0])
    with np.errstate(under="ignore"):
        e = np.exp(zl - top)
        total = e.sum()
        lse = top + np.log(total)
        logp = zl - lse
        p = e / total
        h = -(p * np.where(p > 0, logp, 0)).sum()
        var = (p * np.where(p > 0, (logp + h) ** 2, 0)).sum()
        near = p > 0
        first, second = (p[near] * (top - zl[near])).sum(), (p[near] * (zl[near] - top) ** 2).sum()
    t.logp[b, live] = logp
    base_top = base.max()  # what a floor forbids counts here
    base_lse = base_top + np.log(np.exp(base - base_top).sum())
    shift = (zl - bl)[near]
    v["lse"][b], v["entropy"][b], v["varentropy"][b] = lse, h, var
    v["kl"][b] = (p[near] * (logp[near] - (bl[near] - base_lse))).sum()
    twenty = np.sort(logp[zl - top > -5000])[::-1][:20]  # below that, masked by a finite number
    v["confidence"][b] = -twenty.mean()
    # Exponentials are good to 2 units, sums of them to a few dozen; then the sizes of what is added and subtracted.
    s["lse"][b] = UNIT * (32 + 2 * abs(top) + 2 * abs(lse))
    s["entropy"][b] = UNIT * (32 + 32 * first)
    s["varentropy"][b] = UNIT * (32 + 32 * second)
    s["kl"][b] = UNIT * (64 + 32 * (p[near] * abs(shift)).sum() + 4 * (abs(top) + abs(base_top)))
    s["confidence"][b] = UNIT * (32 + 4 * abs(lse) + 4 * abs(twenty + lse).mean())
    s["logprobs"][b] = UNIT * (32 + 2 * np.where(live, abs(z - top), 0))


def _truncated(
    t: Truth, b: int, z32: Array, temperature: float, k: int, p: float, m: float, keys: Keys, draws: int
) -> None:
    width = len(z32)
    with np.errstate(over="ignore"):
        s32 = z32 / np.float32(temperature)  # as transformers' first warper does, and its ties are ours
    top = float(z32.max())
    rel = (z32.astype(np.float64) - top) / temperature
    inside = z32 > -np.inf
    if k and k < width:
        inside &= s32 >= np.sort(s32)[::-1][k - 1]
    e = np.where(inside, np.exp(np.maximum(rel, -1e4)), 0.0)
    order = np.argsort(-s32, kind="stable")
    level, group = np.unique(-s32[order], return_inverse=True)  # groups of ties, the largest first
    masses = np.bincount(group, weights=e[order], minlength=len(level)) / e.sum()
    before = np.concatenate([[0.0], np.cumsum(masses)[:-1]])  # the mass above each group of ties

    def kept(slack: float) -> Array:
        out = inside.copy()
        if p < 1:
            # The smallest set that reaches p: a token stays if what lies above it does not reach p yet. The largest
            # always stays.
            wanted = (before < p + slack) | (np.arange(len(level)) == 0)
            out[order] &= wanted[group]
        if m > 0:
            out &= (rel >= np.log(m) - slack) | (rel == 0.0)
        return out

    t.kept[b], t.least[b], t.most[b] = kept(0.0), kept(-NEAR), kept(NEAR)
    # Values for all that may be drawn; a token more or less at the boundary renormalises the others.
    may = t.most[b]
    t.draw_logp[b, may] = rel[may] - np.log(e[t.kept[b]].sum())
    edge = np.log(e[may].sum() / e[t.least[b]].sum())
    t.slack["draw_logprobs"][b] = edge + UNIT * (32 + 4 * np.where(inside, abs(rel), 0))
    noise = keys.gumbel(b, np.arange(width), TOKENS)
    t.keys[b, may] = (t.draw_logp[b] + noise)[may]
    t.slack["keys"][b] = t.slack["draw_logprobs"][b] + UNIT * 8 + blur(noise)


def _plain(t: Truth, b: int, z: Array, temperature: float, keys: Keys, draws: int) -> None:
    """Each tile's largest key is Gumbel at the tile's log-mass; its tokens' keys are conditioned on that maximum."""
    live = z > -np.inf
    rel = (z - z[live].max()) / temperature
    logp = rel - np.log(np.exp(np.maximum(rel[live], -1e4)).sum())
    t.kept[b] = t.least[b] = t.most[b] = live
    t.draw_logp[b, live] = logp[live]
    t.slack["draw_logprobs"][b] = slack = UNIT * (32 + 4 * np.where(live, abs(rel), 0))
    for tile in range(-(-len(z) // TILE)):
        ids = np.arange(tile * TILE, min(len(z), (tile + 1) * TILE))
        ids = ids[live[ids]]
        if not len(ids):
            continue
        lp = logp[ids]
        mass = lp.max() + np.log(np.exp(lp - lp.max()).sum())
        of_tile = keys.gumbel(b, np.array([tile]), TILES)[0]
        maximum = mass + of_tile
        noise = keys.gumbel(b, ids, TOKENS)
        perturbed = lp + noise
        gap = perturbed.max() - perturbed
        with np.errstate(divide="ignore"):
            given = maximum - np.logaddexp(0.0, maximum - perturbed + np.log(-np.expm1(-gap)))
        t.keys[b, ids] = np.where(gap == 0, maximum, given)
        # The key of a token close behind the largest of its tile hangs on that small gap: d key / d gap is 1/gap there.
        steep = 1 + np.divide(1.0, np.expm1(np.minimum(gap, 50.0)), where=gap > 0, out=np.zeros_like(gap))
        t.slack["keys"][b, ids] = (
            blur(of_tile)
            + (slack[ids] + slack[ids[gap.argmin()]] + UNIT * 32 + blur(noise) + blur(noise[gap.argmin()])) * steep
        )


def _settle(t: Truth, b: int, draws: int) -> None:
    v = t.values
    order = np.argsort(-t.keys[b], kind="stable")
    real = t.keys[b, order] > -np.inf
    order = order[real]
    near, order = order[: draws + 1], order[t.kept[b, order]]
    v["kept"][b] = t.kept[b].sum()
    n = min(draws, len(order))
    for name in ("logprobs", "draw_logprobs", "keys"):
        v[name][b] = -np.inf
    v["tokens"][b, :n] = order[:n]
    v["logprobs"][b, :n] = t.logp[b, order[:n]]
    v["draw_logprobs"][b, :n] = t.draw_logp[b, order[:n]]
    v["keys"][b, :n] = t.keys[b, order[:n]]
    # Sure is what is certainly kept, as is all before it, and what neither neighbour in the order can overtake.
    key, slack = t.keys[b, near], t.slack["keys"][b, near]
    ahead = np.append(key[:-1] - key[1:] > CLOSE + slack[:-1] + slack[1:], True)
    sure = np.zeros(draws, bool)
    sure[: len(near)] = (ahead & np.append(True, ahead[:-1]) & np.logical_and.accumulate(t.least[b, near]))[:draws]
    sure[len(near) :] = True
    t.sure[b] = sure
