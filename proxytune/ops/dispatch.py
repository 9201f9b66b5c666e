"""Which implementation runs: `impl="auto"` resolved once; the kernels are imported here only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import torch

from proxytune.errors import InputError
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.decide import decide
from proxytune.ops.torch_impl.rows import MemberRows
from proxytune.validation import choice

__all__ = ["Impl", "choose", "why_not_triton"]


Impl = Literal["auto", "triton", "torch"]


def run_step(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    sampling: SamplingParams | None,
    noise: Noise | None,
    draws: int,
    names: tuple[str, ...],
    impl: str,
) -> dict[str, torch.Tensor]:
    # As float32, in which 1e-50 is no weight at all.
    weights = weights.contiguous() if isinstance(weights, torch.Tensor) else tuple(c_float(w).value for w in weights)
    if choose(impl, members[0].device) == "triton":
        return kernels().step(members, weights, packed(sampling), packed(noise), draws, names)
    return decide(MemberRows(members, weights), sampling, noise, draws, names)


def choose(impl: str, device: torch.device) -> Literal["triton", "torch"]:
    """Which implementation runs.

    Args:
        impl: "auto", "triton" or "torch".
        device: Where the logits are.

    Returns:
        "triton" or "torch".

    Raises:
        InputError: If `impl` is another word, or Triton was asked for where it cannot run.
    """
    choice("impl", impl, get_args(Impl), remedy="Leave it out for 'auto'.")
    if impl == "torch":
        return "torch"
    reason = why_not_triton(device.type)
    if impl == "triton" and reason:
        raise InputError.of(
            "impl='triton'", expected="a GPU, and Triton installed", got=reason, remedy="Use impl='auto' or 'torch'."
        )
    # The interpreter is for tests: it runs only where it is asked for.
    return "torch" if reason or (impl == "auto" and device.type != "cuda") else "triton"


def why_not_triton(device: str) -> str | None:
    """What keeps the kernels from running.

    Args:
        device: The type of a device, such as "cuda".

    Returns:
        The reason in a few words; None if they can run, were it in Triton's interpreter.
    """
    if not _has_triton():
        return "no Triton in this environment"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {device}"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def kernels() -> Any:
    # Only here: importing Triton takes seconds, and there are systems without it.
    return importlib.import_module("proxytune_kernels")


def packed(values: Any) -> Any:
    # The kernels read settings and keys without strides; a loop may well pass a column of a table of positions.
    given = {} if values is None else vars(values)
    apart = {k: x.contiguous() for k, x in given.items() if isinstance(x, torch.Tensor) and not x.is_contiguous()}
    return replace(values, **apart) if apart else values
