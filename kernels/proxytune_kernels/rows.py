"""What the kernels share: the combined logits, so that a token has the same bits in all of them, and the variates."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "CLAMP", "FINITE", "MASKED", "combined", "combined_unmasked", "conditioned", "gumbel", "gumbel_apart", "key_of",
    "normal", "uniform", "value_of",
]  # fmt: skip

# FINITE stands for the maximum of −inf only, and CLAMP bounds exponents from below (exp() is 0 there). Together they
# avoid −inf − −inf and 0 · −inf, so that a masked row gives 0, not NaN.
FINITE = tl.constexpr(-3.0e38)
CLAMP = tl.constexpr(-200.0)
# So far below the largest logit, a token is masked by a finite number (finfo.min of float16 is −65504).
MASKED = tl.constexpr(-5000.0)


@triton.jit
def _read(member, cols, width, FULL: tl.constexpr):
    # With a width that is not a multiple of 16, masked loads are split into 16-bit ones, hence the two branches.
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
def _weighted_offset(offsets, w, row, i: tl.constexpr, M: tl.constexpr):
    x = tl.load(offsets + row * M + i)
    # The normaliser of a row of −inf only is no offset; +inf would silence the member.
    x = tl.where(x < float("inf"), x, float("nan"))
    return tl.where((w == 0.0) | (x == float("-inf")), 0.0, w * x)


@triton.jit
def combined(logits, row, cols, M: tl.constexpr, PER_ROW: tl.constexpr, FULL: tl.constexpr):
    """The combined logits and the base's own, float32, at columns `cols` (int32) of a row (int64).

    FULL says that all columns are inside every member. NaN or +inf of the base, of a companion with a weight, or of the
    member that the floors look at, comes out as NaN or +inf.
    """
    members, strides, widths, weights, offsets, floors = logits
    base = _read(members[0] + row * strides[0], cols, widths[0], FULL)
    silent = base == float("-inf")
    # Companions first, one after the other, then the base: as in `proxytune.formulas.shift.shift`, to the bit.
    delta = tl.zeros_like(base)
    offset = 0.0
    for i in tl.static_range(1, M):
        x = _read(members[i] + row * strides[i], cols, widths[i], FULL)
        w = _weight(weights, row, i, M, PER_ROW)
        x = tl.where(w == 0.0, 0.0, x)  # weight 0 suppresses NaN and infinities
        silent = silent | (x == float("-inf"))
        delta += w * x
        if offsets is not None:
            offset += _weighted_offset(offsets, w, row, i, M)
    if M > 1:
        if offsets is not None:
            delta -= offset
        # −inf here comes from a companion's +inf under a negative weight; it must not act as a mask.
        delta = tl.where(silent, 0.0, tl.where(delta == float("-inf"), float("nan"), delta))
    w = _weight(weights, row, 0, M, PER_ROW)
    own = w * base
    if offsets is not None:
        own -= _weighted_offset(offsets, w, row, 0, M)
    z = own + delta
    z = tl.where(base == float("-inf"), float("-inf"), z)
    z = tl.where(base < float("inf"), z, float("nan"))
    if floors is not None:
        y = _read(members[M] + row * strides[M], cols, widths[M], FULL)
        floor = tl.load(floors + row)
        y = tl.where(floor == float("-inf"), 0.0, y)  # without a floor, not even NaN counts
        z = tl.where((y < floor) & (z < float("inf")), float("-inf"), z)
        z = tl.where(y < float("inf"), z, float("nan"))
        z = tl.where(floor == floor, z, float("nan"))
    return z, base


@triton.jit
def combined_unmasked(logits, row, cols, M: tl.constexpr, PER_ROW: tl.constexpr):
    """`combined` at columns inside every member, without masks and floors, at a third of its instructions.

    Where all is finite, the same bits, but for the sign of 0. NaN and infinities of a member, even of one without a
    weight, come out as one of them.
    """
    members, strides, widths, weights, offsets, floors = logits
    base = _read(members[0] + row * strides[0], cols, widths[0], True)
    z = _weight(weights, row, 0, M, PER_ROW) * base
    if offsets is not None:
        z -= _weighted_offset(offsets, _weight(weights, row, 0, M, PER_ROW), row, 0, M)
    if M > 1:
        w = _weight(weights, row, 1, M, PER_ROW)
        delta = w * _read(members[1] + row * strides[1], cols, widths[1], True)
        offset = 0.0
        if offsets is not None:
            offset += _weighted_offset(offsets, w, row, 1, M)
        for i in tl.static_range(2, M):
            w = _weight(weights, row, i, M, PER_ROW)
            delta += w * _read(members[i] + row * strides[i], cols, widths[i], True)
            if offsets is not None:
                offset += _weighted_offset(offsets, w, row, i, M)
        if offsets is not None:
            delta -= offset
        z += delta
    return z, base


@triton.jit
def gumbel(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Standard Gumbel variates `−log E`, one Philox word per int32 token id or tile; see `proxytune.ops.noise`."""
    r, _ = _words(noise, index.to(tl.uint32), STREAM, ROUNDS)
    return -tl.log(_exponential(r))


@triton.jit
def gumbel_apart(noise, index, apart, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """As `gumbel`; where `apart`, from another word, hence independent of `gumbel`'s."""
    r, other = _words(noise, index.to(tl.uint32), STREAM, ROUNDS)
    return -tl.log(_exponential(tl.where(apart, other, r)))


@triton.jit
def uniform(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Uniform variates in (0, 1], one Philox word each, for uint32 indices; the position in `noise` may be a block."""
    r, _ = _words(noise, index, STREAM, ROUNDS)
    return _unit(r)


@triton.jit
def normal(noise, index, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """Standard normal variates (Box-Muller), two Philox words each; uint32 indices of `proxytune.ops.noise.slotted`."""
    r, other = _words(noise, index, STREAM, ROUNDS)
    # cos 2πu = sin 2πt with t in [−¼, ¼], by its series. A general cosine needs tables for huge angles in local memory.
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
    """Map float32 without NaN to int32 of the same order."""
    b = x.to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The inverse of `key_of`."""
    b = key ^ ((key >> 31) & 0x7FFFFFFF)
    return b.to(tl.float32, bitcast=True)


@triton.jit
def conditioned(perturbed, maximum):
    """Gumbel variates G conditioned on their maximum K: `−log(e^−K − e^−Z + e^−G)`, Z = max G, numerically stable.

    Kool et al. 2019 (arXiv 1903.06059), appendix B.3; the same arithmetic as `proxytune.ops.torch_impl.draw`. G is −inf
    for what is not in the set; the largest result is exactly K.
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
