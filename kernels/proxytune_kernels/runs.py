"""Truncation of many candidates: the row is sorted in runs of RUN columns, and thresholds are looked up in them.

A run is read once. Its logits are written back in falling order, with what a threshold needs to know of those before:
their mass at every STEP-th place, the logit and the best key of every STRETCH. The number and the mass of the tokens
that reach a bound then follow exactly from a few places of each run, so a bisection does not read the row again.

Masses are whole numbers, in units of 2⁻⁴², so that a sum has the same bits in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import CLAMP, combined, gumbel, key_of, value_of

__all__ = [
    "LEFT", "RUN", "STRETCH", "STRETCHES", "WORDS",
    "firsts_of", "leave", "places", "runs_of", "sort_run", "truncate_runs",
]  # fmt: skip

RUN = 2048
"""Columns that are sorted together."""
WORDS = 1856
"""Words of 8 bytes that a run takes: the logits, their columns, the masses before them, and two numbers per stretch."""

_RUN = tl.constexpr(RUN)
_WORDS = tl.constexpr(WORDS)
STRETCH = tl.constexpr(32)
STEP = tl.constexpr(8)
STRETCHES = tl.constexpr(RUN // 32)
LEFT = tl.constexpr(5)
UNIT = tl.constexpr(2.0**42)
LOWEST = tl.constexpr(-3.4028234663852886e38)
TOKENS = tl.constexpr(0)
ROUNDS = tl.constexpr(10)


@triton.jit
def runs_of(store, row, runs):
    """Pointers to the runs of a row: logits, columns in the run, masses before each step, first logits, best keys."""
    words = store + row * runs * _WORDS
    before = words + runs * (_RUN // 2 + _RUN // 4)
    firsts = (before + runs * (_RUN // STEP)).to(tl.pointer_type(tl.float32))
    return (
        words.to(tl.pointer_type(tl.float32)), (words + runs * (_RUN // 2)).to(tl.pointer_type(tl.int16)),
        before, firsts, firsts + runs * STRETCHES,
    )  # fmt: skip


@triton.jit
def _mass(z, top, inverse):
    """exp((z − top)/T) in units of 2⁻⁴²."""
    return (tl.exp(tl.maximum((z - top) * inverse, CLAMP)) * UNIT).to(tl.int64)


@triton.jit
def _sorted(x):
    """The block in falling order, by a bitonic network."""
    at = tl.arange(0, _RUN)
    size = 2
    while size <= _RUN:
        apart = size // 2
        while apart > 0:
            other = tl.gather(x, at ^ apart, 0)
            first = ((at & apart) == 0) == ((at & size) == 0)
            x = tl.where(first == (x > other), x, other)
            apart = apart // 2
        size = size * 2
    return x


@triton.jit
def sort_run(
    logits, noise, of_runs, row, run, top, inverse, M: tl.constexpr, PER_ROW: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Read a run and write it down sorted; KEYS: with the best key (z − top)/T + noise of each stretch."""
    at = tl.arange(0, _RUN)
    z, base = combined(logits, row, at + run * _RUN, M, PER_ROW, False)
    packed = _sorted((key_of(z).to(tl.int64) << 32) | at.to(tl.int64))
    z = value_of((packed >> 32).to(tl.int32))
    place = (packed & (_RUN - 1)).to(tl.int32)
    into = at + run * _RUN
    tl.store(of_runs[0] + into, z)
    tl.store(of_runs[1] + into, place.to(tl.int16))
    mass = _mass(z, top, inverse)
    tl.store(of_runs[2] + into // STEP, tl.cumsum(mass, axis=0) - mass, mask=at % STEP == 0)
    tl.store(of_runs[3] + into // STRETCH, z, mask=at % STRETCH == 0)
    if KEYS:
        key = (z - top) * inverse + gumbel(noise, place + run * _RUN, TOKENS, ROUNDS)
        key = tl.where(z > float("-inf"), key, float("-inf"))
        best = tl.max(tl.reshape(key, (STRETCHES, STRETCH)), axis=1)
        tl.store(of_runs[4] + (tl.arange(0, STRETCHES) + run * STRETCHES), best)


@triton.jit
def leave(left, row, temperature, top, wanted_mass, log_total_raw):
    """Note what `wide.resolve_wide` has to know of a row, and that none of its programs is done; T = 0: no such row."""
    tl.store(left + row * LEFT, temperature)
    tl.store(left + row * LEFT + 1, top)
    tl.store(left + row * LEFT + 2, wanted_mass)
    tl.store(left + row * LEFT + 3, log_total_raw)
    tl.store(left + row * LEFT + 4, 0.0)


@triton.jit
def firsts_of(of_runs, runs, RUNS_PADDED: tl.constexpr):
    """The keys of the stretches' first logits, int32 `[RUNS_PADDED, STRETCHES]`."""
    run = tl.arange(0, RUNS_PADDED)[:, None]
    at = run * STRETCHES + tl.arange(0, STRETCHES)[None, :]
    return key_of(tl.load(of_runs[3] + at, mask=run < runs, other=float("-inf")))


@triton.jit
def _reached(of_runs, firsts, bound, top, inverse, RUNS_PADDED: tl.constexpr):
    """How many logits have at least the key `bound`, int32, and their mass, int64; `bound` is above the key of −inf."""
    start = tl.arange(0, RUNS_PADDED) * _RUN
    stretches = tl.sum((firsts >= bound).to(tl.int32), axis=1)
    some = stretches > 0
    # All of the stretches but the last one are inside; and all of its steps but the last one that begins inside.
    stretch = start + tl.maximum(stretches - 1, 0) * STRETCH
    at = stretch
    for i in tl.static_range(STEP, STRETCH, STEP):
        probe = tl.load(of_runs[0] + stretch + i, mask=some, other=float("-inf"))
        at += tl.where(key_of(probe) >= bound, STEP, 0)
    mass = tl.load(of_runs[2] + at // STEP, mask=some, other=0)
    z = tl.load(of_runs[0] + at[:, None] + tl.arange(0, STEP)[None, :], mask=some[:, None], other=float("-inf"))
    inside = key_of(z) >= bound
    count = tl.where(some, at - start, 0) + tl.sum(inside.to(tl.int32), axis=1)
    mass += tl.sum(tl.where(inside, _mass(z, top, inverse), 0), axis=1)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _search(of_runs, firsts, wanted, wanted_mass, top, inverse, RUNS_PADDED: tl.constexpr):
    """The largest key (int64) of a logit that `wanted` logits with the mass `wanted_mass` reach; the lowest if none."""
    lo = key_of(tl.full((), LOWEST, tl.float32)).to(tl.int64)
    hi = key_of(top).to(tl.int64) + 1
    while hi - lo > 1:
        mid = lo + (hi - lo) // 2
        count, mass = _reached(of_runs, firsts, mid.to(tl.int32), top, inverse, RUNS_PADDED)
        if (count >= wanted) & (mass.to(tl.float32) / UNIT >= wanted_mass):
            lo = mid
        else:
            hi = mid
    return lo


@triton.jit
def _least(key, temperature):
    """The key of z/T where `key` is that of z."""
    s = tl.div_rn(value_of(key.to(tl.int32)), temperature)
    return key_of(tl.maximum(s, LOWEST))


@triton.jit
def _bound(least, temperature, top, inverse, log_min_p):
    """The lowest key of a logit z whose z/T has at least the key `least`, and that min-p keeps."""
    lo = key_of(tl.full((), LOWEST, tl.float32)).to(tl.int64) - 1
    hi = key_of(top).to(tl.int64)
    while hi - lo > 1:
        mid = lo + (hi - lo) // 2
        z = value_of(mid.to(tl.int32))
        if (key_of(tl.div_rn(z, temperature)) >= least) & ((z - top) * inverse >= log_min_p):
            hi = mid
        else:
            lo = mid
    return hi.to(tl.int32)


@triton.jit
def truncate_runs(
    of_runs, runs, top, temperature, wanted_mass, top_k, top_p, log_min_p, RUNS_PADDED: tl.constexpr,
):  # fmt: skip
    """What top-k, top-p and min-p keep of a sorted row.

    Returns:
        The key of the least z/T that top-k and top-p keep; that of the least logit that all three keep; the number of
        tokens kept, int32; their mass Σ exp((z − top)/T).
    """
    inverse = tl.div_rn(1.0, temperature)
    firsts = firsts_of(of_runs, runs, RUNS_PADDED)
    least = key_of(tl.full((), LOWEST, tl.float32))
    if top_k > 0:
        least = _least(_search(of_runs, firsts, top_k, 0.0, top, inverse, RUNS_PADDED), temperature)
        bound = _bound(least, temperature, top, inverse, float("-inf"))
        count, mass = _reached(of_runs, firsts, bound, top, inverse, RUNS_PADDED)
        wanted_mass = top_p * (mass.to(tl.float32) / UNIT)
    if top_p < 1.0:
        by_mass = _least(_search(of_runs, firsts, 0, wanted_mass, top, inverse, RUNS_PADDED), temperature)
        least = tl.maximum(least, by_mass)
    bound = _bound(least, temperature, top, inverse, log_min_p)
    count, mass = _reached(of_runs, firsts, bound, top, inverse, RUNS_PADDED)
    return least, bound, count, mass.to(tl.float32) / UNIT


@triton.jit
def places(of_runs, noise, at, there, bound, top, inverse, log_kept):
    """At places of the sorted row: log-probabilities plus noise, −inf where nothing is kept; columns; logits."""
    z = tl.load(of_runs[0] + at, mask=there, other=float("-inf"))
    ids = at // _RUN * _RUN + tl.load(of_runs[1] + at, mask=there, other=0).to(tl.int32)
    key = (z - top) * inverse - log_kept + gumbel(noise, ids, TOKENS, ROUNDS)
    return tl.where(key_of(z) >= bound, key, float("-inf")), ids, z
