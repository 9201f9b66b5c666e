"""Weighted sums of embedding rows for latent steps, by the Triton kernel or torch.

A latent step feeds back a mixture of several embeddings instead of one token's. Both implementations sum in float32, in
the order of the candidates, and round once; without noise they agree bit for bit. A row's result does not depend on the
other rows, and nothing waits for the device.
"""

from __future__ import annotations

import importlib
from ctypes import c_float

import torch

from proxytune.errors import InputError
from proxytune.ops.checks import refuse_mixture
from proxytune.ops.dispatch import Impl, choose
from proxytune.ops.noise import Noise
from proxytune.ops.torch_impl.mix import mix_rows

__all__ = ["mix"]


def mix(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float = 0.0,
    noise: Noise | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Mix rows of a table: `x = Σ weights · table[ids]`, then with `sigma` add noise: `x + sigma · rms(x) · n`.

    A weight of exactly 0 contributes nothing, whatever its row holds; a weight of 1 beside zeros gives that row bit for
    bit. If any coordinate is not finite in the table's dtype, the whole row is replaced by the emitted token's row.

    If the embedding is a plain look-up, pass its weight as the table. If the module scales or quantises, mix its
    outputs: `mix(module(ids).flatten(0, 1), arange, …)`, with the emitted tokens among the ids.

    Args:
        table: `[N, D]`, float32, float16, bfloat16, or float64 (torch only), D ≤ 2²⁷, inner stride 1. It may be a
            parameter, but the result carries no gradient.
        ids: `[B, K]`, int64 in 0 … N − 1: rows of the table. Not checked; an id outside is undefined behaviour.
        weights: `[B, K]`, float32, ≥ 0, each row summing to 1.
        tokens: `[B]`, int64 in 0 … N − 1: the emitted tokens.
        soft: `[B]`, bool: rows to mix; the others get the emitted token's row, bit for bit. None mixes all.
        sigma: Standard deviation of the noise, relative to the root mean square of the mixture.
        noise: The noise keys; required with `sigma` > 0, ignored otherwise.
        impl: "triton", "torch", or "auto": Triton for tensors on a GPU where it is installed.

    Returns:
        `[B, D]`, in the table's dtype, contiguous.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, `sigma` is negative or lacks `noise`, or Triton is
            requested but cannot run. Nothing has been launched then.
    """
    refuse_mixture(table, ids, weights, tokens, soft, sigma, noise)
    if impl == "triton" and table.dtype == torch.float64:
        raise InputError.of(
            "impl='triton'",
            expected="a table of float32, float16 or bfloat16",
            got="torch.float64",
            remedy="Use impl='auto' or 'torch'.",
        )
    keys = [] if noise is None or sigma == 0 else [noise.seed, noise.row, noise.position, noise.branch]
    # One custom operator in a graph. Eager calls skip it: the dispatcher costs more than the launch.
    run = _mix_op if torch.compiler.is_compiling() else _run
    return run(table.detach(), ids, weights, tokens, soft, float(sigma), keys, impl)


def _run(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    keys: list[torch.Tensor],
    impl: str,
) -> torch.Tensor:
    # Rounded to float32, as the kernel reads it: 1e-50 becomes 0, no noise.
    sigma = c_float(sigma).value
    noise = Noise(*(x.contiguous() for x in keys)) if keys and sigma else None
    if choose(impl, table.device) == "triton" and table.dtype != torch.float64:
        # The kernel ignores strides except the table's. Imported lazily: importing Triton takes seconds.
        packed = [x.contiguous() for x in (ids, weights, tokens)]
        soft = None if soft is None else soft.contiguous()
        mixed: torch.Tensor = importlib.import_module("proxytune_kernels").mix(table, *packed, soft, sigma, noise)
        return mixed
    return mix_rows(table, ids, weights, tokens, soft, sigma, noise)


# --- inside torch.compile -------------------------------------------------------------------------------------------


@torch.library.custom_op("proxytune::mix", mutates_args=())
def _mix_op(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    keys: list[torch.Tensor],
    impl: str,
) -> torch.Tensor:
    return _run(table, ids, weights, tokens, soft, sigma, keys, impl)


@_mix_op.register_fake
def _(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    soft: torch.Tensor | None,
    sigma: float,
    keys: list[torch.Tensor],
    impl: str,
) -> torch.Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])
