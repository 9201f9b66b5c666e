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

import importlib.util
import os
from collections.abc import Collection, Sequence
from ctypes import c_float
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.formulas.shift import shift
from proxytune.ops.checks import (
    DTYPES,
    MAX_MEMBERS,
    OUTPUTS,
    refuse_drafts,
    refuse_ids,
    refuse_members,
    refuse_request,
)
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import Step, Verdict
from proxytune.ops.sampling_params import Sampling
from proxytune.ops.torch_impl.decide import decide
from proxytune.ops.torch_impl.decide import draw_logprobs as _draw_logprobs
from proxytune.ops.torch_impl.measure import Rows
from proxytune.ops.torch_impl.verify import judge

__all__ = [
    "MAX_MEMBERS",
    "OUTPUTS",
    "Impl",
    "Step",
    "Verdict",
    "choose",
    "combine",
    "draw_logprobs",
    "normalise_",
    "step",
    "verify",
    "why_not_triton",
]

Impl = Literal["auto", "triton", "torch"]


def step(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor = (1.0,),
    *,
    sampling: Sampling | None = None,
    noise: Noise | None = None,
    draws: int = 1,
    want: Collection[str] = ("tokens",),
    impl: Impl = "auto",
) -> Step:
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
        return Step(**dict(zip(names, _in_graph(members, weights, sampling, noise, draws, names, impl), strict=True)))
    return Step(**_run(members, weights, sampling, noise, draws, names, impl))


def _run(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    sampling: Sampling | None,
    noise: Noise | None,
    draws: int,
    names: tuple[str, ...],
    impl: str,
) -> dict[str, torch.Tensor]:
    # As float32, in which 1e-50 is no weight at all.
    weights = weights.contiguous() if isinstance(weights, torch.Tensor) else tuple(c_float(w).value for w in weights)
    if choose(impl, members[0].device) == "triton":
        return _kernels().step(members, weights, _packed(sampling), _packed(noise), draws, names)
    return decide(Rows(members, weights), sampling, noise, draws, names)


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
    sampling: Sampling,
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
    return _draw_logprobs(Rows(members, weights), sampling, ids)


def verify(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor = (1.0,),
    *,
    drafted: torch.Tensor,
    draft: torch.Tensor | None = None,
    sampling: Sampling,
    noise: Noise,
    impl: Impl = "auto",
) -> Verdict:
    """Accept or reject drafted tokens so that what comes out is distributed as draws of `step` are.

    A draft x drawn from q is accepted with probability min(1, p(x) / q(x)), with p what `step` would draw from there;
    at the first that is not, a token is drawn from the residual max(0, p − q), normalised; after the last one, from p
    (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). K = 0 is a draw.

    The drafts may be drawn with the same keys: `step([rows], sampling=…, noise=noise.at(position))`. The decision and
    the residual's draw take other words of the noise. A draw where no draft stood is `step`'s with these keys, bit for
    bit. Whether a position has a draft may depend on the text before it and on q, and on nothing of the draft itself:
    drafts that are left out because of what was drawn make the rest another distribution.

    Where p is q to rounding and a draft is rejected all the same, the token is drawn from p. So it is where the draft's
    row has no distribution (NaN, +inf, all −inf): the draft is ignored then, as one that is not there.

    Not for use inside torch.compile: call it beside what is compiled.

    Args:
        members: As in `step`, `[B · (K + 1), V_i]`: row b · (K + 1) + j follows text b with its first j drafts.
        weights: One finite weight per member, or a float32 tensor `[B · (K + 1), M]`.
        drafted: `[B, K]`, int64, on the logits' device; −1 for no draft, from there on in that row. A token past V has
            probability 0 and is rejected.
        draft: `[B · K, V_q]`, float32, float16 or bfloat16: the logits that the drafts were drawn from, with the same
            settings. None where they were not drawn: they are accepted with probability p(x), which is right for any
            drafts that do not depend on the noise's decisions.
        sampling: The settings of B rows, each for all positions of its text.
        noise: The keys of B rows, at the position of `drafted[:, 0]`; those that follow take the positions after it.
        impl: As in `step`.

    Returns:
        The tokens, and how many drafts were accepted.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, or k is larger than V or V_q. Nothing has been
            launched then.
        UnsupportedModeError: If torch.compile is about to take this into a graph.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModeError.of(
            "verify", expected="a call outside of a graph", got="torch.compile", remedy="Compile what is around it."
        )
    refuse_members(members, weights)
    refuse_drafts(members[0], drafted, draft, sampling, noise)
    weights = weights if isinstance(weights, torch.Tensor) else tuple(c_float(w).value for w in weights)
    draft = draft if drafted.shape[1] else None
    if choose(impl, members[0].device) == "triton":
        weights = weights.contiguous() if isinstance(weights, torch.Tensor) else weights
        packed = drafted.contiguous()
        return Verdict(*_kernels().verify(members, weights, packed, draft, _packed(sampling), _packed(noise)))
    proposal = None if draft is None else Rows([draft], (1.0,))
    return Verdict(*judge(Rows(members, weights), proposal, drafted, sampling, noise))


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
    if impl not in ("auto", "triton", "torch"):
        raise InputError.of(
            "impl", expected="'auto', 'triton' or 'torch'", got=repr(impl), remedy="Leave it out for 'auto'."
        )
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
def _kernels() -> Any:
    # Only here: importing Triton takes seconds, and there are systems without it.
    return importlib.import_module("proxytune_kernels")


def _packed(values: Any) -> Any:
    # The kernels read settings and keys without strides; a loop may well pass a column of a table of positions.
    given = {} if values is None else vars(values)
    apart = {k: x.contiguous() for k, x in given.items() if isinstance(x, torch.Tensor) and not x.is_contiguous()}
    return replace(values, **apart) if apart else values


# --- inside torch.compile -------------------------------------------------------------------------------------------


def _in_graph(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    sampling: Sampling | None,
    noise: Noise | None,
    draws: int,
    names: tuple[str, ...],
    impl: str,
) -> list[torch.Tensor]:
    settings: list[torch.Tensor] = []
    known = [0, 0, 0]
    if sampling is not None:
        s = sampling
        settings = [s.temperature, s.top_k, s.top_p, s.log_min_p, s.truncated]
        if s.fork_threshold is not None and s.fork_temperature is not None:
            settings += [s.fork_threshold, s.fork_temperature]
        known = [int(s.some_truncated), int(s.all_truncated), s.largest_k]
    keys = [] if noise is None else [noise.seed, noise.row, noise.position, noise.branch]
    per_row, numbers = (weights, []) if isinstance(weights, torch.Tensor) else (None, [float(w) for w in weights])
    return _step_op(list(members), per_row, numbers, settings, known, keys, draws, ",".join(names), impl)


@torch.library.custom_op("proxytune::step", mutates_args=())
def _step_op(
    members: list[torch.Tensor],
    weights: torch.Tensor | None,
    numbers: list[float],
    settings: list[torch.Tensor],
    known: list[int],
    keys: list[torch.Tensor],
    draws: int,
    names: str,
    impl: str,
) -> list[torch.Tensor]:
    sampling = None
    if settings:
        temperature, top_k, top_p, log_min_p, truncated, *fork = settings
        threshold, fork_temperature = fork or (None, None)
        some, all_, largest = known
        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            log_min_p,
            threshold,
            fork_temperature,
            truncated,
            bool(some),
            bool(all_),
            largest,
        )
    noise = Noise(*keys) if keys else None
    wanted = tuple(names.split(","))
    out = _run(members, numbers if weights is None else weights, sampling, noise, draws, wanted, impl)
    # Outputs of an operator may not share storage; all but the scores are small.
    return [out[name] if name == "scores" else out[name].clone() for name in wanted]


@_step_op.register_fake
def _(
    members: list[torch.Tensor],
    weights: torch.Tensor | None,
    numbers: list[float],
    settings: list[torch.Tensor],
    known: list[int],
    keys: list[torch.Tensor],
    draws: int,
    names: str,
    impl: str,
) -> list[torch.Tensor]:
    base = members[0]
    shapes = {"scores": tuple(base.shape)} | dict.fromkeys(
        ("tokens", "logprobs", "draw_logprobs", "keys"), (base.shape[0], draws)
    )
    dtypes = dict.fromkeys(("tokens", "argmax", "kept"), torch.int64) | {"fork": torch.bool}
    return [
        base.new_empty(shapes.get(name, (base.shape[0],)), dtype=dtypes.get(name, torch.float32))
        for name in names.split(",")
    ]
