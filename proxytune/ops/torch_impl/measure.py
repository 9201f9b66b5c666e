"""One pass over the members' rows that reduces them to a few numbers per tile and per group of columns."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import CLAMP, FINITE, GROUP, TILE, MemberRows, block_of

__all__ = ["measure", "statistics"]


_LOG2E = 1.0 / math.log(2.0)


def measure(rows: MemberRows, sampling: SamplingParams | None, want: Collection[str]) -> dict[str, torch.Tensor]:
    """Pass over all columns once and reduce them as `want`, names of `proxytune.ops.StepOutput`, requires.

    Returns:
        By name, float32; what nothing in `want` depends on is missing.
        `[B, tiles]`: "max"; the sums "s", "t1", "t2" of e^d, d·e^d, d²·e^d with d = z − max; "mass" and "fork mass" of
        e^(d/T); for the KL divergence "base max", "base s" and "shift" (e^d · (d − d of the base)); "live", the number
        of columns above −inf.
        `[B, groups]`: "groups", the maximum of each group. `[B, V]`: "scores", the combined logits.
        `[B]`, int64: "argmax", the first column with the maximum; undefined in rows without a distribution.
    """
    plan = _Plan.of(rows, sampling, want)
    blocks: list[dict[str, torch.Tensor]] = []  # one per block of rows
    tiles = -(-rows.width // TILE)
    high, wide = block_of(rows)
    scratch = [rows.empty(high * wide * TILE) for _ in range(plan.buffers)]
    scores = rows.empty(rows.count * rows.width).view(rows.count, -1) if plan.scores else None
    for row in range(0, rows.count, high):
        there = slice(row, min(row + high, rows.count))
        parts = [
            _reduce(rows, there, slice(tile * TILE, min((tile + wide) * TILE, rows.width)), plan, scratch, scores)
            for tile in range(0, tiles, wide)
        ]
        if plan.argmax and len(parts) > 1:
            first = torch.cat([p["max"].amax(1, keepdim=True) for p in parts], 1).argmax(1, keepdim=True)
            column = torch.cat([p.pop("argmax") for p in parts], 1).gather(1, first)
            blocks.append(_joined(parts, 1) | {"argmax": column})
        else:
            blocks.append(_joined(parts, 1))
    out = _joined(blocks, 0)
    # From here on +inf marks a row with NaN or +inf.
    out["max"] = out["max"].nan_to_num_(nan=torch.inf, posinf=torch.inf)
    if "argmax" in out:
        out["argmax"] = out["argmax"][:, 0]
    for name, power in (("t1", 1), ("t2", 2)):
        if name in out:
            out[name] *= math.log(2.0) ** power  # from bits to nats
    if plan.unit:
        out["mass"] = out["s"]
    if scores is not None:
        out["scores"] = scores
    return out


@dataclass(frozen=True)
class _Plan:
    """What a pass has to reduce.

    Attributes:
        scales: By name, `[B]`: log₂(e) / T, the factor of d in the sums at a temperature.
        unit: Whether "mass" equals "s" because all temperatures are 1.
        raw: Whether "s" is needed; likewise `mean` for "t1" and `square` for "t2".
    """

    scales: dict[str, torch.Tensor]
    unit: bool
    raw: bool
    mean: bool
    square: bool
    groups: bool
    kl: bool
    live: bool
    argmax: bool
    scores: bool

    @property
    def buffers(self) -> int:
        """Float32 blocks that the pass needs."""
        sums = self.raw or bool(self.scales)
        return 1 + (2 if self.kl else 1 if sums and (self.raw or len(self.scales) > 1) else 0)

    @classmethod
    def of(cls, rows: MemberRows, sampling: SamplingParams | None, want: Collection[str]) -> _Plan:
        asked = set(want)
        scales: dict[str, torch.Tensor] = {}
        forks = sampling is not None and sampling.fork_threshold is not None
        raw = forks or bool({"entropy", "varentropy", "lse", "logprobs", "kl", "confidence"} & asked)
        unit = False
        if sampling is not None:
            seen = rows.device.type == "cpu"  # values may be inspected
            # The tiles' masses are needed for draws without truncation, and for top-p without top-k.
            if not seen or bool((~sampling.truncated | ((sampling.top_k == 0) & (sampling.top_p < 1))).any()):
                unit = raw and seen and bool((sampling.temperature == 1.0).all())
                if not unit:
                    scales["mass"] = sampling.temperature.reciprocal() * _LOG2E
                if forks:
                    assert sampling.fork_temperature is not None
                    scales["fork mass"] = sampling.fork_temperature.reciprocal() * _LOG2E
        return cls(
            scales=scales,
            unit=unit,
            raw=raw,
            mean=forks or bool({"entropy", "varentropy"} & asked),
            square="varentropy" in asked,
            groups="confidence" in asked or (sampling is not None and sampling.some_truncated),
            kl="kl" in asked,
            live="kept" in asked,
            argmax="argmax" in asked or sampling is None,
            scores="scores" in asked,
        )


def _reduce(
    rows: MemberRows,
    there: slice,
    columns: slice,
    plan: _Plan,
    scratch: list[torch.Tensor],
    scores: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The numbers of `measure` for a block of rows and columns; "argmax" is `[rows, 1]`; `scores` is filled.

    Every sum is over one tile, so the block's shape changes no bit. On the CPU masks and exp() are slow: 2^x is faster
    there, and clamping handles −inf.
    """
    count, width = there.stop - there.start, columns.stop - columns.start
    padded = -(-width // TILE) * TILE
    z, *more = (x[: count * padded].view(count, padded) for x in scratch)
    base = rows.read(there, columns, z[:, :width])
    out: dict[str, torch.Tensor] = {}
    if scores is not None:
        scores[there, columns] = z[:, :width]
    if width < padded:
        z[:, width:] = -torch.inf
    z, *more = (x.unflatten(1, (-1, TILE)) for x in (z, *more))  # [rows, tiles, TILE]
    if plan.groups:
        by_group = z.unflatten(-1, (-1, GROUP)).amax(-1)
        out["groups"] = by_group.flatten(1)
        top = by_group.amax(-1)
    else:
        top = z.amax(-1)
    out["max"] = top = top.clamp_(min=FINITE)  # −inf cannot be subtracted
    if plan.argmax:
        tile = top.argmax(1)  # the first; so the column
        ahead = torch.arange(0, count * z.shape[1], z.shape[1], device=tile.device)
        column = z.flatten(0, 1).index_select(0, tile + ahead).argmax(1)
        out["argmax"] = (tile * TILE + column + columns.start)[:, None]
    if plan.live:
        out["live"] = (z > -torch.inf).sum(-1)
    if not plan.raw and not plan.scales:
        return out
    d = z.sub_(top[..., None])
    if plan.kl:
        b, difference = more
        b.flatten(1)[:, :width] = base
        if width < padded:
            b.flatten(1)[:, width:] = -torch.inf
        base_top = b.amax(-1).clamp_(min=FINITE)
        b.sub_(base_top[..., None]).clamp_(min=FINITE)
        # Each relative to its own maximum, so that large logits lose no digits. Where d is −inf, its weight is 0.
        torch.clamp(d, min=FINITE, out=difference).sub_(b)
        out["base max"] = base_top
        out["base s"] = b.mul_(_LOG2E).exp2_().sum(-1)
    todo = list(plan.scales.items())
    for i, (name, scale) in enumerate(todo):
        last = not plan.raw and i == len(todo) - 1
        e = torch.mul(d, scale[there, None, None], out=d if last else more[0])
        out[name] = e.exp2_().sum(-1)  # exp2(−inf) is 0: masked tokens have no mass at any temperature
    if not plan.raw:
        return out
    d.mul_(_LOG2E).clamp_(min=CLAMP)
    e = torch.exp2(d, out=more[0])
    out["s"] = e.sum(-1)
    if plan.kl:
        out["shift"] = difference.mul_(e).sum(-1)
    if plan.mean:
        out["t1"] = e.mul_(d).sum(-1)
    if plan.square:
        out["t2"] = e.mul_(d).sum(-1)
    return out


def _joined(parts: list[dict[str, torch.Tensor]], dim: int) -> dict[str, torch.Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def statistics(tiles: dict[str, torch.Tensor], top: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merge the tiles' sums of `measure` into the row's, given its largest logit `top` `[B]`.

    Returns:
        `[B]` by name, at temperature 1: "log_total" (log Σ e^(z − top)), "lse", "entropy", "varentropy", "kl", as far
        as they were measured; nats.
    """
    out: dict[str, torch.Tensor] = {}
    if "s" not in tiles:
        return out
    s = tiles["s"]
    relative = (tiles["max"] - top[:, None]).clamp(min=CLAMP)  # [B, tiles]
    weight = relative.exp()
    total = (s * weight).sum(1)
    out["log_total"] = log_total = total.log()
    out["lse"] = top + log_total
    if "t1" in tiles:
        t1 = tiles["t1"]
        mean = ((t1 + relative * s) * weight).sum(1) / total
        out["entropy"] = (log_total - mean).clamp(min=0.0)
    if "t2" in tiles:
        square = ((tiles["t2"] + 2 * relative * t1 + relative * relative * s) * weight).sum(1) / total
        out["varentropy"] = (square - mean * mean).clamp(min=0.0)
    if "shift" in tiles:
        base_relative = tiles["base max"] - tiles["base max"].amax(1, keepdim=True)
        base_log_total = (tiles["base s"] * base_relative.clamp(min=CLAMP).exp()).sum(1).log()
        mean_shift = ((tiles["shift"] + (relative - base_relative) * s) * weight).sum(1) / total
        out["kl"] = (mean_shift - (log_total - base_log_total)).clamp(min=0.0)
    return out
