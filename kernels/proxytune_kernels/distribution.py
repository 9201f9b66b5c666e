"""The law of a row: the few numbers from which the probability of any of its logits can be told."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.merge import first_moments, tempered
from proxytune_kernels.rows import CLAMP, FINITE, key_of
from proxytune_kernels.truncate import truncate

__all__ = ["LAW", "law_at", "laws_of", "logprobs"]

LAW = ("top", "temperature", "log total", "fork")
"""What is kept of a row in `[rows, LAW]`, float32. "log total" is NaN where there is no law; "fork" is 1 or 0."""
SIZE = tl.constexpr(len(LAW))
LOWEST = tl.constexpr(-2147483648)


@triton.jit
def law_at(laws, bounds, log_min_p, row):
    """Read laws.

    Args:
        laws: Pointer to `[rows, LAW]`, float32.
        bounds: Pointer to `[rows]`, int32: the key of the least z/T that is kept.
        log_min_p: −inf for off.
        row: int64, a number or a block of them; what comes back is of its shape.

    Returns:
        Tuple, as `logprobs` reads it.
    """
    at = laws + row * SIZE
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(bounds + row), log_min_p


@triton.jit
def logprobs(law, z):
    """The log-probabilities of combined logits.

    Args:
        law: Tuple of `law_at`: top, temperature, log Σ exp((z − top)/T) over what is kept, the bound's key, log min-p.
        z: Block of float32.

    Returns:
        Block of float32, nats: −inf beside what cannot be drawn.
    """
    top, temperature, log_total, least, log_min_p = law
    relative = (z - top) * tl.div_rn(1.0, temperature)
    kept = (z > float("-inf")) & (key_of(tl.div_rn(z, temperature)) >= least) & (relative >= log_min_p)
    return tl.where(kept, relative - log_total, float("-inf"))


@triton.jit
def laws_of(
    members, strides, widths, weights,
    temperature, fork_temperature, fork_threshold, top_k, top_p, log_min_p,
    part, groups, live_groups, block_z, block_ids, laws, bounds,
    each, tiles, n_groups,
    M: tl.constexpr, PER_ROW: tl.constexpr,
    GROUP: tl.constexpr, PER_READ: tl.constexpr, FIELDS: tl.constexpr,
    TILES_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr, FORK: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """Find the laws. Grid (rows); `each` rows next to each other have the settings of one text.

    Args:
        members: Tuple of M pointers to rows of logits, the base first.
        strides: Tuple of M row strides.
        widths: Tuple of M widths.
        weights: `[rows, M]`, float32, or a tuple of M numbers.
        temperature: `[B]`, float32; so the other settings.
        fork_temperature: `[B]`, float32.
        fork_threshold: `[B]`, float32, nats.
        top_k: `[B]`, int32.
        top_p: `[B]`, float32.
        log_min_p: `[B]`, float32.
        part: `[rows, FIELDS, tiles]`, from `steer_tiles`.
        groups: `[rows, n_groups]`, from `steer_tiles`.
        live_groups: Workspace, `[rows, n_groups]`, int32.
        block_z: Workspace, `[rows, PER_READ · GROUP]`, float32.
        block_ids: Workspace, `[rows, PER_READ · GROUP]`, int32.
        laws: Out, `[rows, LAW]`, float32.
        bounds: Out, `[rows]`, int32.
        each: Rows of a text.
        tiles: Number of tiles.
        n_groups: Number of groups.
        M: Number of members.
        PER_ROW: Whether the weights are `[rows, M]`.
        GROUP: Columns per group.
        PER_READ: Groups that are read at once.
        FIELDS: Number of fields of `part`.
        TILES_PADDED: `tiles`, rounded up to a power of two.
        GROUPS_PADDED: `n_groups`, rounded up to a power of two.
        FORK: Whether the temperature depends on the entropy.
        TRUNCATED: Whether some text has top-k, top-p or min-p.
    """
    row = tl.program_id(0).to(tl.int64)
    text = row // each
    t = tl.arange(0, TILES_PADDED)
    there = t < tiles
    part += row * FIELDS * tiles
    tile_top = tl.load(part + t, mask=there, other=FINITE)
    top = tl.max(tile_top, axis=0)
    if (top == float("inf")) | (top == FINITE):
        tl.store(laws + row * SIZE, 0.0)
        tl.store(laws + row * SIZE + 1, 1.0)
        tl.store(laws + row * SIZE + 2, float("nan"))
        tl.store(laws + row * SIZE + 3, 0.0)
        tl.store(bounds + row, tl.full((), LOWEST, tl.int32))
    else:
        relative = tile_top - top
        chosen = tl.load(temperature + text)
        is_fork = top != top  # False; never a number
        if FORK:
            total, mean = first_moments(part, t, there, tiles, tl.maximum(relative, CLAMP))
            is_fork = tl.maximum(tl.log(total) - mean, 0.0) > tl.load(fork_threshold + text)
            chosen = tl.where(is_fork, tl.load(fork_temperature + text), chosen)
        mass, relative, inverse, total = tempered(part, t, there, tiles, relative, chosen, is_fork, FORK)
        least = tl.full((), LOWEST, tl.int64)
        if TRUNCATED:
            k = tl.load(top_k + text)
            p = tl.load(top_p + text)
            m = tl.load(log_min_p + text)
            if (k > 0) | (p < 1.0) | (m > float("-inf")):
                BLOCK: tl.constexpr = PER_READ * GROUP
                logits = (members, strides, widths, weights)
                work = (live_groups + row * n_groups, block_z + row * BLOCK, block_ids + row * BLOCK)
                least, floor_s, live, count, in_block, parts, kept, total = truncate(
                    logits, work, groups + row * n_groups, row, top, chosen, total, k, p, m,
                    n_groups, M, PER_ROW, GROUP, PER_READ, GROUPS_PADDED,
                )  # fmt: skip
        tl.store(laws + row * SIZE, top)
        tl.store(laws + row * SIZE + 1, chosen)
        tl.store(laws + row * SIZE + 2, tl.log(total))
        tl.store(laws + row * SIZE + 3, is_fork.to(tl.float32))
        tl.store(bounds + row, least.to(tl.int32))
