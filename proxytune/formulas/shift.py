"""The arithmetic of every formula: a weighted sum of companions' logits, added to the base's.

- Arithmetic is float32, whatever the members compute in.
- The base owns the support: a token at −inf in the base stays at −inf.
- A companion does not shift a token where its logit is −inf, its weight is 0, or the id is past its width.
- An offset counts as if it were subtracted from the logits. A floor acts like −inf in the base, but never hides NaN.
"""

from __future__ import annotations

import functools
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
    *,
    offsets: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
    floored_by: int = 0,
) -> torch.Tensor:
    """Add the companions' weighted logits to the base's.

    Args:
        base: Raw logits (or log-probabilities) of the base, `[..., V]`, any floating dtype.
        companions: Raw logits of each companion, `[..., V_i]`; widths may differ from V.
        weights: One weight per companion, or for rows `[B, V]` a tensor `[B, companions]`.
        base_weight: The base's own weight, or a tensor `[B]`.
        out: Where to write the result, `[..., V]`, float32, on the base's device; may be `base`. None for a new tensor.
        offsets: For rows `[B, V]`, float32 `[B, 1 + companions]`: what is subtracted from the base's and each
            companion's logits, see `proxytune.ops.Combination`; None for 0.
        floors: For rows `[B, V]`, float32 `[B]`: the least raw logit that is allowed; −inf or None for any.
        floored_by: Whose logit that is: 0 for the base's, i for the i-th companion's. It is not read in rows without a
            floor.

    Returns:
        `[..., V]`, float32, on the base's device. Ids past the width of a companion with a weight, and tokens to which
        one gives −inf, keep the base's (weighted) logit; tokens at −inf in the base, or below the floor, are −inf. NaN
        or +inf in the base, in a companion with a weight, or in the one that has the floor comes out as NaN or +inf,
        whatever the weight.

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
            remedy="Give as many weights as companions; the base's, which is 1, is left out.",
        )
    width = base.shape[-1]
    # On the CPU, looking at values can save the masks, which cost more there than all the rest. Elsewhere, looking
    # would wait for the device.
    seen = base.device.type == "cpu" and not torch.compiler.is_compiling()
    # A non-blocking copy is safe only towards a GPU: the host could read its own memory before the copy has arrived.
    unwaited = base.device.type != "cpu"
    below = None
    if floors is not None:
        floored = (base, *companions)[floored_by].to(base.device, non_blocking=unwaited)
        below = _below(_filled(floored, width)[:, :width], floors, seen)  # before the base may be written to
    if out is None:
        out = base.to(torch.float32, copy=True)
    elif out is not base:
        out.copy_(base)
    if isinstance(base_weight, torch.Tensor) or base_weight != 1.0:
        _weigh(out, base_weight, seen)
    shared = None
    if offsets is not None:
        own, *theirs = (_weighted_offset(x, w) for x, w in zip(offsets.unbind(-1), (base_weight, *each), strict=True))
        _subtract(out, own, seen)
        if theirs:
            shared = functools.reduce(torch.add, theirs)
    heard = [
        (z.to(out.device, non_blocking=unwaited), w)
        for z, w in zip(companions, each, strict=True)
        if isinstance(w, torch.Tensor) or w != 0.0
    ]
    if heard:
        _add(out, heard, shared, seen)
    return out if below is None else out.sub_(below)


_Term = tuple[torch.Tensor, float | torch.Tensor]
"""A companion's logits and their weight."""


def _add(out: torch.Tensor, heard: Sequence[_Term], offset: torch.Tensor | None, seen: bool) -> None:
    """Add the companions' sum, less its offset `[B]`, to the weighted base, in place."""
    if isinstance(heard[0][1], torch.Tensor):
        # A narrow companion ends the shift only in rows where it has a weight: pad it with −inf, which does that.
        heard = [(_filled(z, out.shape[-1]), w) for z, w in heard]
    width = min(out.shape[-1], *(z.shape[-1] for z, _ in heard))
    heard = [(z[..., :width], w) for z, w in heard]
    delta = _weighted_sum(heard, offset, masked=not seen)
    if not seen or not math.isfinite(float(delta.detach().sum())):  # a finite sum has no infinite or NaN term
        if seen:
            delta = _weighted_sum(heard, offset, masked=True)
        silent = out[..., :width] == -torch.inf
        for z, w in heard:
            minus = z == -torch.inf
            silent = silent | (minus & (w != 0.0)[:, None] if isinstance(w, torch.Tensor) else minus)
        # −inf here comes from a companion's +inf under a negative weight; it must not act as a mask.
        delta = delta.masked_fill(delta == -torch.inf, torch.nan).masked_fill(silent, 0.0)
    out[..., :width].add_(delta)


def _weighted_offset(offset: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """What a member's offset `[B]` takes off the sum: 0 without a weight, and for the −inf of a row of −inf only."""
    nothing = (offset == -torch.inf) | (weight == 0.0)
    # +inf would silence the member.
    return (offset * weight).masked_fill(offset == torch.inf, torch.nan).masked_fill(nothing, 0.0)


def _subtract(base: torch.Tensor, offset: torch.Tensor, seen: bool) -> None:
    """Subtract `[B]` in place; −inf stays, whatever the offset."""
    if seen and bool(offset.isfinite().all()):
        base.sub_(offset[:, None])
        return
    forbidden = base == -torch.inf
    base.sub_(offset[:, None]).masked_fill_(forbidden, -torch.inf)


_HUGE = torch.finfo(torch.float32).max


def _below(logits: torch.Tensor, floors: torch.Tensor, seen: bool) -> torch.Tensor:
    """+inf where logits `[B, V]` are below the floors `[B]`, else 0; NaN for NaN or +inf, and where the floor is NaN.

    0 in rows with a floor of −inf. Subtracted, it forbids tokens, but not what is NaN already.
    """
    logits, floor = logits.detach(), floors.detach()[:, None]
    # On the CPU arithmetic is five times as fast as masks.
    if seen and float(logits.amax()) < math.inf:
        none = floor == -torch.inf
        below = (floor.masked_fill(none, 0.0) - logits).clamp_(0.0, _HUGE)
        # Three factors make the least difference of two numbers infinite.
        return below.mul_(torch.where(none, 0.0, _HUGE)).mul_(_HUGE).mul_(_HUGE)
    below = torch.where(logits < floor, torch.inf, 0.0)
    return below.masked_fill((~(logits < torch.inf) & (floor != -torch.inf)) | floor.isnan(), torch.nan)


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad `[B, C]` with −inf to `[B, width]` at least."""
    missing = width - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing), value=-torch.inf) if missing > 0 else x


def _weigh(base: torch.Tensor, weight: float | torch.Tensor, seen: bool) -> None:
    """Multiply in place; −inf stays whatever the sign of the weight, and NaN and +inf stay NaN or +inf."""
    w = weight[:, None] if isinstance(weight, torch.Tensor) else weight
    positive = seen and (bool((w > 0.0).all()) if isinstance(w, torch.Tensor) else w > 0.0)
    if positive or (seen and math.isfinite(float(base.detach().sum()))):
        base.mul_(w)
        return
    forbidden, bad = base == -torch.inf, ~(base < torch.inf)
    base.mul_(w).masked_fill_(forbidden, -torch.inf).masked_fill_(bad, torch.nan)


def _weighted_sum(terms: Sequence[_Term], offset: torch.Tensor | None, masked: bool) -> torch.Tensor:
    """`w₁z₁ + w₂z₂ + … − offset`, each step rounded to float32; a new tensor, or the only term as it is.

    The companions are summed before the base: with expert = antiexpert the shift is exactly 0, and with base =
    antiexpert and α = 1 the rounding is that of one subtraction. No fused multiply-add (as in `torch.add` with an
    alpha): the kernels round each step, and equal logits have to stay equal.

    Args:
        terms: Logits and weights.
        offset: `[B]`, or None.
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
    if offset is None:
        return total
    return total.sub_(offset[:, None]) if own else total - offset[:, None]
