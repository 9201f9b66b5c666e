"""The draw of one row, inside K2: in two levels without truncation, else among candidates."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.candidates import (
    FEW,
    gather,
    group_bound,
    list_live,
    read_block,
    threshold_by_count,
)
from proxytune_kernels.rows import MASKED, combined, conditioned, gumbel, key_of, value_of
from proxytune_kernels.runs import STRETCH, STRETCHES, firsts_of, leave, places
from proxytune_kernels.truncate import LEAST, candidates_of, truncate, truncate_few

__all__ = [
    "NOWHERE", "ROUNDS", "TILES", "TOKENS", "confidence", "draw_plain", "draw_runs", "draw_truncated", "first_after",
]  # fmt: skip

# Streams of noise, as in `proxytune.ops.noise`.
TOKENS = tl.constexpr(0)
TILES = tl.constexpr(1)
ROUNDS = tl.constexpr(10)
NOWHERE = tl.constexpr(2147483647)
# A NaN's key.
NOTHING = tl.constexpr(-(1 << 63))


@triton.jit
def first_after(key, ids, previous_key, previous_id):
    """The next key, and its id (int32), in the order (key falling, id rising); −inf if none is left.

    Start with a previous key of +inf and id −1; `ids` must rise.
    """
    left = (key < previous_key) | ((key == previous_key) & (ids > previous_id))
    best = tl.max(tl.where(left, key, float("-inf")), axis=0)
    return best, tl.min(tl.where(left & (key == best), ids, NOWHERE), axis=0)


@triton.jit
def _store(out, at, token, logprob, draw_logprob, key):
    found = key > float("-inf")
    tl.store(out[0] + at, tl.where(found, token, -1).to(tl.int64))
    tl.store(out[1] + at, tl.where(found, logprob, float("-inf")))
    tl.store(out[2] + at, tl.where(found, draw_logprob, float("-inf")))
    tl.store(out[3] + at, tl.where(found, key, float("-inf")))


@triton.jit
def draw_plain(
    logits, noise, out,
    row, t, mass, relative, top, log_total_raw, inverse, log_total, draws,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Gumbel-top-k in two levels: tiles by their perturbed mass, then tokens in the best ones only.

    `out`: pointers to tokens (int64), logprobs, draw_logprobs and keys, `[B, draws]`. `mass`: block of tile masses at
    the temperature, each relative to the tile's maximum; `relative`: (tile's maximum − top) / T; `inverse`: 1/T;
    `log_total`: log Σ exp((z − top)/T); `log_total_raw`: log Σ exp(z − top). ONE: `draws` is 1.
    """
    log_mass = tl.where(mass > 0.0, tl.log(tl.where(mass > 0.0, mass, 1.0)) + relative, float("-inf")) - log_total
    tile_key = log_mass + gumbel(noise, t, TILES, ROUNDS)
    columns = tl.arange(0, TILE)
    if ONE:
        key, tile = first_after(tile_key, t, float("inf"), -1)
        ids = tile * TILE + columns
        z, base = combined(logits, row, ids, M, PER_ROW, False)
        logp = (z - top) * inverse - log_total
        perturbed = logp + gumbel(noise, ids, TOKENS, ROUNDS)
        unused, token = first_after(perturbed, ids, float("inf"), -1)
        rel = tl.max(tl.where(ids == token, z - top, float("-inf")), axis=0)
        _store(out, row, token, rel - log_total_raw, rel * inverse - log_total, key)
    else:
        last_key = tl.full((), float("inf"), tl.float32)
        last = tl.full((), -1, tl.int32)
        for draw in range(draws):
            key = tl.full((), float("-inf"), tl.float32)
            token = tl.full((), NOWHERE, tl.int32)
            rel = tl.full((), 0.0, tl.float32)
            above = tl.full((), float("inf"), tl.float32)
            tile = tl.full((), -1, tl.int32)
            # The n-th best token lies in one of the n best tiles.
            for rank in range(draw + 1):  # noqa: B007, a name that nothing else has
                above, tile = first_after(tile_key, t, above, tile)
                if above > float("-inf"):
                    ids = tile * TILE + columns
                    z, base = combined(logits, row, ids, M, PER_ROW, False)
                    logp = (z - top) * inverse - log_total
                    perturbed = logp + gumbel(noise, ids, TOKENS, ROUNDS)
                    within = conditioned(perturbed, above)
                    best, at = first_after(within, ids, last_key, last)
                    if (best > key) | ((best == key) & (at < token)):
                        key = best
                        token = at
                        rel = tl.max(tl.where(ids == at, z - top, float("-inf")), axis=0)
            _store(
                out, row * draws + draw,
                token, rel - log_total_raw, rel * inverse - log_total, key,
            )  # fmt: skip
            last_key = key
            last = token


@triton.jit
def _draw_kept(
    logits, noise, out, row, z, ids, ok, mass, top, inverse, log_total_raw, draws,
    M: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Gumbel-top-k among the tokens that are `ok`; `mass` is theirs."""
    log_kept = tl.log(mass)
    key = (z - top) * inverse - log_kept + gumbel(noise, ids, TOKENS, ROUNDS) + 0.0
    # In one number, so that one reduction finds the best, and of several the one with the smallest id.
    packed = (key_of(key).to(tl.int64) << 32) | (ids ^ NOWHERE).to(tl.int64)
    packed = tl.where(ok, packed, NOTHING)
    last = tl.full((), 9223372036854775807, tl.int64)
    for draw in range(draws):
        last = tl.max(tl.where(packed < last, packed, NOTHING), axis=0)
        token = (last & NOWHERE).to(tl.int32) ^ NOWHERE
        # Read once more: sooner there than by another reduction.
        own, base = combined(logits, row, token + tl.arange(0, 1), M, PER_ROW, False)
        drawn = tl.max(own, axis=0) - top
        _store(
            out, row * draws + draw, token, drawn - log_total_raw, drawn * inverse - log_kept,
            value_of((last >> 32).to(tl.int32)),
        )  # fmt: skip


@triton.jit
def draw_truncated(
    logits, work, groups, g, bound, noise, out, kept, left,
    row, top, temperature, total, log_total_raw, top_k, top_p, log_min_p, n_groups, draws,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Top-k, top-p and min-p in transformers' order, ties kept, and Gumbel-top-k among what is kept.

    Arguments as in `draw_plain` and `candidates_of`; `kept` int64 `[B]`. A row with too many candidates is `left` to
    `wide.resolve_wide`.
    """
    inverse = tl.div_rn(1.0, temperature)
    wanted_mass = tl.where(top_p < 1.0, top_p * total, float("inf"))
    found, limit, count = candidates_of(
        logits, work, groups, g, bound, row, top, temperature, wanted_mass, top_k, log_min_p,
        n_groups, M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED, AT_ONCE,
    )  # fmt: skip
    if not found:
        leave(left, row, temperature, top, wanted_mass, log_total_raw)
    elif count <= FEW:
        _draw_few(
            logits, work, noise, out, kept, row, top, temperature, wanted_mass, log_total_raw, top_k, top_p,
            log_min_p, count, draws, M, PER_ROW,
        )  # fmt: skip
    else:
        least, n, mass, z, ids, ok = truncate(
            logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p,
            limit, count, M, PER_ROW, GROUP, PER_READ,
        )  # fmt: skip
        tl.store(kept + row, n.to(tl.int64))
        _draw_kept(logits, noise, out, row, z, ids, ok, mass, top, inverse, log_total_raw, draws, M, PER_ROW)


@triton.jit
def _draw_few(
    logits, work, noise, out, kept, row, top, temperature, wanted_mass, log_total_raw, top_k, top_p, log_min_p,
    count, draws, M: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    s, inside, n, mass, z, ids, ok = truncate_few(
        logits, work, row, top, temperature, wanted_mass, top_k, top_p, log_min_p, count, M, PER_ROW
    )  # fmt: skip
    tl.store(kept + row, n.to(tl.int64))
    inverse = tl.div_rn(1.0, temperature)
    _draw_kept(logits, noise, out, row, z, ids, ok, mass, top, inverse, log_total_raw, draws, M, PER_ROW)


@triton.jit
def draw_runs(
    of_runs, noise, out, row, runs, bound, mass, top, inverse, log_total_raw, draws, RUNS_PADDED: tl.constexpr,
):  # fmt: skip
    """Gumbel-top-k among the logits of a sorted row whose key is at least `bound`; `mass` is theirs.

    The n best tokens lie in the n best stretches. `out`: as in `draw.draw_plain`.
    """
    log_kept = tl.log(mass)
    run = tl.arange(0, RUNS_PADDED)
    stretches = tl.sum((firsts_of(of_runs, runs, RUNS_PADDED) >= bound).to(tl.int32), axis=1)
    lane = tl.arange(0, STRETCH)
    # The last stretch of each run is kept in part.
    at = ((run * STRETCHES + tl.maximum(stretches - 1, 0)) * STRETCH)[:, None] + lane[None, :]
    key, token, z = places(of_runs, noise, at, (stretches > 0)[:, None], bound, top, inverse, 0.0)
    stretch = tl.arange(0, STRETCHES)[None, :]
    in_part = stretches[:, None] - 1
    best = tl.load(
        of_runs[4] + run[:, None] * STRETCHES + stretch, mask=stretch < in_part, other=float("-inf")
    )  # fmt: skip
    best = tl.where(stretch == in_part, tl.max(key, axis=1)[:, None], best)
    best = tl.reshape(best, (RUNS_PADDED * STRETCHES,))
    index = tl.arange(0, RUNS_PADDED * STRETCHES)
    last_key = tl.full((), float("inf"), tl.float32)
    last = tl.full((), -1, tl.int32)
    for draw in range(draws):
        chosen_key = tl.full((), float("-inf"), tl.float32)
        chosen = tl.full((), NOWHERE, tl.int32)
        drawn = tl.full((), 0.0, tl.float32)
        above = tl.full((), float("inf"), tl.float32)
        at_stretch = tl.full((), -1, tl.int32)
        for rank in range(draw + 1):  # noqa: B007, a name that nothing else has
            above, at_stretch = first_after(best, index, above, at_stretch)
            if above > float("-inf"):
                here, ids, logit = places(
                    of_runs, noise, at_stretch * STRETCH + lane, lane >= 0, bound, top, inverse, log_kept
                )  # fmt: skip
                found, at_id = first_after(here, ids, last_key, last)
                if (found > chosen_key) | ((found == chosen_key) & (at_id < chosen)):
                    chosen_key = found
                    chosen = at_id
                    drawn = tl.max(tl.where((here == found) & (ids == at_id), logit - top, float("-inf")), axis=0)
        _store(
            out, row * draws + draw, chosen, drawn - log_total_raw, drawn * inverse - log_kept, chosen_key,
        )  # fmt: skip
        last_key = chosen_key
        last = chosen


@triton.jit
def confidence(
    logits, work, groups, row, top, log_total, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PER_READ: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    TOKENS_SEEN: tl.constexpr,
):  # fmt: skip
    """−mean log p of the TOKENS_SEEN likeliest unmasked tokens (DeepConf, arXiv 2508.15260), at temperature 1, nats.

    `log_total`: log Σ exp(z − top).
    """
    at = tl.arange(0, GROUPS_PADDED)
    g = tl.load(groups + at, mask=at < n_groups, other=float("-inf"))
    present = g > float("-inf")
    floor = group_bound(g, present, TOKENS_SEEN, n_groups)
    tl.debug_barrier()
    live, unused, unread = list_live(work, present & (g >= floor), 1, 1, GROUPS_PADDED)
    count = gather(logits, work, row, live, floor, NOWHERE, M, PER_ROW, GROUP, PER_READ)
    in_block = count <= PER_READ * GROUP
    least = key_of(tl.maximum(floor, LEAST)).to(tl.int64)
    hi = key_of(top).to(tl.int64) + 1
    least = threshold_by_count(
        logits, work, row, live, floor, in_block, count,
        least, hi, TOKENS_SEEN, M, PER_ROW, GROUP, PER_READ,
    )  # fmt: skip
    reached = tl.full((), 0, tl.int32)
    above = tl.full((), 0, tl.int32)
    summed = tl.full((), 0.0, tl.float32)
    lowest = top
    for number in range(tl.where(in_block, 1, tl.cdiv(live, PER_READ))):
        z, ids, ok = read_block(logits, work, row, number, live, floor, in_block, count, M, PER_ROW, GROUP, PER_READ)
        ok = ok & (key_of(z) >= least.to(tl.int32)) & (z - top > MASKED)
        reached += tl.sum(ok.to(tl.int32), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(ok, z, top), axis=0))
        # Relative to the largest, so that the sum keeps its digits.
        over = ok & (key_of(z) > least.to(tl.int32))
        above += tl.sum(over.to(tl.int32), axis=0)
        summed += tl.sum(tl.where(over, z - top, 0.0), axis=0)
    seen = tl.minimum(reached, TOKENS_SEEN)
    # Tokens that tie at the threshold make up the rest.
    summed += (seen - above).to(tl.float32) * (lowest - top)
    return log_total - tl.div_rn(summed, seen.to(tl.float32))
