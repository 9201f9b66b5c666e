"""The logit algebra: how the members' logits become one row (`DEFINITIONS`: proxy-tuning and its relatives).

Pure tensor functions and frozen descriptions of them; no model, no cache. A formula is a weighted sum of companions'
logits that is added to the base's. Today there is one, `ProxyTuning`; DExperts, contrastive decoding, DeRa and the rest
are further frozen classes with the same three members (`name`, `roles`, `weights()`), registered in `FORMULAS`, and use
the same `shift()`.

Rules that hold for all of them:

- arithmetic is in float32 whatever the members compute in;
- the base owns the support: a token at −inf in the base stays at −inf;
- "no shift" where a companion has no opinion: its logit is −inf, its weight is 0, or the id is past its width.
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
        weights: One weight per companion, or for rows `[B, V]` a tensor `[B, companions]` of them.
        base_weight: The base's own weight; a tensor `[B]` for one per row.
        out: Where the result goes, `[..., V]`, float32, on the base's device; may be `base` itself. None for a new
            tensor.

    Returns:
        The combined logits, `[..., V]`, float32, on the base's device. Ids that some companion with a weight does not
        have, and tokens to which one gives −inf, keep the base's (weighted) logit; tokens at −inf in the base stay
        there. NaN or +inf in the base, or in a companion with a weight, comes out as NaN or +inf, whatever the weight.

    Raises:
        InputError: If the numbers of companions and weights differ.
    """
    # One number each, or a column `[B]` each.
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
    # On the CPU values may be looked at, to do without masks, which cost more there than all the rest; elsewhere that
    # would be a wait.
    seen = out.device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(base_weight, torch.Tensor) or base_weight != 1.0:
        _weigh(out, base_weight, seen)
    # Not waiting is safe only towards a GPU: the host could read a copy to its own memory before it has arrived.
    unwaited = out.device.type != "cpu"
    heard = [
        (z.to(out.device, non_blocking=unwaited), w)
        for z, w in zip(companions, each, strict=True)
        if isinstance(w, torch.Tensor) or w != 0.0
    ]
    if not heard:
        return out
    if isinstance(weights, torch.Tensor):
        # A companion's end is the end of the shift only in the rows in which it has a weight: as −inf it is.
        heard = [(_filled(z, out.shape[-1]), w) for z, w in heard]
    width = min(out.shape[-1], *(z.shape[-1] for z, _ in heard))
    heard = [(z[..., :width], w) for z, w in heard]
    delta = _weighted_sum(heard, masked=not seen)
    if not seen or not math.isfinite(float(delta.detach().sum())):  # the sum tells that nothing is infinite
        if seen:
            delta = _weighted_sum(heard, masked=True)
        silent = out[..., :width] == -torch.inf
        for z, w in heard:
            minus = z == -torch.inf
            silent = silent | (minus & (w != 0.0)[:, None] if isinstance(w, torch.Tensor) else minus)
        # −inf here is a companion's +inf under a negative weight: it must not pass for "forbidden".
        delta = delta.masked_fill(delta == -torch.inf, torch.nan).masked_fill(silent, 0.0)
    out[..., :width].add_(delta)
    return out


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, C]` → `[B, width]` at least, −inf where it has ended."""
    missing = width - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing), value=-torch.inf) if missing > 0 else x


def _weigh(base: torch.Tensor, weight: float | torch.Tensor, seen: bool) -> None:
    """Multiply in place; −inf stays, whatever the sign of the weight, and NaN and +inf stay bad."""
    w = weight[:, None] if isinstance(weight, torch.Tensor) else weight
    if seen and (bool((w > 0.0).all()) if isinstance(w, torch.Tensor) else w > 0.0):
        base.mul_(w)
        return
    forbidden, bad = base == -torch.inf, ~(base < torch.inf)
    base.mul_(w).masked_fill_(forbidden, -torch.inf).masked_fill_(bad, torch.nan)


def _weighted_sum(terms: Sequence[tuple[torch.Tensor, float | torch.Tensor]], masked: bool) -> torch.Tensor:
    """`w₁z₁ + w₂z₂ + …`, each product and each sum rounded to float32; a new tensor, or the only term as it is.

    Companion minus companion first, then the base: with expert = antiexpert the shift is exactly 0, and with
    base = antiexpert, α = 1, the rounding is that of one subtraction. No fused multiply-add (`torch.add` with an alpha
    has one): the kernels round each step, and equal logits have to stay equal.

    Args:
        terms: Logits and weights.
        masked: Whether a row's weight of 0 has to silence NaN and infinities.
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
            x = torch.where(w == 0.0, 0.0, x)  # 0 · ∞ is no opinion, not NaN
        if total is None:
            total, own = x, fresh
        elif own:
            total = total.sub_(x) if minus else total.add_(x)
        else:
            total, own = total - x if minus else total + x, True
    assert total is not None
    return total
