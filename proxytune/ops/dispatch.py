"""Which implementation runs: resolves `impl="auto"`; the kernels are imported here and in `mix` only."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import torch

from proxytune.errors import InputError
from proxytune.ops.combination import Weights, in_float32
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.decide import decide
from proxytune.ops.torch_impl.rows import MemberRows
from proxytune.validation import choice

__all__ = ["Impl", "choose", "why_not_triton"]


Impl = Literal["auto", "triton", "torch"]


def run_step(
    members: Sequence[torch.Tensor],
    weights: Weights,
    sampling: SamplingParams | None,
    noise: Noise | None,
    draws: int,
    names: tuple[str, ...],
    impl: str,
    *,
    repeated: bool = False,
) -> dict[str, torch.Tensor]:
    """Run a checked step; with `repeated`, `again` may repeat it."""
    weights = in_float32(weights)
    if choose(impl, members[0].device) == "triton":
        settings, keys = packed(sampling), packed(noise)
        return kernels().step(
            members, weights, settings, keys, draws, names, repeated and settings is sampling and keys is noise
        )
    return decide(MemberRows(members, weights), sampling, noise, draws, names)


def again(
    members: Sequence[torch.Tensor],
    weights: Weights,
    sampling: SamplingParams | None,
    noise: Noise | None,
    draws: int,
    want: Collection[str],
    impl: str,
) -> dict[str, torch.Tensor] | None:
    """Repeat a step of the kernels, unchecked, if one of the same form was kept; else None."""
    # Nothing of a form that the checks refuse was kept. On a CPU, "auto" never chooses the kernels.
    if "proxytune_kernels" not in sys.modules or not (impl == "triton" or (impl == "auto" and _has_gpu())):
        return None
    return sys.modules["proxytune_kernels"].again(members, weights, sampling, noise, draws, want)


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def choose(impl: str, device: torch.device) -> Literal["triton", "torch"]:
    """Which implementation runs for tensors on `device`.

    Args:
        impl: "auto", "triton" or "torch".
        device: Where the logits are.

    Raises:
        InputError: If `impl` is another word, or Triton is requested but cannot run.
    """
    # Triton's interpreter is for tests: "auto" never chooses it.
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return "torch"
    choice("impl", impl, get_args(Impl), remedy="Leave it out for 'auto'.")
    reason = why_not_triton(device.type)
    if impl == "triton" and reason:
        raise InputError.of(
            "impl='triton'", expected="a GPU, and Triton installed", got=reason, remedy="Use impl='auto' or 'torch'."
        )
    return "torch" if reason else "triton"


def why_not_triton(device: str) -> str | None:
    """Why the kernels cannot run on a type of device ("cuda"); None if they can, be it in Triton's interpreter."""
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
    # Imported lazily: importing Triton takes seconds, and not every system has it.
    return importlib.import_module("proxytune_kernels")


def packed(values: Any) -> Any:
    # The kernels ignore the strides of settings and keys, but a caller may pass e.g. a column of a table.
    given = {} if values is None else vars(values)
    apart = {k: x.contiguous() for k, x in given.items() if isinstance(x, torch.Tensor) and not x.is_contiguous()}
    return replace(values, **apart) if apart else values
