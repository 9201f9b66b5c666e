"""`step`: combine the members' logits, measure the distribution and draw.

The statistics read each logit once, and a draw goes back only to the columns that matter. If more than 1,024 tokens may
be kept, as by top-p without top-k on a flat row, these may be the whole row: the Triton kernels read it once more.

Triton and torch follow one contract and use the same noise, so the same seed gives the same tokens:

- The base owns the support. A companion's −inf, a weight of 0, or an id past a companion's width shifts nothing.
- The floor of a `Combination` acts like −inf in the base, but never hides NaN; the KL is that from the base's own row.
- Arithmetic is float32, from bfloat16, float16 or float32 rows; entropies are in nats.
- A row with NaN or +inf gives token −1 and NaN statistics. A row of −inf only gives token −1 and log-sum-exp −inf.
- A row's result does not depend on the other rows, bit for bit (Triton, and torch on the CPU; torch elsewhere sums in
  an order that depends on the batch). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from proxytune.formulas.shift import shift
from proxytune.ops.checks import DTYPES, MAX_MEMBERS, refuse_ids, refuse_members, refuse_request
from proxytune.ops.combination import Combination, Weights, in_float32
from proxytune.ops.compile_ops import step_in_graph
from proxytune.ops.dispatch import Impl, again, choose, run_step
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import OUTPUTS, StepOutput, VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.decide import draw_logprobs as _draw_logprobs
from proxytune.ops.torch_impl.rows import MemberRows, shift_by

__all__ = ["MAX_MEMBERS", "OUTPUTS", "StepOutput", "VerifyOutput", "combine", "draw_logprobs", "normalise_", "step"]


def step(
    members: Sequence[torch.Tensor],
    weights: Weights = (1.0,),
    *,
    sampling: SamplingParams | None = None,
    noise: Noise | None = None,
    draws: int = 1,
    want: Collection[str] = ("tokens",),
    impl: Impl = "auto",
) -> StepOutput:
    """Combine the members' logits, measure the distribution and choose tokens.

    Args:
        members: Logits of the base and up to seven companions, `[B, V_i]` each, in any mix of float32, float16 and
            bfloat16, on one device, inner stride 1. V is the base's width.
        weights: One finite weight per member, the base's first, or a float32 tensor `[B, M]`; or a `Combination`,
            which has offsets and floors besides.
        sampling: Sampling parameters; None for the argmax.
        noise: The noise keys; required with `sampling`.
        draws: How many tokens to draw without replacement.
        want: Names of the outputs to compute, out of `OUTPUTS`.
        impl: "triton", "torch", or "auto": Triton for tensors on a GPU where it is installed.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, k > V, or a draw lacks `sampling` or `noise`.
            Nothing has been launched then.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (out := again(members, weights, sampling, noise, draws, want, impl)) is not None:
        return StepOutput.holding(out)
    refuse_members(members, weights)
    refuse_request(members[0], sampling, noise, draws, want)
    names = tuple(dict.fromkeys(want))
    if compiling:
        # One custom operator in the graph. Eager calls skip it: the dispatcher costs more than the launch.
        return StepOutput(
            **dict(zip(names, step_in_graph(members, weights, sampling, noise, draws, names, impl), strict=True))
        )
    return StepOutput.holding(run_step(members, weights, sampling, noise, draws, names, impl, repeated=True))


def combine(
    members: Sequence[torch.Tensor], weights: Sequence[float] | Combination, impl: Impl = "auto"
) -> torch.Tensor:
    """The combined logits alone, for a logits processor or a model's forward.

    Args:
        members: Logits of the base and the companions, `[..., V_i]`; companions may be on other devices.
        weights: One finite weight per companion; the base's is 1. Or a `Combination`, whose weights have the base's;
            the rows of its tensors are those of the members in order, N in all.
        impl: As in `step`.

    Returns:
        `[..., V]`, float32, on the base's device; −inf where the base is −inf or below the floor.

    Raises:
        InputError: If the number of weights is wrong.
    """
    base = members[0]
    # The kernels have no gradient, and torch.compile fuses these few operations by itself.
    graph = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in members))
    # A non-blocking copy is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
    unwaited = base.device.type != "cpu"

    def flat() -> list[torch.Tensor]:
        return [x.to(base.device, non_blocking=unwaited).reshape(-1, x.shape[-1]) for x in members]

    if isinstance(weights, Combination):
        rows = [(x if x.dtype in DTYPES else x.float()).contiguous() for x in flat()]
        if graph:
            choose(impl, base.device)
            refuse_members(rows, weights)
            return shift_by(rows[0], rows[1:], weights).view(base.shape)
        scores = step(rows, weights, want=("scores",), impl=impl).scores
    else:
        alike = all(x.shape[:-1] == base.shape[:-1] for x in members)
        known = 1 <= len(members) <= MAX_MEMBERS and len(weights) == len(members) - 1 and base.numel() > 0
        plain = all(x.dtype in DTYPES and (x.shape[-1] == 1 or x.stride(-1) == 1) for x in members)
        if graph or not (alike and known and plain):
            choose(impl, base.device)
            return shift(base, members[1:], weights)
        scores = step(flat(), (1.0, *weights), want=("scores",), impl=impl).scores
    assert scores is not None
    return scores.view(base.shape)


def normalise_(logits: torch.Tensor) -> torch.Tensor:
    """`log_softmax` of `[B, V]`, float32, in place, in nats; NaN in rows without a distribution."""
    lse = step([logits], want=("lse",)).lse
    assert lse is not None
    return logits.sub_(lse[:, None])


def draw_logprobs(
    members: Sequence[torch.Tensor],
    weights: Weights = (1.0,),
    *,
    sampling: SamplingParams,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens under the distribution that `step` draws from; InputError as in `step`.

    Runs in torch on every device. The kernels' sums differ in the last bits, so a token that ties with a truncation
    bound to within rounding may fall on the other side of it there.

    Args:
        members: As in `step`.
        weights: As in `step`.
        sampling: Sampling parameters.
        ids: `[B, K]`, int64, on the logits' device; −1 for padding. A token may occur twice.

    Returns:
        `[B, K]`, float32, nats, −inf for tokens that cannot be drawn; and `[B]`, the log of the mass of all tokens not
        in `ids` (summed, not 1 minus the rest). NaN in rows without a distribution.
    """
    refuse_members(members, weights)
    refuse_ids(members[0], sampling, ids)
    return _draw_logprobs(MemberRows(members, in_float32(weights)), sampling, ids)
