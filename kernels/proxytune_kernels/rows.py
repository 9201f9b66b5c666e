"""What the kernels share: the members' rows as one, so that a token has the same bits in all, and the variates."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "CLAMP", "FINITE", "combined", "conditioned", "gumbel", "gumbel_apart", "key_of", "normal", "uniform", "value_of",
]  # fmt: skip

# A maximum that can be subtracted where all is −inf, and exponents from where exp() is 0: with both, −inf never meets
# −inf or 0, and a masked row gives 0, not NaN.
FINITE = tl.constexpr(-3.0e38)
CLAMP = tl.constexpr(-200.0)


@triton.jit
def _read(member, cols, width, FULL: tl.constexpr):
    # A masked load of a width that is no multiple of 16 is made of 16-bit loads, hence the two branches.
    if FULL:
        x = tl.load(member + cols)
    else:
        x = tl.load(member + cols, mask=cols < width, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _weight(weights, row, i: tl.constexpr, M: tl.constexpr, PER_ROW: tl.constexpr):
    if PER_ROW:
        w = tl.load(weights + row * M + i)
    else:
        w = weights[i]
    return w


@triton.jit
def combined(logits, row, cols, M: tl.constexpr, PER_ROW: tl.constexpr, FULL: tl.constexpr):
    """The combined logits and the base's own, float32, at some columns of a row.

    Args:
        logits: Tuple of four: M pointers to rows of logits, the base first; M row strides, in elements; M numbers of
            columns, past the base's the result is −inf; pointer to the weights `[B, M]`, float32, or M numbers.
        row: The row, int64.
        cols: Block of columns, int32.
        M: Number of members.
        PER_ROW: Whether the weights are `[B, M]`.
        FULL: Whether all columns are inside every member.

    Returns:
        Two blocks: combined and base. NaN or +inf of the base, or of a companion with a weight, comes out as such.
    """
    members, strides, widths, weights = logits
    base = _read(members[0] + row * strides[0], cols, widths[0], FULL)
    silent = base == float("-inf")
    # Companions first, one after the other, then the base: as in `proxytune.formulas.shift.shift`, to the bit.
    delta = tl.zeros_like(base)
    for i in tl.static_range(1, M):
        x = _read(members[i] + row * strides[i], cols, widths[i], FULL)
        w = _weight(weights, row, i, M, PER_ROW)
        x = tl.where(w == 0.0, 0.0, x)  # not heard, whatever it says
        silent = silent | (x == float("-inf"))
        delta += w * x
    if M > 1:
        # −inf here is a companion's +inf under a negative weight: it must not pass for "forbidden".
        delta = tl.where(silent, 0.0, tl.where(delta == float("-inf"), float("nan"), delta))
    z = _weight(weights, row, 0, M, PER_ROW) * base + delta
    z = tl.where(base == float("-inf"), float("-inf"), z)
    return tl.where(base < float("inf"), z, float("nan")), base


@triton.jit
def gumbel(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Standard Gumbel variates `−log E` of one Philox word each; counter and series: see `proxytune.ops.noise`.

    Args:
        noise: Tuple of the keys: seed (int64), position, row and branch (uint32).
        index: Block of int32: token ids or tile numbers.
        STREAM: Which of them.
        ROUNDS: Rounds of Philox.

    Returns:
        Block of float32.
    """
    r, _ = _words(noise, index.to(tl.uint32), STREAM, ROUNDS)
    return -tl.log(_exponential(r))


@triton.jit
def gumbel_apart(noise, index, apart, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """As `gumbel`, or variates that are independent of those.

    Args:
        noise: As in `gumbel`.
        index: As in `gumbel`.
        apart: Scalar of bool: whether to take the independent ones, made of another word.
        STREAM: As in `gumbel`.
        ROUNDS: As in `gumbel`.

    Returns:
        Block of float32.
    """
    r, other = _words(noise, index.to(tl.uint32), STREAM, ROUNDS)
    return -tl.log(_exponential(tl.where(apart, other, r)))


@triton.jit
def uniform(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Uniform variates of one Philox word each, in (0, 1].

    Args:
        noise: As in `gumbel`; the position may be a block.
        index: Block of uint32.
        STREAM: Which stream.
        ROUNDS: Rounds of Philox.

    Returns:
        Block of float32.
    """
    r, _ = _words(noise, index, STREAM, ROUNDS)
    return _unit(r)


@triton.jit
def normal(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Standard normal variates of two Philox words each, by the transform of Box and Muller; see `proxytune.ops.noise`.

    Args:
        noise: Tuple of the keys: seed (int64), position, row and branch (uint32).
        index: Block of uint32, as `proxytune.ops.noise.slotted` makes it.
        STREAM: Which stream.
        ROUNDS: Rounds of Philox.

    Returns:
        Block of float32.
    """
    r, other = _words(noise, index, STREAM, ROUNDS)
    # cos 2πu = sin 2πt with t in [−¼, ¼], by its series. A general cosine keeps tables for huge angles in local memory.
    t = tl.abs(_unit(other) - 0.5) - 0.25
    z = t * t
    cosine = 42.05869394489765 + z * (-15.094642576822984 + z * 3.8199525848482803)
    cosine = -41.341702240399755 + z * (81.60524927607504 + z * (-76.70585975306136 + z * cosine))
    cosine = t * (6.283185307179586 + z * cosine)
    return tl.sqrt(2.0 * _exponential(r)) * cosine


@triton.jit
def _words(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    seed, position, row, branch = noise
    zero = index * 0
    r0, r1, _, _ = tl.philox(seed, index, zero + position, zero + row, zero + (branch * 4 + STREAM), ROUNDS)
    return r0, r1


@triton.jit
def _exponential(r):
    u = _unit(r)
    v = _unit(r ^ 0xFFFFFFFF)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return tl.where(u < 0.015625, series, -tl.log(v))


@triton.jit
def _unit(r):
    high = ((r >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    low = ((r & 255).to(tl.float32) - 127.5) * 2.3283064365386963e-10
    return high + low


@triton.jit
def key_of(x):
    """int32 numbers in the order of the float32 numbers that they are the bits of.

    Args:
        x: Block or scalar of float32, no NaN.

    Returns:
        int32 of the same shape.
    """
    b = x.to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The inverse of `key_of`.

    Args:
        key: int32.

    Returns:
        float32.
    """
    b = key ^ ((key >> 31) & 0x7FFFFFFF)
    return b.to(tl.float32, bitcast=True)


@triton.jit
def conditioned(perturbed, maximum):
    """Gumbel variates of a set, given that their maximum is another one: `−log(e^−K − e^−Z + e^−G)`, kept stable.

    Kool et al. 2019 (arXiv 1903.06059), appendix B.3; the same arithmetic as in `proxytune.ops.torch_impl.draw`.

    Args:
        perturbed: Block G, float32; −inf for what is not in the set.
        maximum: Scalar K.

    Returns:
        Block of float32; the largest is exactly K.
    """
    largest = tl.max(perturbed, axis=0)
    absent = perturbed == float("-inf")
    gap = tl.where(absent, 1.0, largest - perturbed)
    small = gap * (1.0 - gap * (0.5 - gap * 0.16666666666666666))
    log1mexp = tl.log(tl.where(gap < 0.015625, small, 1.0 - tl.exp(-gap)))
    v = maximum - tl.where(absent, 0.0, perturbed) + log1mexp
    x = tl.exp(-tl.abs(v))
    series = x * (1.0 - x * (0.5 - x * 0.3333333333333333))
    softplus = tl.maximum(v, 0.0) + tl.where(x < 0.015625, series, tl.log(1.0 + x))
    key = tl.where(gap == 0.0, maximum, maximum - softplus)
    return tl.where(absent, float("-inf"), key)
