"""The arithmetic of every formula: a weighted sum of companions' logits, added to the base's.

- Arithmetic is float32, whatever the members compute in.
- The base owns the support: a token at −inf in the base stays at −inf.
- A companion does not shift a token where its logit is −inf, its weight is 0, or the id is past its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from proxytune.errors import InputError

__all__ = ["shift"]


def shift(
    base: torch.Tensor,
    companions: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    base_weight: float | torch.Tensor = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the companions' weighted logits to the base's.

    Args:
        base: Raw logits (or log-probabilities) of the base, `[..., V]`, any floating dtype.
        companions: Raw logits of each companion, `[..., V_i]`; widths may differ from V.
        weights: One weight per companion, or for rows `[B, V]` a tensor `[B, companions]`.
        base_weight: The base's own weight, or a tensor `[B]`.
        out: Where to write the result, `[..., V]`, float32, on the base's device; may be `base`. None for a new tensor.

    Returns:
        `[..., V]`, float32, on the base's device. Ids past the width of a companion with a weight, and tokens to which
        one gives −inf, keep the base's (weighted) logit; tokens at −inf in the base stay there. NaN or +inf in the
        base, or in a companion with a weight, comes out as NaN or +inf, whatever the weight.

    Raises:
        InputError: If the numbers of companions and weights differ.
    """
    # Per companion: one number, or a column `[B]`.
    each: Sequence[float | torch.Tensor] = weights.unbind(-1) if isinstance(weights, torch.Tensor) else weights
    if len(companions) != len(each):
        raise InputError.of(
            "formula",
            expected=f"one weight for each of {len(companions)} companions",
            got=f"{len(each)} weights",
            remedy="Give as many weights as companions.",
        )
    if out is None:
        out = base.to(torch.float32, copy=True)
    elif out is not base:
        out.copy_(base)
    # On the CPU, looking at values can save the masks, which cost more there than all the rest. Elsewhere, looking
    # would wait for the device.
    seen = out.device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(base_weight, torch.Tensor) or base_weight != 1.0:
        _weigh(out, base_weight, seen)
    # A non-blocking copy is safe only towards a GPU: the host could read its own memory before the copy has arrived.
    unwaited = out.device.type != "cpu"
    heard = [
        (z.to(out.device, non_blocking=unwaited), w)
        for z, w in zip(companions, each, strict=True)
        if isinstance(w, torch.Tensor) or w != 0.0
    ]
    if not heard:
        return out
    if isinstance(weights, torch.Tensor):
        # A narrow companion ends the shift only in rows where it has a weight: pad it with −inf, which does that.
        heard = [(_filled(z, out.shape[-1]), w) for z, w in heard]
    width = min(out.shape[-1], *(z.shape[-1] for z, _ in heard))
    heard = [(z[..., :width], w) for z, w in heard]
    delta = _weighted_sum(heard, masked=not seen)
    if not seen or not math.isfinite(float(delta.detach().sum())):  # a finite sum has no infinite or NaN term
        if seen:
            delta = _weighted_sum(heard, masked=True)
        silent = out[..., :width] == -torch.inf
        for z, w in heard:
            minus = z == -torch.inf
            silent = silent | (minus & (w != 0.0)[:, None] if isinstance(w, torch.Tensor) else minus)
        # −inf here comes from a companion's +inf under a negative weight; it must not act as a mask.
        delta = delta.masked_fill(delta == -torch.inf, torch.nan).masked_fill(silent, 0.0)
    out[..., :width].add_(delta)
    return out


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad `[B, C]` with −inf to `[B, width]` at least."""
    missing = width - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing), value=-torch.inf) if missing > 0 else x


def _weigh(base: torch.Tensor, weight: float | torch.Tensor, seen: bool) -> None:
    """Multiply in place; −inf stays whatever the sign of the weight, and NaN and +inf stay NaN or +inf."""
    w = weight[:, None] if isinstance(weight, torch.Tensor) else weight
    if seen and (bool((w > 0.0).all()) if isinstance(w, torch.Tensor) else w > 0.0):
        base.mul_(w)
        return
    forbidden, bad = base == -torch.inf, ~(base < torch.inf)
    base.mul_(w).masked_fill_(forbidden, -torch.inf).masked_fill_(bad, torch.nan)


def _weighted_sum(terms: Sequence[tuple[torch.Tensor, float | torch.Tensor]], masked: bool) -> torch.Tensor:
    """`w₁z₁ + w₂z₂ + …`, each product and sum rounded to float32; a new tensor, or the only term as it is.

    The companions are summed before the base: with expert = antiexpert the shift is exactly 0, and with base =
    antiexpert and α = 1 the rounding is that of one subtraction. No fused multiply-add (as in `torch.add` with an
    alpha): the kernels round each step, and equal logits have to stay equal.

    Args:
        terms: Logits and weights.
        masked: Whether a row's weight of 0 must suppress NaN and infinities.
    """
    total: torch.Tensor | None = None
    own = False  # whether the total may be written to
    for z, weight in terms:
        w = weight[:, None] if isinstance(weight, torch.Tensor) else weight
        x = z.to(torch.float32)
        fresh = x is not z
        minus = isinstance(w, float | int) and w == -1.0 and total is not None  # x − y has the bits of x + (−1)y
        if not minus and (isinstance(w, torch.Tensor) or w != 1.0):
            x, fresh = x.mul_(w) if fresh else x * w, True
        if masked and isinstance(w, torch.Tensor):
            x = torch.where(w == 0.0, 0.0, x)  # 0 · ∞ is no shift, not NaN
        if total is None:
            total, own = x, fresh
        elif own:
            total = total.sub_(x) if minus else total.add_(x)
        else:
            total, own = total - x if minus else total + x, True
    assert total is not None
    return total
