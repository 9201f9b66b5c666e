"""Sampling parameters per row: checked once before the loop, since a decode step must not wait for the device.

They apply in the order of transformers' `generate()`: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from proxytune.errors import InputError
from proxytune.validation import as_float

__all__ = ["LEAST_TEMPERATURE", "SamplingParams"]

LEAST_TEMPERATURE = 9.99e-31
"""1e-30, less a margin for rounding to float32. Far below it, logits divided by the temperature overflow."""

Setting = float | torch.Tensor | None


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """Sampling parameters of a batch, one per row; made by `SamplingParams.of`.

    Attributes:
        temperature: `[B]`, float32, > 0; divides the logits. With a fork threshold, for rows at or below it.
        top_k: `[B]`, int32; 0 for off.
        top_p: `[B]`, float32 in (0, 1]; 1 for off.
        log_min_p: `[B]`, float32, ≤ 0; −inf for off.
        fork_threshold: `[B]`, float32, nats; None without fork temperatures.
        fork_temperature: `[B]`, float32: the temperature of rows whose entropy is above the threshold; None without
            one.
        truncated: `[B]`, bool: rows with top-k, top-p or min-p.
        some_truncated: Whether any row is truncated; known on the host.
        all_truncated: Whether all rows are.
        largest_k: The largest top-k; 0 if none.
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

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a copy has arrays of its own

    @cached_property
    def arrays(self) -> Any:
        """The same with NumPy arrays on the tensors' memory, for settings on the CPU."""
        columns: dict[str, Any] = {k: x.numpy() for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **columns)

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
        """Check the settings and put them on the device. This waits for the device: call it before the loop.

        Args:
            rows: B.
            temperature: > 0; a number or `[B]`. With a fork threshold, the temperature of the other rows (T_exec of
                arXiv 2506.01939).
            top_k: Keep the k largest, and all that tie with the k-th; 0 or None for off.
            top_p: In (0, 1]: keep the smallest set of the most probable tokens whose mass reaches p, and all that tie
                with its smallest; None for off.
            min_p: In [0, 1]: keep tokens with at least this share of the largest probability; 0 or None for off.
            fork_threshold: Entropy in nats; rows above it are forks and get `fork_temperature`.
            fork_temperature: > 0; required with `fork_threshold` (T_fork of the same paper).
            device: Where the logits are.

        Raises:
            InputError: If a value is out of range or NaN, or a tensor is not `[B]`.
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
        # Dividing logits of usual size by a smaller temperature would overflow.
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
        """The settings of the rows `index`, `[N]`, int64, repeats allowed; does not wait for the device.

        The host's values are those of all rows, so `some_truncated` and `largest_k` are upper bounds.
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
            remedy = "For the argmax, leave `sampling` out." if name == "temperature" and one == 0 else _REMEDY
            raise InputError.of(name, expected=says, got=repr(one), remedy=remedy)
    out = torch.tensor(values, dtype=torch.float64 if name == "top_k" else torch.float32)
    # Check the rounded value too, since that is what is used: 1e-50 is 0 in float32.
    if not all(fits(v) for v in out.tolist()):
        raise InputError.of(name, expected=f"{says} in float32", got=repr(values[0]), remedy=_REMEDY)
    return out.to(device).expand(rows).contiguous()


_REMEDY = "Settings are those of transformers' GenerationConfig; leave one out to switch it off."
