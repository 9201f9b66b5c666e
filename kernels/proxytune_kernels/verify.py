"""Which drafts are accepted, and the token after them, for all positions of a text at once.

Every program that needs the decisions on the K drafts takes all of them itself: they are a few numbers each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.distribution import SIZE, law_at, logprobs
from proxytune_kernels.draw import NOWHERE, ROUNDS, TILES, TOKENS, draw_plain, first_after
from proxytune_kernels.merge import tempered
from proxytune_kernels.rows import FINITE, combined, gumbel_apart, key_of, uniform

__all__ = ["residue", "settle"]

DECISIONS = tl.constexpr(2)


@triton.jit
def _log_q(
    draft, draft_laws, draft_bounds, log_min_p, row, given, cols, GIVEN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of columns in a draft's row; with GIVEN, 0 for the drafted token and −inf for all others."""
    if GIVEN:
        log_q = tl.where(cols == given, 0.0, float("-inf"))
    else:
        y, base = combined(draft, row, cols, 1, False, FULL)
        log_q = logprobs(law_at(draft_laws, draft_bounds, log_min_p, row), y)
    return log_q


@triton.jit
def _decided(
    logits, draft, found, found_draft, drafted, keys, log_min_p, text, K, V, V_draft,
    M: tl.constexpr, PER_ROW: tl.constexpr, K_PADDED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The number of accepted drafts, whether one was rejected there, and which token: int32, bool, int32."""
    j = tl.arange(0, K_PADDED)
    x = tl.load(drafted + text * K + j, mask=j < K, other=-1)
    row = text * (K + 1) + tl.minimum(j, K)
    inside = (x >= 0) & (x < V)
    z, base = combined(logits, row, tl.where(inside, x, 0).to(tl.int32), M, PER_ROW, False)
    log_ratio = logprobs(law_at(found[0], found[1], log_min_p, row), tl.where(inside, z, float("-inf")))
    real = x >= 0
    if not GIVEN:
        row = text * K + tl.minimum(j, K - 1)
        inside = (x >= 0) & (x < V_draft)
        y, base = combined(draft, row, tl.where(inside, x, 0).to(tl.int32), 1, False, False)
        law = law_at(found_draft[0], found_draft[1], log_min_p, row)
        real = real & (law[2] == law[2])  # without a distribution (NaN) the draft counts as missing
        log_ratio -= logprobs(law, tl.where(inside, y, float("-inf")))
    seed, position, stream, branch = keys
    at = (position + j).to(tl.uint32)
    wish = uniform((seed, at, stream, branch), at * 0, DECISIONS, ROUNDS)
    # −inf − −inf is NaN, hence rejected.
    agreed = real & (wish <= tl.exp(log_ratio))
    accepted = tl.min(tl.where(agreed, K_PADDED, j), axis=0)
    here = j == accepted
    token = tl.max(tl.where(here, x, -1), axis=0)
    return accepted, tl.max((here & real).to(tl.int32), axis=0) > 0, tl.minimum(token, NOWHERE).to(tl.int32)


@triton.jit
def residue(
    members, strides, widths, weights, offsets, floors, draft, draft_strides, draft_widths,
    top_k, top_p, log_min_p, seed, stream, position, branch,
    laws, bounds, draft_laws, draft_bounds, drafted, masses,
    K, V, V_draft, inside, tiles,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, K_PADDED: tl.constexpr,
    GIVEN: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """The residual's mass Σ max(0, p − q) of a tile, where a draft was rejected. Grid (B · tiles).

    Shared arguments as in the package, for B texts with up to K drafts, and:

    - `members`: `[B · (K + 1), V_i]`, weights likewise; `draft`, `draft_strides`, `draft_widths`: tuples of one, the
      logits that were drafted from, `[B · K, V_draft]`.
    - `position`: of the first draft; `drafted`: int64 `[B, K]`.
    - `laws`, `bounds` `[B · (K + 1)]`, `draft_laws`, `draft_bounds` `[B · K]`: from `laws_of`.
    - `masses`: output, float32 `[B, tiles]`; not written where no tile is needed.
    - `inside`: columns that all members and the draft have; K_PADDED: K + 1, rounded up to a power of two.
    - GIVEN: the drafts were not drawn. TRUNCATED: some text has top-k, top-p or min-p, where tiles are not needed.
    """
    tile = tl.program_id(0) % tiles
    text = (tl.program_id(0) // tiles).to(tl.int64)
    m = float("-inf")
    plain = True
    if TRUNCATED:
        m = tl.load(log_min_p + text)
        plain = (tl.load(top_k + text) == 0) & (tl.load(top_p + text) == 1.0) & (m == float("-inf"))
    if plain:
        logits = (members, strides, widths, weights, offsets, floors)
        proposal = (draft, draft_strides, draft_widths, (1.0,), None, None)
        keys = (
            tl.load(seed + text), tl.load(position + text),
            tl.load(stream + text).to(tl.uint32), tl.load(branch + text).to(tl.uint32),
        )  # fmt: skip
        accepted, refused, given = _decided(
            logits, proposal, (laws, bounds), (draft_laws, draft_bounds), drafted, keys, m,
            text, K, V, V_draft, M, PER_ROW, K_PADDED, GIVEN,
        )  # fmt: skip
        if refused:
            cols = tile * TILE + tl.arange(0, TILE)
            row = text * (K + 1) + accepted
            law = law_at(laws, bounds, m, row)
            if tile * TILE + TILE <= inside:
                z, base = combined(logits, row, cols, M, PER_ROW, True)
                log_q = _log_q(
                    proposal, draft_laws, draft_bounds, m, text * K + accepted, given, cols, GIVEN, True
                )  # fmt: skip
                rest = tl.exp(logprobs(law, z)) - tl.exp(log_q)
                tl.store(masses + text * tiles + tile, tl.sum(tl.maximum(rest, 0.0), axis=0))
            else:
                z, base = combined(logits, row, cols, M, PER_ROW, False)
                log_q = _log_q(
                    proposal, draft_laws, draft_bounds, m, text * K + accepted, given, cols, GIVEN, False
                )  # fmt: skip
                rest = tl.exp(logprobs(law, z)) - tl.exp(log_q)
                tl.store(masses + text * tiles + tile, tl.sum(tl.maximum(rest, 0.0), axis=0))


@triton.jit
def settle(
    members, strides, widths, weights, offsets, floors, draft, draft_strides, draft_widths,
    top_k, top_p, log_min_p, seed, stream, position, branch,
    part, laws, bounds, draft_laws, draft_bounds, drafted, masses, tokens, accepted_out, unread,
    K, V, V_draft, tiles,
    M: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr,
    K_PADDED: tl.constexpr, TILES_PADDED: tl.constexpr,
    GIVEN: tl.constexpr, FORK: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """Decide on the drafts of a text, and draw the token after them. Grid (B).

    A draw where no draft stood is `resolve`'s, from the same noise. After a rejected draft it is from max(0, p − q), or
    from p where that is 0 throughout, with the other word of the noise.

    Arguments as in `residue`; `part` `[B · (K + 1), FIELDS, tiles]` is from `steer_tiles`. Outputs: `tokens`, int64
    `[B, K + 1]`, and `accepted_out`, int64 `[B]`. `unread`, float32 `[B · (K + 1)]`, receives a draw's other outputs.
    """
    text = tl.program_id(0).to(tl.int64)
    logits = (members, strides, widths, weights, offsets, floors)
    proposal = (draft, draft_strides, draft_widths, (1.0,), None, None)
    stream_of = tl.load(stream + text).to(tl.uint32)
    branch_of = tl.load(branch + text).to(tl.uint32)
    seed_of = tl.load(seed + text)
    first = tl.load(position + text)
    m = float("-inf")
    plain = True
    if TRUNCATED:
        m = tl.load(log_min_p + text)
        plain = (tl.load(top_k + text) == 0) & (tl.load(top_p + text) == 1.0) & (m == float("-inf"))
    accepted, refused, given = _decided(
        logits, proposal, (laws, bounds), (draft_laws, draft_bounds), drafted,
        (seed_of, first, stream_of, branch_of), m, text, K, V, V_draft, M, PER_ROW, K_PADDED, GIVEN,
    )  # fmt: skip
    j = tl.arange(0, K_PADDED)
    x = tl.load(drafted + text * K + j, mask=j < accepted, other=-1)
    tl.store(tokens + text * (K + 1) + j, x, mask=(j <= K) & (j != accepted))
    tl.store(accepted_out + text, accepted.to(tl.int64))

    row = text * (K + 1) + accepted
    row_of_draft = text * K + accepted  # used only where a draft was rejected, so never past the end
    noise = (seed_of, (first + accepted).to(tl.uint32), stream_of, branch_of)
    law = law_at(laws, bounds, m, row)
    top, temperature, log_total, least, unused = law
    t = tl.arange(0, TILES_PADDED)
    there = t < tiles
    part += row * FIELDS * tiles
    columns = tl.arange(0, TILE)
    if log_total != log_total:
        tl.store(tokens + row, tl.full((), -1, tl.int64))
    elif not plain:
        tile_top = tl.load(part + t, mask=there, other=FINITE)
        relative = (tile_top - top) * tl.div_rn(1.0, temperature)
        live = there & (tile_top > FINITE)
        live = live & (key_of(tl.div_rn(tile_top, temperature)) >= least) & (relative >= m)
        token = tl.full((), NOWHERE, tl.int32)
        best = tl.full((), float("-inf"), tl.float32)
        fallback = tl.full((), NOWHERE, tl.int32)
        best_of_p = tl.full((), float("-inf"), tl.float32)
        tile = tl.full((), -1, tl.int32)
        for number in range(tl.sum(live.to(tl.int32), axis=0)):  # noqa: B007
            tile = tl.min(tl.where(live & (t > tile), t, NOWHERE), axis=0)
            ids = tile * TILE + columns
            z, base = combined(logits, row, ids, M, PER_ROW, False)
            log_p = logprobs(law, z)
            added = gumbel_apart(noise, ids, refused, TOKENS, ROUNDS)
            key, at = first_after(log_p + added, ids, float("inf"), -1)
            if key > best_of_p:
                best_of_p = key
                fallback = at
            if refused:
                log_q = _log_q(proposal, draft_laws, draft_bounds, m, row_of_draft, given, ids, GIVEN, False)
                rest = tl.exp(log_p) - tl.exp(log_q)
                key, at = first_after(_log(rest) + added, ids, float("inf"), -1)
                if key > best:
                    best = key
                    token = at
        token = tl.where(best > float("-inf"), token, fallback)
        tl.store(tokens + row, token.to(tl.int64))
    else:
        is_fork = tl.load(laws + row * SIZE + 3) != 0.0
        tile_top = tl.load(part + t, mask=there, other=FINITE)
        mass, relative, inverse = tempered(part, t, there, tiles, tile_top - top, temperature, is_fork, FORK)
        if refused:
            rest_of = tl.load(masses + text * tiles + t, mask=there, other=0.0)
            none = tl.max(rest_of, axis=0) <= 0.0
            log_mass = tl.where(none, _log(mass) + relative, _log(rest_of))
            key, tile = first_after(log_mass + gumbel_apart(noise, t, True, TILES, ROUNDS), t, float("inf"), -1)
            ids = tile * TILE + columns
            z, base = combined(logits, row, ids, M, PER_ROW, False)
            p = tl.exp(logprobs(law, z))
            log_q = _log_q(proposal, draft_laws, draft_bounds, m, row_of_draft, given, ids, GIVEN, False)
            rest = p - tl.where(none, 0.0, tl.exp(log_q))
            rest = tl.where(tl.max(rest, axis=0) > 0.0, rest, p)
            added = gumbel_apart(noise, ids, True, TOKENS, ROUNDS)
            key, token = first_after(_log(rest) + added, ids, float("inf"), -1)
            tl.store(tokens + row, token.to(tl.int64))
        else:
            draw_plain(
                logits, noise, (tokens, unread, unread, unread), row, t, mass, relative, top, 0.0, inverse,
                log_total, 1, M, PER_ROW, TILE, True,
            )  # fmt: skip


@triton.jit
def _log(x):
    """The logarithm; −inf where x is not above 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), float("-inf"))
