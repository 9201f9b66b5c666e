"""What the offsets and floors of a `Combination` are taken from: rows of raw logits, at their full width."""

from __future__ import annotations

import math
from ctypes import c_float

import torch

from proxytune.errors import UnsupportedModeError
from proxytune.ops.checks import refuse_members
from proxytune.ops.dispatch import Impl, choose, kernels
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.step import step
from proxytune.ops.torch_impl.decide import nucleus
from proxytune.ops.torch_impl.rows import MemberRows
from proxytune.validation import share as share_of

__all__ = ["floor_of_nucleus", "floor_of_top", "log_normalisers"]


def log_normalisers(x: torch.Tensor, impl: Impl = "auto") -> torch.Tensor:
    """The log-sum-exp of each row, which subtracted from logits makes log-probabilities.

    Args:
        x: Raw logits `[B, V]`, float32, float16 or bfloat16, inner stride 1.
        impl: As in `proxytune.ops.step`.

    Returns:
        `[B]`, float32, nats: NaN for a row with NaN or +inf, −inf for a row of −inf only.

    Raises:
        InputError: If the logits are not as `step` takes them.
    """
    lse = step([x], want=("lse",), impl=impl).lse
    assert lse is not None
    return lse


def floor_of_top(x: torch.Tensor, share: float) -> torch.Tensor:
    """The logit at which a token has `share` times the probability of the row's most probable one.

    Contrastive decoding's mask (Li et al. 2023, arXiv 2210.15097, where the share is 0.1).

    Args:
        x: As in `log_normalisers`.
        share: In (0, 1]; 1 leaves the most probable token, and what ties with it.

    Returns:
        `[B]`, float32: max + log share; NaN for a row with NaN or +inf, −inf for a row of −inf only.

    Raises:
        InputError: If the logits are not as `step` takes them, or the share is out of range.
    """
    refuse_members([x], (1.0,))
    share = share_of("share", share)
    top = x.detach().amax(1).float()  # NaN if there is one
    return (top + math.log(share)).masked_fill(top == torch.inf, torch.nan)


def floor_of_nucleus(x: torch.Tensor, p: float, impl: Impl = "auto") -> torch.Tensor:
    """The smallest logit in the row's nucleus: the fewest most probable tokens whose mass reaches p (temperature 1).

    Tokens that tie with it are inside, as in `SamplingParams`. DExperts' mask (Liu et al. 2021, arXiv 2105.03023).
    Cannot be traced by torch.compile: call it outside the compiled function.

    Args:
        x: As in `log_normalisers`.
        p: In (0, 1]; 1 for no floor.
        impl: As in `proxytune.ops.step`. The sums of the two differ in the last bits.

    Returns:
        `[B]`, float32; NaN for a row with NaN or +inf, −inf for no floor and for a row of −inf only.

    Raises:
        InputError: If the logits are not as `step` takes them, or p is out of range.
        UnsupportedModeError: If torch.compile traces this call.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModeError.of(
            "floor_of_nucleus",
            expected="a call outside torch.compile",
            got="a call that torch.compile traces",
            remedy="Call floor_of_nucleus() outside the compiled function.",
        )
    refuse_members([x], (1.0,))
    p = c_float(share_of("p", p)).value
    if p == 1:
        return torch.where(x.detach().amax(1) < torch.inf, -torch.inf, torch.nan)
    sampling = _nucleus(len(x), p, x.device)
    if choose(impl, x.device) == "triton":
        floor: torch.Tensor = kernels().nucleus(x, sampling)
        return floor
    return nucleus(MemberRows([x], (1.0,)), sampling)


def _nucleus(rows: int, p: float, device: torch.device) -> SamplingParams:
    """As `SamplingParams.of(rows, top_p=p)`, without waiting for the device."""

    def all_of(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return SamplingParams(
        temperature=all_of(1.0),
        top_k=all_of(0, torch.int32),
        top_p=all_of(p),
        log_min_p=all_of(-math.inf),
        fork_threshold=None,
        fork_temperature=None,
        truncated=all_of(True, torch.bool),
        some_truncated=True,
        all_truncated=True,
        largest_k=0,
    )
