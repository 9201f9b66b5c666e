"""Entropy, varentropy, branching factor and KL divergence of given logits, in nats."""

from __future__ import annotations

import torch

from proxytune.errors import InputError

__all__ = ["branching_factor", "entropy", "kl_divergence", "varentropy"]


_CLAMP = -200.0  # exp() is 0 from about −104 on in float32, and 0 · −inf would be NaN


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """`H = −Σ p log p` with `p = softmax(logits)`.

    Args:
        logits: `[..., V]`, any floating dtype, normalised or not. −inf masks a token: probability 0.

    Returns:
        `[...]`, float32, nats, from 0 to ln V. NaN for a row with NaN or +inf, or of −inf only.

    Raises:
        InputError: If the logits are not a floating tensor with at least one column.
    """
    d, e, total, none = _exponentials(logits)
    value = (total.log() - (e * d).sum(-1) / total).clamp(min=0.0)
    return value.masked_fill(none, torch.nan)


def varentropy(logits: torch.Tensor) -> torch.Tensor:
    """`Σ p (log p + H)²`, nats²: the variance of the tokens' surprise; 0 for a uniform or a certain distribution.

    Shapes, NaN and errors as for `entropy`.
    """
    d, e, total, none = _exponentials(logits)
    mean = (e * d).sum(-1) / total
    value = (e * (d - mean[..., None]).square()).sum(-1) / total
    return value.masked_fill(none, torch.nan)


def branching_factor(logits: torch.Tensor) -> torch.Tensor:
    """`e^H`, from 1 to V: the number of equally probable tokens that would have the same entropy.

    Shapes, NaN and errors as for `entropy`.
    """
    return entropy(logits).exp()


def kl_divergence(logits: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`KL(p ‖ q) = Σ p (log p − log q)`, nats, with p from `logits` and q from `base`.

    Both are `[..., V]`; leading dimensions broadcast. A token masked in p adds nothing. A token masked in q but not in
    p makes the divergence infinite; rows combined by proxytune never have one, since the base owns the support.

    Returns:
        `[...]`, float32, ≥ 0. NaN where either row has no distribution (see `entropy`).

    Raises:
        InputError: If either is not a floating tensor with at least one column, or they differ in V.
    """
    p_d, p_e, p_total, p_none = _exponentials(logits)
    q_d, _, q_total, q_none = _exponentials(base)
    if p_d.shape[-1] != q_d.shape[-1]:
        raise InputError.of(
            "logits",
            expected=f"two rows of the same width, {q_d.shape[-1]} as the base's",
            got=f"{p_d.shape[-1]} columns",
            remedy="Compare rows over the same vocabulary, e.g. the combined one with the base's.",
        )
    escaped = ((p_e > 0) & (base == -torch.inf)).any(-1)
    value = (p_e * (p_d - q_d)).sum(-1) / p_total - p_total.log() + q_total.log()
    value = value.clamp(min=0.0).masked_fill(escaped, torch.inf)
    return value.masked_fill(p_none | q_none, torch.nan)


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For logits `[..., V]`: d = z − max (finite at −inf) and e^d, `[..., V]`; Σ e^d, `[...]`; rows without one."""
    if (
        not isinstance(logits, torch.Tensor)
        or not logits.is_floating_point()
        or not logits.ndim
        or not logits.shape[-1]
    ):
        tensor = isinstance(logits, torch.Tensor)
        raise InputError.of(
            "logits",
            expected="a floating tensor [..., V] with V ≥ 1",
            got=f"shape {list(logits.shape)}, {logits.dtype}" if tensor else f"a {type(logits).__name__}",
            remedy="Pass raw logits, e.g. model(ids).logits.",
        )
    z = logits.float()
    top = z.amax(-1)  # NaN if there is one
    none = ~top.isfinite()  # there is no distribution
    d = (z - top.masked_fill(none, 0.0)[..., None]).clamp(min=_CLAMP)
    e = d.exp()
    return d, e, e.sum(-1), none
