"""What launches the kernels: sizes, workspaces and which parts of them are needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import triton

from proxytune_kernels.mix import mix_rows
from proxytune_kernels.resolve import resolve
from proxytune_kernels.tiles import FIELDS, steer_tiles

__all__ = ["GROUP", "PER_READ", "PER_READ_MIX", "TILE", "mix", "shape_of_mix", "step"]

TILE = 1024
"""Columns per tile of K1. It keys the noise, so it is part of the contract and never tuned."""
GROUP = 128
"""Columns per group maximum."""
PER_READ = 8
"""Groups that K2 reads at once; up to PER_READ · GROUP candidates stay in registers."""
PER_READ_MIX = 4
"""Candidates' rows that the mixing kernel has on their way at once."""
FIRST = 31 << 27
"""The counter's first word for the noise on a mixture's coordinate 0; see `proxytune.noise.slotted`."""

_STATISTICS = ("lse", "entropy", "varentropy", "kl", "confidence", "temperature")
_OF_ROWS = frozenset({"lse", "entropy", "varentropy", "kl", "confidence", "logprobs"})


def step(
    members: Sequence[torch.Tensor],
    weights: torch.Tensor | tuple[float, ...],
    sampling: Any,
    noise: Any,
    draws: int,
    want: Collection[str],
) -> dict[str, torch.Tensor]:
    """Combine, measure and draw: at most two launches, no wait for the device.

    Args:
        members: `[B, V_i]` each, float32, float16 or bfloat16, inner stride 1, the base first.
        weights: `[B, M]`, float32, or M numbers.
        sampling: `proxytune.sampling.Sampling`, or None for the argmax.
        noise: `proxytune.noise.Noise`, or None without `sampling`.
        draws: How many draws without replacement.
        want: Names of the outputs, see `proxytune.ops.Step`.

    Returns:
        The outputs by name. Nothing is checked here: `proxytune.ops.step` does.
    """
    base = members[0]
    rows, width = base.shape
    device = base.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device and its stream, whatever device the tensors are on.
        with torch.cuda.device(device):
            return step(members, weights, sampling, noise, draws, want)
    tiles = triton.cdiv(width, TILE)
    n_groups = tiles * (TILE // GROUP)
    sample = sampling is not None
    forks = sample and sampling.fork_threshold is not None
    moments = forks or not {"entropy", "varentropy"}.isdisjoint(want)
    truncated = sample and sampling.some_truncated
    in_groups = truncated or "confidence" in want
    raw = moments or not _OF_ROWS.isdisjoint(want)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    part = new(rows, len(FIELDS), tiles)
    groups = new(rows, n_groups) if in_groups else part
    scores = new(rows, width) if "scores" in want else part
    shared = {
        "M": len(members),
        "PER_ROW": isinstance(weights, torch.Tensor),
        "TILE": TILE,
        "GROUP": GROUP,
        "FIELDS": len(FIELDS),
    }
    flags = {"RAW": raw, "MOMENTS": moments, "KL": "kl" in want, "LIVE": "kept" in want}
    read = (tuple(members), tuple(x.stride(0) for x in members), tuple(x.shape[1] for x in members), weights)
    # Unused ones are never read; a pointer has to be given all the same.
    one = part
    temperature = sampling.temperature if sample else one
    fork_temperature = sampling.fork_temperature if forks else one
    steer_tiles[(tiles * rows,)](
        *read, temperature, fork_temperature, part, groups, scores,
        width, min(x.shape[1] for x in members), tiles, width,
        **shared, **flags, MASS=sample, FORK=forks, GROUPS=in_groups, SCORES="scores" in want,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    out: dict[str, torch.Tensor] = {"scores": scores}
    if set(want) <= {"scores"}:
        return {name: out[name] for name in want}

    block = PER_READ * GROUP if in_groups else 1
    statistics = new(len(_STATISTICS), rows)
    argmax, kept = new(2, rows, dtype=torch.int64)
    tokens = new(rows, draws, dtype=torch.int64)
    logprobs, draw_logprobs, keys = new(3, rows, draws)
    fork = new(rows, dtype=torch.bool)
    resolve[(rows,)](
        *read, temperature, fork_temperature, sampling.fork_threshold if forks else one,
        sampling.top_k if truncated else one, sampling.top_p if truncated else one,
        sampling.log_min_p if truncated else one,
        noise.seed if sample else one, noise.row if sample else one,
        noise.position if sample else one, noise.branch if sample else one,
        part, groups,
        new(rows, n_groups if in_groups else 1, dtype=torch.int32), new(rows, block),
        new(rows, block, dtype=torch.int32),
        statistics, argmax, kept, fork, tokens, logprobs, draw_logprobs, keys,
        rows, tiles, n_groups, draws,
        **shared, **flags, PER_READ=PER_READ,
        TILES_PADDED=triton.next_power_of_2(tiles), GROUPS_PADDED=triton.next_power_of_2(n_groups), ONE=draws == 1,
        ARGMAX="argmax" in want or not sample, SAMPLE=sample, FORK=forks, TRUNCATED=truncated,
        CONFIDENCE="confidence" in want,
        num_warps=8 if in_groups else 4, enable_fp_fusion=False,
    )  # fmt: skip
    out |= {name: statistics[i] for i, name in enumerate(_STATISTICS)}
    out |= {"argmax": argmax, "kept": kept, "fork": fork, "tokens": tokens, "logprobs": logprobs}
    out |= {"draw_logprobs": draw_logprobs, "keys": keys}
    return {name: out[name] for name in want}


def mix(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    noise: Any,
) -> torch.Tensor:
    """Mix rows of a table: one launch, no wait for the device.

    Args:
        table: `[N, D]`, float32, float16 or bfloat16, inner stride 1.
        ids: `[B, K]`, int64, contiguous; so the others.
        weights: `[B, K]`, float32.
        tokens: `[B]`, int64.
        soft: `[B]`, bool, or None.
        sigma: Relative size of the noise; not read without `noise`.
        noise: `proxytune.noise.Noise`, or None.

    Returns:
        `[B, D]`, the table's dtype. Nothing is checked here: `proxytune.mixing.mix` does.
    """
    device = table.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return mix(table, ids, weights, tokens, soft, sigma, noise)
    rows, candidates = ids.shape
    width = table.shape[1]
    out = torch.empty((rows, width), dtype=table.dtype, device=device)
    keys = (ids,) * 4 if noise is None else (noise.seed, noise.row, noise.position, noise.branch)
    block, warps = shape_of_mix(width)
    mix_rows[(rows,)](
        table, ids, weights, tokens, tokens if soft is None else soft, *keys, out,
        sigma, width, candidates, table.stride(0),
        BLOCK=block, PER_READ=PER_READ_MIX, SOFT=soft is not None, NOISE=noise is not None, FIRST=FIRST,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def shape_of_mix(width: int) -> tuple[int, int]:
    """How a row lies in the registers of its program; never depends on the batch.

    Args:
        width: D.

    Returns:
        Coordinates, a power of two, and warps: 16 coordinates in a thread from 512 up to 8,192 of them.
    """
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
