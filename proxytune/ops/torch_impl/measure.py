"""One pass over the members' rows that reduces them to a few numbers per tile and per group of columns."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.arrays import Array, at_least, count_up, exp, filled, joined, log, peak, take
from proxytune.ops.torch_impl.rows import CLAMP, FINITE, GROUP, TILE, MemberRows, Scratch, block_of

__all__ = ["measure", "settings_of", "statistics"]


_LOG2E = 1.0 / math.log(2.0)


def measure(
    rows: MemberRows, sampling: SamplingParams | None, want: Collection[str], scratch: Scratch | None = None
) -> dict[str, Array]:
    """Pass over all columns once and reduce them as `want`, names of `proxytune.ops.StepOutput`, requires.

    Returns:
        By name, float32, NumPy arrays on the CPU; what nothing in `want` depends on is missing.
        `[B, tiles]`: "max"; the sums "s", "t1", "t2" of e^d, d·e^d, d²·e^d with d = z − max; "mass" and "fork mass" of
        e^(d/T); for the KL divergence "base max", "base s" and "shift" (e^d · (d − d of the base)); "live", the number
        of columns above −inf.
        `[B, groups]`: "groups", the maximum of each group. `[B, V]`: "scores", the combined logits, a tensor.
        `[B]`, int64: "argmax", the first column with the maximum; undefined in rows without a distribution.
    """
    plan = _Plan.of(rows, sampling, want)
    tiles = -(-rows.width // TILE)
    high, wide = block_of(rows)
    scratch = Scratch() if scratch is None else scratch
    scores = rows.empty(rows.count, rows.width) if plan.scores else None
    if high >= rows.count and wide >= tiles:
        out = _reduce(rows, slice(0, rows.count), slice(0, rows.width), plan, scratch, scores)
    else:
        blocks: list[dict[str, Array]] = []  # one per block of rows
        for row in range(0, rows.count, high):
            there = slice(row, min(row + high, rows.count))
            parts = [
                _reduce(rows, there, slice(tile * TILE, min((tile + wide) * TILE, rows.width)), plan, scratch, scores)
                for tile in range(0, tiles, wide)
            ]
            if plan.argmax and len(parts) > 1:
                first = joined([peak(p["max"])[:, None] for p in parts], 1).argmax(1)
                column = joined([p.pop("argmax") for p in parts], 1)
                blocks.append(_joined(parts, 1) | {"argmax": take(column, first[:, None])})
            else:
                blocks.append(_joined(parts, 1))
        out = _joined(blocks, 0)
    # From here on +inf marks a row with NaN or +inf.
    out["max"] = filled(out["max"], out["max"] != out["max"], math.inf)
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
        looked_up: Whether single logits are asked for after the pass.
    """

    scales: dict[str, Array]
    unit: bool
    raw: bool
    mean: bool
    square: bool
    groups: bool
    kl: bool
    live: bool
    argmax: bool
    scores: bool
    looked_up: bool

    @classmethod
    def of(cls, rows: MemberRows, sampling: SamplingParams | None, want: Collection[str]) -> _Plan:
        asked = set(want)
        scales: dict[str, Array] = {}
        forks = sampling is not None and sampling.fork_threshold is not None
        raw = forks or bool({"entropy", "varentropy", "lse", "logprobs", "kl", "confidence"} & asked)
        unit = False
        if sampling is not None:
            seen = rows.on_host  # values may be inspected
            s = settings_of(rows, sampling)
            # The tiles' masses are needed for draws without truncation, and for top-p without top-k.
            if not seen or not s.all_truncated or bool(((s.top_k == 0) & (s.top_p < 1)).any()):
                unit = raw and seen and bool((s.temperature == 1.0).all())
                if not unit:
                    scales["mass"] = 1.0 / s.temperature * _LOG2E
                if forks:
                    scales["fork mass"] = 1.0 / s.fork_temperature * _LOG2E
        return cls(
            scales=scales,
            unit=unit,
            raw=raw,
            mean=forks or bool({"entropy", "varentropy"} & asked),
            square="varentropy" in asked,
            groups="confidence" in asked or (sampling is not None and sampling.some_truncated),
            kl="kl" in asked,
            live="kept" in asked and (sampling is None or not sampling.all_truncated),
            argmax="argmax" in asked or sampling is None,
            scores="scores" in asked,
            looked_up=sampling is not None or "confidence" in asked,
        )


def settings_of(rows: MemberRows, sampling: SamplingParams) -> Any:
    """The settings, on the CPU as NumPy arrays."""
    return sampling.arrays if rows.on_host else sampling


def _reduce(
    rows: MemberRows, there: slice, columns: slice, plan: _Plan, scratch: Scratch, scores: torch.Tensor | None
) -> dict[str, Array]:
    """The numbers of `measure` for a block of rows and columns; "argmax" is `[rows, 1]`; `scores` is filled.

    Every sum is over one tile, so the block's shape changes no bit. On the CPU masks and exp() are slow: 2^x is faster
    there, and clamping handles −inf.
    """
    count, width = there.stop - there.start, columns.stop - columns.start
    tiles = -(-width // TILE)
    padded = tiles * TILE
    shape = (count, tiles, TILE)

    def block(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A block `[rows, tiles, TILE]`, with −inf past the rows' end, and the part `[rows, width]` before."""
        if rows.on_host:
            array = scratch.get(name, count, padded)
            array[:, width:] = -math.inf
            return torch.from_numpy(array.reshape(shape)), torch.from_numpy(array[:, :width])
        x = rows.empty(count, padded)
        x[:, width:] = -torch.inf
        return x.view(shape), x[:, :width]

    def place(name: str) -> torch.Tensor:
        return torch.from_numpy(scratch.get(name, count, padded)[:, :width])

    def past_the_end(name: str, value: float) -> None:
        if width < padded:  # on the CPU
            scratch.get(name, count, padded)[:, width:] = value

    def column_of(x: Array) -> torch.Tensor:
        return torch.from_numpy(x[..., None]) if rows.on_host else x[..., None]

    z, inside = block("z")
    base, finite = rows.read(there, columns, inside, place)
    out: dict[str, Array] = {}
    if scores is not None:
        scores[there, columns] = inside
    if plan.groups:
        out["groups"] = groups = rows.small(z.view(count, -1, GROUP).amax(-1))
        top = peak(groups.reshape(count, tiles, -1))
    else:
        top = rows.small(z.amax(-1))
    out["max"] = top = at_least(top, FINITE)  # −inf cannot be subtracted
    if plan.argmax:
        tile = top.argmax(1)  # the first; so the column
        column = rows.small(z).reshape(-1, TILE)[tile + tiles * count_up(count, tile)].argmax(1)
        out["argmax"] = (tile * TILE + column + columns.start)[:, None]
    if plan.live:
        out["live"] = rows.small((z > -torch.inf).sum(-1))
    held = rows.on_host and plan.looked_up and (count, width) == (rows.count, rows.width)
    if held:
        rows.hold(scratch.get("z", count, padded))
    if not plan.raw and not plan.scales:
        return out

    def add_up(name: str, x: torch.Tensor) -> None:
        out[name] = rows.small(x.sum(-1))

    def spare(name: str) -> torch.Tensor:
        return torch.from_numpy(scratch.get(name, count, padded).reshape(shape)) if rows.on_host else rows.empty(*shape)

    # On the memory of the companions' logits and their sum, which is over by then.
    spent = "e" if plan.kl else "delta"
    of_d = "term" if held else "z"
    d = torch.sub(z, column_of(top), out=spare("term") if held else z)
    if plan.kl:
        b, own = block("base")
        own.copy_(base)
        out["base max"] = base_top = at_least(rows.small(b.amax(-1)), FINITE)
        b.sub_(column_of(base_top))
        # Each relative to its own maximum, so that large logits lose no digits. Where d is −inf, its weight is 0.
        difference = spare("delta")
        if finite:
            torch.sub(d, b, out=difference)
            past_the_end("delta", 0.0)
        else:
            torch.clamp(d, min=FINITE, out=difference).sub_(b.clamp_(min=FINITE))
        add_up("base s", b.mul_(_LOG2E).exp2_())
    todo = list(plan.scales.items())
    for i, (name, scale) in enumerate(todo):
        last = not plan.raw and i == len(todo) - 1
        e = torch.mul(d, column_of(scale[there, None]), out=d if last else spare(spent))
        add_up(name, e.exp2_())  # exp2(−inf) is 0: masked tokens have no mass at any temperature
    if plan.raw:
        d.mul_(_LOG2E)
        if finite:
            past_the_end(of_d, CLAMP)  # there is no other −inf
        else:
            d.clamp_(min=CLAMP)
        e = torch.exp2(d, out=spare(spent))
        add_up("s", e)
        if plan.kl:
            add_up("shift", difference.mul_(e))
        if plan.mean:
            add_up("t1", e.mul_(d))
        if plan.square:
            add_up("t2", e.mul_(d))
    return out


def _joined(parts: list[dict[str, Array]], dim: int) -> dict[str, Array]:
    if len(parts) == 1:
        return parts[0]
    return {name: joined([part[name] for part in parts], dim) for name in parts[0]}


def statistics(tiles: dict[str, Array], top: Array) -> dict[str, Array]:
    """Merge the tiles' sums of `measure` into the row's, given its largest logit `top` `[B]`.

    Returns:
        `[B]` by name, at temperature 1: "log_total" (log Σ e^(z − top)), "lse", "entropy", "varentropy", "kl", as far
        as they were measured; nats.
    """
    out: dict[str, Array] = {}
    if "s" not in tiles:
        return out
    s = tiles["s"]
    relative = at_least(tiles["max"] - top[:, None], CLAMP)  # [B, tiles]
    weight = exp(relative)
    total = (s * weight).sum(1)
    out["log_total"] = log_total = log(total)
    out["lse"] = top + log_total
    if "t1" in tiles:
        t1 = tiles["t1"]
        mean = ((t1 + relative * s) * weight).sum(1) / total
        out["entropy"] = at_least(log_total - mean, 0.0)
    if "t2" in tiles:
        square = ((tiles["t2"] + 2 * relative * t1 + relative * relative * s) * weight).sum(1) / total
        out["varentropy"] = at_least(square - mean * mean, 0.0)
    if "shift" in tiles:
        base_relative = tiles["base max"] - peak(tiles["base max"])[:, None]
        base_log_total = log((tiles["base s"] * exp(at_least(base_relative, CLAMP))).sum(1))
        mean_shift = ((tiles["shift"] + (relative - base_relative) * s) * weight).sum(1) / total
        out["kl"] = at_least(mean_shift - (log_total - base_log_total), 0.0)
    return out
