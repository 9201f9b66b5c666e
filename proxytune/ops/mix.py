"""Mixtures of embeddings for latent steps, by the Triton kernel, or by torch where there is none.

A latent step feeds back, instead of one token's embedding, a mixture of several. Both implementations keep the same
contract: the sum is taken in float32, in the order of the candidates, and rounded once; without noise they agree bit
for bit. A row's result does not depend on the rows around it, and nothing waits for the device.
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
    """Mix rows of a table: `x = Σ weights · table[ids]`, and with `sigma` the noise `x + sigma · rms(x) · n`.

    A weight of exactly 0 contributes nothing, whatever its row holds, and a weight of 1 beside zeros is that row, bit
    for bit. A mixture of which a coordinate is not finite in the table's dtype is replaced, the whole row of it, by the
    emitted token's row.

    The table is an embedding's weight where the embedding is nothing but a look-up. Where a module scales or quantises,
    mix what it gives: `mix(module(ids).flatten(0, 1), arange, …)`, the emitted tokens among the ids.

    Args:
        table: `[N, D]`, float32, float16, bfloat16, or float64 (torch only), D at most 2²⁷, the columns next to each
            other; it may be a parameter, but the result carries no gradient.
        ids: `[B, K]`, int64, from 0 to N − 1: which rows. Not looked at in advance: one outside is undefined.
        weights: `[B, K]`, float32, at least 0, each row adding up to 1.
        tokens: `[B]`, int64, from 0 to N − 1: the emitted token's row.
        soft: `[B]`, bool: which rows are mixed; the others are the emitted token's row, bit for bit. None for all.
        sigma: Standard deviation of the noise, relative to the root mean square of the mixture.
        noise: The keys of the noise; needed with `sigma` above 0, ignored without.
        impl: "triton", "torch", or "auto": Triton for tensors on a GPU, where it is installed.

    Returns:
        `[B, D]`, the table's dtype, contiguous.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, `sigma` is negative or lacks `noise`, or Triton is
            asked for where it cannot run. Nothing has been launched then.
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
    # One node of a graph; plain calls do without, since the dispatcher costs more than the launch.
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
    # As float32, in which 1e-50 is no noise at all.
    sigma = c_float(sigma).value
    noise = Noise(*(x.contiguous() for x in keys)) if keys and sigma else None
    if choose(impl, table.device) == "triton" and table.dtype != torch.float64:
        # The kernel reads all but the table without strides. Imported only here, see `proxytune.ops`.
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
