"""`proxytune.ops.step` in torch: the reference, used where Triton cannot run.

It follows the kernels' plan with the same noise: one pass over the members' rows leaves a few numbers per tile of 1024
columns and the maximum of every 128; the rest reads these, and goes back only to the tiles or groups that matter (for
top-p without top-k on a flat row, to most of them). On the CPU the pass goes block by block, so no `[B, V]` temporary
is made, and few candidates are sorted. Elsewhere sizes must be known without waiting for the device, so all tokens are
candidates.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.distribution import distribution_of, shares
from proxytune.ops.torch_impl.draw import draw
from proxytune.ops.torch_impl.measure import measure, statistics
from proxytune.ops.torch_impl.rows import FINITE, MemberRows, combined, first_largest
from proxytune.ops.torch_impl.truncate import mean_of_largest

__all__ = ["CONFIDENCE_TOKENS", "decide", "draw_logprobs", "nucleus"]

CONFIDENCE_TOKENS = 20
"""Number of most probable tokens in the confidence (DeepConf, arXiv 2508.15260)."""


@torch.no_grad()
def decide(
    rows: MemberRows, sampling: SamplingParams | None, noise: Noise | None, draws: int, want: Collection[str]
) -> dict[str, torch.Tensor]:
    """Measure the rows and draw; the outputs named in `want`, see `proxytune.ops.StepOutput`."""
    if sampling is None and rows.device.type == "cpu" and set(want) <= {"tokens", "argmax"}:
        token, top = first_largest(rows)  # [B, 1]
        token = token.masked_fill(~((top > FINITE) & (top < torch.inf)), -1)
        return {name: token if name == "tokens" else token[:, 0].clone() for name in want}
    if set(want) == {"scores"}:
        return {"scores": combined(rows)}
    tiles = measure(rows, sampling, want)
    top = tiles["max"].amax(1)  # [B]
    bad, dead = top == torch.inf, top == FINITE
    undecided = bad | dead
    out = statistics(tiles, top)
    if "confidence" in want:
        out["confidence"] = out["log_total"] - mean_of_largest(rows, tiles["groups"], top, CONFIDENCE_TOKENS)
    if "argmax" in tiles:
        out["argmax"] = tiles["argmax"]
    if sampling is None:
        out["tokens"] = out["argmax"][:, None].clone()  # outputs do not share memory
        out["relative"] = torch.zeros_like(top)[:, None]
    else:
        assert noise is not None
        out |= draw(rows, tiles, out.get("entropy"), top, sampling, noise, draws)
    if "logprobs" in want:
        out["logprobs"] = out["relative"] - out["log_total"][:, None]
    # On the CPU masking can be skipped if every row has a distribution.
    if rows.device.type != "cpu" or bool(undecided.any()):
        if "lse" in out:
            out["lse"] = out["lse"].masked_fill(dead, -torch.inf).masked_fill(bad, torch.nan)
        for name, value in (("fork", False), ("kept", 0)):
            if name in out:
                out[name] = _masked(out[name], undecided, value)
        for name in out.keys() & {"tokens", "argmax"}:
            out[name] = _masked(out[name], undecided, -1)
        measured = {"entropy", "varentropy", "kl", "confidence", "temperature", "logprobs", "draw_logprobs", "keys"}
        for name in out.keys() & measured:
            out[name] = _masked(out[name], undecided, torch.nan)
    if "scores" in want:
        out["scores"] = tiles["scores"]
    return {name: out[name] for name in want}


@torch.no_grad()
def draw_logprobs(rows: MemberRows, sampling: SamplingParams, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`proxytune.ops.torch_impl.distribution.shares` of unmeasured rows; NaN in rows without a distribution."""
    tiles = measure(rows, sampling, ())
    top = tiles["max"].amax(1)  # [B]
    undecided = (top == torch.inf) | (top == FINITE)
    logprobs, rest = shares(rows, tiles, statistics(tiles, top).get("entropy"), top, sampling, ids)
    return _masked(logprobs, undecided, torch.nan), _masked(rest, undecided, torch.nan)


@torch.no_grad()
def nucleus(rows: MemberRows, sampling: SamplingParams) -> torch.Tensor:
    """The smallest logit that top-p keeps, `[B]`, for settings with top-p alone at temperature 1.

    NaN in rows with NaN or +inf; −inf in rows of −inf only.
    """
    tiles = measure(rows, sampling, ())
    top = tiles["max"].amax(1)  # [B]
    kept = distribution_of(rows, tiles, None, top, sampling).kept
    assert kept is not None
    return kept.nucleus[:, 0].masked_fill(top == FINITE, -torch.inf).masked_fill(top == torch.inf, torch.nan)


def _masked(x: torch.Tensor, rows: torch.Tensor, value: float) -> torch.Tensor:
    return x.masked_fill(rows[:, None] if x.ndim == 2 else rows, value)
