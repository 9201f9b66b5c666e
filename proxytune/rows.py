"""The members' rows of one step, and one pass over them that leaves a few numbers per tile and per group of columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from proxytune.formula import shift
from proxytune.sampling import Sampling

__all__ = ["CLAMP", "FINITE", "GROUP", "TILE", "Rows", "argmax", "measure"]

TILE = 1024
"""Columns per tile; it keys the noise, so it is part of the contract."""
GROUP = 128
"""Columns per group maximum."""
FINITE = -3.0e38
"""A maximum that can be subtracted where all is −inf."""
CLAMP = -200.0
"""Exponents from here on: exp() is 0 from about −104 on, and 0 · −inf would be NaN."""

_CHUNK = 1 << 17  # elements of a chunk: half a megabyte in float32, which stays in the cache


class Rows:
    """The members' rows with their weights, read in parts.

    Attributes:
        width: The base's number of columns V.
        device: The base's device.
    """

    def __init__(self, members: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor) -> None:
        """Keep the rows; nothing is computed.

        Args:
            members: `[B, V_i]` each, the base first.
            weights: One weight per member, or `[B, M]`.
        """
        self._members = members
        self._base_weight: float | torch.Tensor
        self._weights: Sequence[float] | torch.Tensor
        if isinstance(weights, torch.Tensor):
            self._base_weight, self._weights = weights[:, 0], weights[:, 1:]
        else:
            self._base_weight, self._weights = weights[0], weights[1:]
        self.count, self.width = members[0].shape
        self.device = members[0].device

    def base(self, start: int, stop: int) -> torch.Tensor:
        """The base's own logits.

        Args:
            start: First column.
            stop: One past the last.

        Returns:
            `[B, stop − start]`, float32.
        """
        return self._members[0][:, start:stop].float()

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """The combined logits of a range of columns.

        Args:
            start: First column.
            stop: One past the last.

        Returns:
            `[B, stop − start]`, float32.
        """
        base, *companions = (x[:, start:stop] for x in self._members)
        if isinstance(self._weights, torch.Tensor):
            # A companion's end is the end of the shift only in the rows in which it has a weight: as −inf it is.
            companions = [_filled(x, base.shape[1]) for x in companions]
        return shift(base, companions, self._weights, self._base_weight)

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """The combined logits at some columns of each row.

        Args:
            ids: `[B, n]`, int64; columns past the end are −inf.

        Returns:
            `[B, n]`, float32; the same bits as `columns` gives.
        """
        # −inf past a companion's width is "no shift" by the rule, past the base's it is "no such token".
        base, *companions = (
            x.gather(1, ids.clamp(max=x.shape[1] - 1)).float().masked_fill(ids >= x.shape[1], -torch.inf)
            for x in self._members
        )
        return shift(base, companions, self._weights, self._base_weight)


def measure(rows: Rows, sampling: Sampling | None, want: Collection[str]) -> dict[str, torch.Tensor]:
    """Pass over all columns once.

    Args:
        rows: The members' rows.
        sampling: The settings; None for none.
        want: Names of the outputs, see `proxytune.ops.Step`.

    Returns:
        By name, float32. `[B, tiles]`: "max"; the sums "s", "t1", "t2" of e^d, d·e^d, d²·e^d with d = z − max; "mass"
        and "fork mass" of e^(d/T); for the divergence "base max", "base s" and "shift" (e^d · (z − base)); "live", how
        many are above −inf. `[B, groups]`: "groups", the maxima of the groups. `[B, V]`: "scores", the combined logits.
    """
    forks = sampling is not None and sampling.fork_threshold is not None
    moments = forks or bool({"entropy", "varentropy"} & set(want))
    groups = "confidence" in want or (sampling is not None and sampling.some_truncated)
    temperatures: dict[str, torch.Tensor] = {}
    if sampling is not None:
        temperatures["mass"] = sampling.temperature
        if forks:
            assert sampling.fork_temperature is not None
            temperatures["fork mass"] = sampling.fork_temperature

    raw = moments or bool({"lse", "logprobs", "kl", "confidence"} & set(want))
    step = TILE * max(1, _CHUNK // (TILE * rows.count)) if rows.device.type == "cpu" else rows.width
    parts: dict[str, list[torch.Tensor]] = {}

    def add(name: str, value: torch.Tensor) -> None:
        parts.setdefault(name, []).append(value)

    for start in range(0, rows.width, step):
        stop = min(start + step, rows.width)
        z = rows.columns(start, stop)  # [B, C]
        if "scores" in want:
            add("scores", z)
        delta = None
        if "kl" in want:
            base = rows.base(start, stop)
            delta = _tiled(torch.where(base == -torch.inf, 0.0, z - base), 0.0)
            base = _tiled(base, -torch.inf)
            base_max = base.amax(-1).clamp(min=FINITE)
            add("base max", base_max)
            add("base s", (base - base_max[..., None]).clamp_(min=CLAMP).exp_().sum(-1))
        z = _tiled(z, -torch.inf)  # [B, tiles, TILE]
        if groups:
            by_group = z.unflatten(-1, (-1, GROUP)).amax(-1)
            add("groups", by_group.flatten(1))
            top = by_group.amax(-1)
        else:
            top = z.amax(-1)
        # NaN as a maximum is as bad as +inf, and −inf cannot be subtracted.
        top = top.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=FINITE).clamp_(min=FINITE)
        add("max", top)
        if "kept" in want:
            add("live", (z > -torch.inf).sum(-1))
        d = z.sub_(top[..., None]) if "scores" not in want else z - top[..., None]
        for name, t in temperatures.items():
            # Clamped after the division: masked tokens have no mass at any temperature.
            add(name, (d * t.reciprocal()[:, None, None]).clamp_(min=CLAMP).exp_().sum(-1))
        if not raw:
            continue
        d.clamp_(min=CLAMP)
        e = d.exp()
        add("s", e.sum(-1))
        if delta is not None:
            add("shift", (delta * e).sum(-1))
        if moments:
            e.mul_(d)
            add("t1", e.sum(-1))
            add("t2", e.mul_(d).sum(-1))
    return {name: torch.cat(values, 1) if len(values) > 1 else values[0] for name, values in parts.items()}


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, C]` → `[B, width]` at least, −inf where it has ended."""
    missing = width - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing), value=-torch.inf) if missing > 0 else x


def _tiled(x: torch.Tensor, fill: float) -> torch.Tensor:
    """`[B, C]` → `[B, tiles, TILE]`, the last one filled up."""
    missing = -x.shape[1] % TILE
    if missing:
        x = torch.nn.functional.pad(x, (0, missing), value=fill)
    return x.unflatten(1, (-1, TILE))


def argmax(rows: Rows, maxima: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The first column that holds the maximum.

    Args:
        rows: The members' rows.
        maxima: `[B, tiles]`, from `measure`.
        top: `[B]`, the largest of them.

    Returns:
        `[B]`, int64; of no meaning in rows that have no maximum.
    """
    tile = (maxima == top[:, None]).int().argmax(1, keepdim=True)  # the first
    ids = tile * TILE + torch.arange(TILE, device=top.device)  # [B, TILE]
    return tile[:, 0] * TILE + (rows.at(ids) == top[:, None]).int().argmax(1)
