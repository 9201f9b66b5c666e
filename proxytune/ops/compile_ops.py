"""`step` as a custom operator, for `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.ops.combination import Combination, Weights
from proxytune.ops.dispatch import run_step
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

__all__ = []


def step_in_graph(
    members: Sequence[torch.Tensor],
    weights: Weights,
    sampling: SamplingParams | None,
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
    c = weights if isinstance(weights, Combination) else Combination(weights)
    per_row, numbers = (c.weights, []) if isinstance(c.weights, torch.Tensor) else (None, [float(w) for w in c.weights])
    shifted = (per_row, numbers, c.offsets, c.floors, c.floored_by)
    return _step_op(list(members), *shifted, settings, known, keys, draws, ",".join(names), impl)


@torch.library.custom_op("proxytune::step", mutates_args=())
def _step_op(
    members: list[torch.Tensor],
    weights: torch.Tensor | None,
    numbers: list[float],
    offsets: torch.Tensor | None,
    floors: torch.Tensor | None,
    floored_by: int,
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
        sampling = SamplingParams(
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
    combination = Combination(numbers if weights is None else weights, offsets, floors, floored_by)
    out = run_step(members, combination, sampling, noise, draws, wanted, impl)
    # Outputs of a custom operator may not share storage; cloning is cheap, since only the scores are large.
    return [out[name] if name == "scores" else out[name].clone() for name in wanted]


@_step_op.register_fake
def _(
    members: list[torch.Tensor],
    weights: torch.Tensor | None,
    numbers: list[float],
    offsets: torch.Tensor | None,
    floors: torch.Tensor | None,
    floored_by: int,
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
