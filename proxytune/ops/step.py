"""The one place that chooses: a decoding decision by the Triton kernels, or by torch where there are none.

`step` combines the members' rows, measures the distribution and draws, in one pass over the rows. Both
implementations keep the same contract and use the same noise, so that the same seed gives the same tokens:

- the base owns the support; a companion's −inf, a weight of 0, or an id past its width is no shift;
- arithmetic in float32 from bfloat16, float16 or float32 rows; entropies in nats;
- a row with NaN or +inf: token −1 and NaN statistics; a row that is −inf throughout: token −1, log-sum-exp −inf;
- a row's result does not depend on the rows around it, bit for bit (the kernels, and torch on the CPU; elsewhere
  torch adds up in an order that depends on the batch), and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ctypes import c_float

import torch

from proxytune.formulas.shift import shift
from proxytune.ops.checks import DTYPES, MAX_MEMBERS, refuse_ids, refuse_members, refuse_request
from proxytune.ops.compile_ops import step_in_graph
from proxytune.ops.dispatch import Impl, choose, run_step
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import OUTPUTS, StepOutput, VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.decide import draw_logprobs as _draw_logprobs
from proxytune.ops.torch_impl.rows import MemberRows

__all__ = ["MAX_MEMBERS", "OUTPUTS", "StepOutput", "VerifyOutput", "combine", "draw_logprobs", "normalise_", "step"]


def step(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor = (1.0,),
    *,
    sampling: SamplingParams | None = None,
    noise: Noise | None = None,
    draws: int = 1,
    want: Collection[str] = ("tokens",),
    impl: Impl = "auto",
) -> StepOutput:
    """Combine, measure and decide.

    Args:
        members: Logits of the base and up to four companions, `[B, V_i]` each, float32, float16 or bfloat16 in any mix,
            on one device, the columns next to each other; V is the base's width.
        weights: One finite weight per member, the base's first, or a float32 tensor `[B, M]`.
        sampling: The settings of the draw; None for the argmax.
        noise: The keys of the noise; needed with `sampling`.
        draws: How many tokens to draw without replacement.
        want: Which outputs to compute, names of `OUTPUTS`.
        impl: "triton", "torch", or "auto": Triton for tensors on a GPU, where it is installed.

    Returns:
        The outputs asked for.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, k > V, or draws are asked for without settings and
            noise. Nothing has been launched then.
    """
    refuse_members(members, weights)
    refuse_request(members[0], sampling, noise, draws, want)
    names = tuple(dict.fromkeys(want))
    if torch.compiler.is_compiling():
        # One node of the graph; plain calls do without, since the dispatcher costs more than the launch.
        return StepOutput(
            **dict(zip(names, step_in_graph(members, weights, sampling, noise, draws, names, impl), strict=True))
        )
    return StepOutput(**run_step(members, weights, sampling, noise, draws, names, impl))


def combine(members: Sequence[torch.Tensor], weights: Sequence[float], impl: Impl = "auto") -> torch.Tensor:
    """The combined logits alone, for those who go on with them (a logits processor, a model's forward).

    Args:
        members: Logits of the base and the companions, `[..., V_i]`; companions may be on other devices.
        weights: One finite weight per companion; the base's is 1.
        impl: As in `step`.

    Returns:
        `[..., V]`, float32, on the base's device; −inf where the base is.

    Raises:
        InputError: If the number of weights is wrong.
    """
    base = members[0]
    # The kernels have no derivative, and what compiles the model fuses these few operations by itself.
    graph = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in members))
    alike = all(x.shape[:-1] == base.shape[:-1] for x in members)
    known = 1 <= len(members) <= MAX_MEMBERS and len(weights) == len(members) - 1 and base.numel() > 0
    plain = all(x.dtype in DTYPES and (x.shape[-1] == 1 or x.stride(-1) == 1) for x in members)
    if graph or not (alike and known and plain):
        choose(impl, base.device)
        return shift(base, members[1:], weights)
    # Not waiting is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
    unwaited = base.device.type != "cpu"
    flat = [x.to(base.device, non_blocking=unwaited).reshape(-1, x.shape[-1]) for x in members]
    scores = step(flat, (1.0, *weights), want=("scores",), impl=impl).scores
    assert scores is not None
    return scores.view(base.shape)


def normalise_(logits: torch.Tensor) -> torch.Tensor:
    """Logits become log-probabilities in place: `log_softmax` without a second tensor of their size.

    Args:
        logits: `[B, V]`, float32; written to.

    Returns:
        The same tensor, in nats; NaN in rows that have no distribution.
    """
    lse = step([logits], want=("lse",)).lse
    assert lse is not None
    return logits.sub_(lse[:, None])


def draw_logprobs(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor = (1.0,),
    *,
    sampling: SamplingParams,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What given tokens have in the distribution that `step` draws from, be they among its draws or not.

    In torch on every device; the kernels' sums differ in their last bits, so there a token that ties with a bound of
    the truncation to within rounding may fall on the other side of it.

    Args:
        members: As in `step`.
        weights: As in `step`.
        sampling: The settings of the draw.
        ids: `[B, K]`, int64, on the logits' device; −1 for none. A token may be given twice.

    Returns:
        `[B, K]`, float32, nats: −inf beside what cannot be drawn; `[B]`, float32, nats: the logarithm of the mass of
        all tokens not among `ids`, added up rather than taken from 1. NaN in a row that has no distribution.

    Raises:
        InputError: If shapes, dtypes or devices do not fit.
    """
    refuse_members(members, weights)
    refuse_ids(members[0], sampling, ids)
    weights = weights if isinstance(weights, torch.Tensor) else tuple(c_float(w).value for w in weights)
    return _draw_logprobs(MemberRows(members, weights), sampling, ids)
