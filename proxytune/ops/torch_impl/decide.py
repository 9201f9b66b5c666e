"""`proxytune.ops.step` in torch: the reference, used where Triton cannot run.

It follows the kernels' plan with the same noise: one pass over the members' rows leaves a few numbers per tile of 1024
columns and the maximum of every 128; the rest reads these, and goes back only to the tiles or groups that matter (for
top-p without top-k on a flat row, to most of them). On the CPU the pass goes block by block, so no `[B, V]` temporary
is made, and few candidates are sorted. Elsewhere sizes must be known without waiting for the device, so all tokens are
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch

from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import Array, as_tensor, clone, filled, peak
from proxytune.ops.torch_impl.distribution import distribution_of, shares
from proxytune.ops.torch_impl.draw import draw
from proxytune.ops.torch_impl.measure import measure, statistics
from proxytune.ops.torch_impl.one_row import token_of_one_row
from proxytune.ops.torch_impl.rows import FINITE, MemberRows, combined, first_largest, kept_scratch
from proxytune.ops.torch_impl.truncate import mean_of_largest

__all__ = ["CONFIDENCE_TOKENS", "decide", "draw_logprobs", "nucleus"]

CONFIDENCE_TOKENS = 20
"""Number of most probable tokens in the confidence (DeepConf, arXiv 2508.15260)."""


def decide(
    rows: MemberRows, sampling: SamplingParams | None, noise: Noise | None, draws: int, want: Collection[str]
) -> dict[str, torch.Tensor]:
    """Measure the rows and draw; the outputs named in `want`, see `proxytune.ops.StepOutput`."""
    if rows.tracked:
        with torch.no_grad():
            return _decide(rows, sampling, noise, draws, want)
    return _decide(rows, sampling, noise, draws, want)


def _decide(
    rows: MemberRows, sampling: SamplingParams | None, noise: Noise | None, draws: int, want: Collection[str]
) -> dict[str, torch.Tensor]:
    asked = set(want)
    if sampling is None and rows.on_host and asked <= {"tokens", "argmax"}:
        token, top = first_largest(rows)  # [B, 1]
        if not (top.min() > FINITE and top.max() < math.inf):
            token = filled(token, ~((top > FINITE) & (top < math.inf)), -1)
        if len(want) == 1:
            return {name: torch.from_numpy(token if name == "tokens" else token[:, 0]) for name in want}
        return {name: torch.from_numpy(token.copy() if name == "tokens" else token[:, 0].copy()) for name in want}
    if rows.count == draws == 1 and rows.on_host and asked == {"tokens"} and sampling is not None:
        assert noise is not None
        if (token := token_of_one_row(rows, sampling, noise)) is not None:
            return {"tokens": torch.from_numpy(token)}
    if asked == {"scores"}:
        return {"scores": combined(rows)}
    with np.errstate(all="ignore"):
        return _decided(rows, sampling, noise, draws, want, asked)


def _decided(
    rows: MemberRows,
    sampling: SamplingParams | None,
    noise: Noise | None,
    draws: int,
    want: Collection[str],
    asked: set[str],
) -> dict[str, torch.Tensor]:
    tiles = measure(rows, sampling, asked, kept_scratch(rows.count, rows.width) if rows.on_host else None)
    top = peak(tiles["max"])  # [B]
    bad, dead = top == math.inf, top == FINITE
    undecided = bad | dead
    out = statistics(tiles, top)
    if "confidence" in asked:
        out["confidence"] = out["log_total"] - mean_of_largest(rows, tiles["groups"], top, CONFIDENCE_TOKENS)
    if "argmax" in tiles:
        out["argmax"] = tiles["argmax"]
    if sampling is None:
        if "argmax" in tiles:
            out["tokens"] = clone(out["argmax"][:, None])  # outputs do not share memory
            out["relative"] = filled(top, top == top, 0.0)[:, None]
    else:
        assert noise is not None
        out |= draw(rows, tiles, out.get("entropy"), top, sampling, noise, draws)
    if "logprobs" in asked:
        out["logprobs"] = out["relative"] - out["log_total"][:, None]
    # On the CPU masking can be skipped if every row has a distribution.
    if not rows.on_host or undecided.any():
        if "lse" in out:
            out["lse"] = filled(filled(out["lse"], dead, -math.inf), bad, math.nan)
        for name, value in (("fork", False), ("kept", 0)):
            if name in out:
                out[name] = _masked(out[name], undecided, value)
        for name in out.keys() & {"tokens", "argmax"}:
            out[name] = _masked(out[name], undecided, -1)
        measured = {"entropy", "varentropy", "kl", "confidence", "temperature", "logprobs", "draw_logprobs", "keys"}
        for name in out.keys() & measured:
            out[name] = _masked(out[name], undecided, math.nan)
    if "scores" in asked:
        out["scores"] = tiles["scores"]
    return {name: as_tensor(out[name]) for name in want}


@torch.no_grad()
@np.errstate(all="ignore")
def draw_logprobs(rows: MemberRows, sampling: SamplingParams, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`proxytune.ops.torch_impl.distribution.shares` of unmeasured rows; NaN in rows without a distribution."""
    tiles = measure(rows, sampling, ())
    top = peak(tiles["max"])  # [B]
    undecided = (top == math.inf) | (top == FINITE)
    logprobs, rest = shares(rows, tiles, statistics(tiles, top).get("entropy"), top, sampling, rows.small(ids))
    logprobs, rest = _masked(logprobs, undecided, math.nan), _masked(rest, undecided, math.nan)
    return as_tensor(logprobs), as_tensor(rest)


@torch.no_grad()
@np.errstate(all="ignore")
def nucleus(rows: MemberRows, sampling: SamplingParams) -> torch.Tensor:
    """The smallest logit that top-p keeps, `[B]`, for settings with top-p alone at temperature 1.

    NaN in rows with NaN or +inf; −inf in rows of −inf only.
    """
    tiles = measure(rows, sampling, ())
    top = peak(tiles["max"])  # [B]
    least = distribution_of(rows, tiles, None, top, sampling).least[:, 0]
    return as_tensor(filled(filled(least, top == FINITE, -math.inf), top == math.inf, math.nan))


def _masked(x: Array, rows: Array, value: float) -> Array:
    return filled(x, rows[:, None] if x.ndim == 2 else rows, value)
