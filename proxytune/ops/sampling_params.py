"""What turns a row of logits into a draw: temperature, top-k, top-p and min-p, checked once, kept on the device.

The order is that of transformers' `generate()`: temperature, top-k, top-p, min-p. A decode step must not wait for the
device, so all values are checked when the settings are made, before the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from proxytune.errors import InputError
from proxytune.validation import as_float

__all__ = ["LEAST_TEMPERATURE", "SamplingParams"]

LEAST_TEMPERATURE = 9.99e-31
"""1e-30, as rounded to float32; far below it, logits divided by the temperature overflow."""

Setting = float | torch.Tensor | None


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """Settings for a batch, one per row; made by `SamplingParams.of`.

    Attributes:
        temperature: `[B]`, float32, > 0; divides the logits. Below the fork threshold, if there is one.
        top_k: `[B]`, int32; 0 for off.
        top_p: `[B]`, float32 in (0, 1]; 1 for off.
        log_min_p: `[B]`, float32, ≤ 0; −inf for off.
        fork_threshold: `[B]`, float32, nats; None for no entropy-chosen temperature.
        fork_temperature: `[B]`, float32: the temperature where the entropy is above the threshold; None with it.
        truncated: `[B]`, bool: which rows have top-k, top-p or min-p.
        some_truncated: Whether some row has; known to the host.
        all_truncated: Whether all rows have.
        largest_k: The largest top-k of all rows; 0 if none.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    fork_threshold: torch.Tensor | None
    fork_temperature: torch.Tensor | None
    truncated: torch.Tensor
    some_truncated: bool
    all_truncated: bool
    largest_k: int

    @classmethod
    def of(
        cls,
        rows: int,
        *,
        temperature: Setting = 1.0,
        top_k: int | torch.Tensor | None = None,
        top_p: Setting = None,
        min_p: Setting = None,
        fork_threshold: Setting = None,
        fork_temperature: Setting = None,
        device: torch.device | str | None = None,
    ) -> SamplingParams:
        """Check the settings and put them on the device; this waits for the device, so do it before the loop.

        Args:
            rows: The number of rows B.
            temperature: > 0; a number or `[B]`. With a fork threshold, the temperature of the other rows (the paper's
                T_exec, arXiv 2506.01939).
            top_k: Keep the k largest and what ties with the k-th; 0 or None for off.
            top_p: Keep the smallest set of the largest whose mass reaches p, with what ties with its smallest, in
                (0, 1]; None for off.
            min_p: Keep what has at least this share of the largest probability, in [0, 1]; 0 or None for off.
            fork_threshold: Entropy in nats; rows above it are forks and get `fork_temperature`.
            fork_temperature: > 0; needed with `fork_threshold` (the paper's T_fork).
            device: Where the logits are.

        Returns:
            The settings.

        Raises:
            InputError: If a value is out of its range or NaN, or a tensor is not `[B]`.
        """
        if rows < 1:
            raise InputError.of("sampling", expected="at least one row", got=f"{rows}", remedy="Pass the batch size.")
        if (fork_threshold is None) != (fork_temperature is None):
            raise InputError.of(
                "fork_threshold",
                expected="a threshold and a fork_temperature, or neither",
                got=f"fork_threshold={fork_threshold!r}, fork_temperature={fork_temperature!r}",
                remedy="Give both: rows whose entropy is above the threshold get the fork temperature.",
            )
        # With smaller ones, logits of a usual size divided by them would be infinite.
        positive, positive_says = (lambda v: LEAST_TEMPERATURE <= v < math.inf), "a finite number ≥ 1e-30"
        k = _setting("top_k", top_k, rows, 0, lambda v: 0 <= v < 2**31 and v == int(v), "a whole number ≥ 0", device)
        p = _setting("top_p", top_p, rows, 1.0, lambda v: 0 < v <= 1, "a number in (0, 1]", device)
        m = _setting("min_p", min_p, rows, 0.0, lambda v: 0 <= v <= 1, "a number in [0, 1]", device)
        truncated = (k > 0) | (p < 1) | (m > 0)
        forks = fork_threshold is not None
        return cls(
            temperature=_setting("temperature", temperature, rows, 1.0, positive, positive_says, device),
            top_k=k.to(torch.int32),
            top_p=p,
            log_min_p=m.double().log().float(),
            fork_threshold=_setting("fork_threshold", fork_threshold, rows, 0.0, math.isfinite, "finite nats", device)
            if forks
            else None,
            fork_temperature=_setting("fork_temperature", fork_temperature, rows, 1.0, positive, positive_says, device)
            if forks
            else None,
            truncated=truncated,
            some_truncated=bool(truncated.any()),
            all_truncated=bool(truncated.all()),
            largest_k=int(k.max()),
        )

    def pick(self, index: torch.Tensor) -> SamplingParams:
        """The settings of some of the rows; does not wait for the device.

        Args:
            index: `[N]`, int64: which rows; one may be there more than once.

        Returns:
            Settings for N rows. What the host knows of them stays what it knew of all, so `some_truncated` and
            `largest_k` are bounds.
        """
        columns: dict[str, Any] = {
            name: x.index_select(0, index) for name, x in vars(self).items() if isinstance(x, torch.Tensor)
        }
        return replace(self, **columns)


def _setting(
    name: str,
    value: Setting,
    rows: int,
    default: float,
    fits: Callable[[float], bool],
    says: str,
    device: torch.device | str | None,
) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.shape != (rows,):
        raise InputError.of(
            name, expected=f"{says}, or a tensor [B] for {rows} rows", got=f"shape {list(value.shape)}", remedy=_REMEDY
        )
    given = default if value is None else value
    values = given.tolist() if isinstance(given, torch.Tensor) else [given]
    for one in values:
        if not fits(as_float(one)):  # NaN, which is no number's, fits nowhere
            raise InputError.of(name, expected=says, got=repr(one), remedy=_REMEDY)
    out = torch.tensor(values, dtype=torch.float64 if name == "top_k" else torch.float32)
    # What rounds to a value that is out of range would be used as such: 1e-50 is 0 in float32.
    if not all(fits(v) for v in out.tolist()):
        raise InputError.of(name, expected=f"{says} in float32", got=repr(values[0]), remedy=_REMEDY)
    return out.to(device).expand(rows).contiguous()


_REMEDY = "Settings are those of transformers' GenerationConfig; leave one out to switch it off."
