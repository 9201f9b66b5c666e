"""Mixtures of a table's rows for latent steps: one program per row, held in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.rows import normal

__all__ = ["mix_rows"]


@triton.jit
def mix_rows(
    table, ids, weights, tokens, soft, seed, stream, position, branch, out,
    sigma, D, K, stride,
    BLOCK: tl.constexpr, PER_READ: tl.constexpr, SOFT: tl.constexpr, NOISE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Mix, add noise, and fall back to the emitted token's row if the result is not finite. Grid (B).

    Both the fallback and the size of the noise depend on all coordinates of a row, so a program holds the whole row:
    programs for parts of a row could settle neither in one launch, and a program that went over its row in parts would
    read every candidate twice. A row of 4,096 coordinates takes 16 registers in each of 256 threads. Beyond 8,192
    coordinates the noise spills registers, which costs only time.

    Args:
        table: `[N, D]`, rows of `stride` elements.
        ids: `[B, K]`, int64.
        weights: `[B, K]`, float32.
        tokens: `[B]`, int64.
        soft: `[B]`, bool, whether to mix; read with SOFT.
        seed: `[B]`, int64; like the other noise keys read with NOISE.
        stream: The key `row`.
        position: Of the token.
        branch: Of the row.
        out: Output, `[B, D]`, in the table's dtype, contiguous.
        sigma: Standard deviation of the noise, relative to the mixture's root mean square.
        D: Coordinates.
        K: Candidates.
        stride: Row stride of `table`.
        BLOCK: D, rounded up to a power of two.
        PER_READ: Candidates' rows loaded at once.
        SOFT: Whether some rows may not be mixed.
        NOISE: Whether there is noise.
        FIRST: The counter's first word for coordinate 0.
    """
    row = tl.program_id(0).to(tl.int64)
    # If D or the stride is not a multiple of 8, rows are not aligned to 16 bytes, and no load can be wide.
    cols = tl.arange(0, BLOCK)
    taken = tl.full((), 1, tl.int32)
    if SOFT:
        taken = tl.load(soft + row).to(tl.int32)
    # −0, not 0, is the neutral element: x + −0 is x for every x, but −0 + 0 is 0. Triton reads a literal −0.0 as 0.
    nothing = tl.full((BLOCK,), -2147483648, tl.int32).to(tl.float32, bitcast=True)
    x = nothing
    # A row that is not mixed gets 0 candidates, since a branch around the loop would take registers.
    for start in range(0, K * taken, PER_READ):
        for i in tl.static_range(PER_READ):
            k = start + i
            w = tl.load(weights + row * K + k, mask=k < K, other=0.0)
            which = tl.load(ids + row * K + k, mask=k < K, other=0)
            # A row of weight 0 is not read.
            z = tl.load(table + which * stride + cols, mask=cols < tl.where(w == 0.0, 0, D), other=0.0)
            x += tl.where(w == 0.0, nothing, w * z.to(tl.float32))
    if NOISE:
        noise = (
            tl.load(seed + row),
            tl.load(position + row).to(tl.uint32),
            tl.load(stream + row).to(tl.uint32),
            tl.load(branch + row).to(tl.uint32),
        )
        size = tl.sqrt(tl.div_rn(tl.sum(x * x, axis=0), D * 1.0))
        x += sigma * size * normal(noise, cols.to(tl.uint32) + FIRST, 3, 10)
    y = x.to(out.dtype.element_ty)
    # Rounding to a narrow dtype may overflow.
    finite = tl.abs(y.to(tl.float32)) < float("inf")
    out += row * D + cols
    if (tl.min(finite.to(tl.int32), axis=0) & taken) == 1:
        tl.store(out, y, mask=cols < D)
    else:
        own = table + tl.load(tokens + row) * stride + cols
        tl.store(out, tl.load(own, mask=cols < D, other=0.0), mask=cols < D)
