"""What Python does around the launches of a step, without a GPU: kernels are compiled, and a launch does nothing.

Triton's launcher in C is not in the times, and memory is the CPU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from proxytune import ops
from proxytune.ops import StepOutput, dispatch
from proxytune.ops.checks import refuse_members, refuse_request

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature draw": {"temperature": 0.7},
    "k50 + p.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class NoGpu(DriverBase):
    """Stands for sm_90; `launched` has the arguments of all launches."""

    utils = _Utils()

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.launcher_cls = lambda source, metadata: lambda *arguments: self.launched.append(arguments)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def run(rows: int = 1, width: int = 128_256, repeats: int = 2000) -> dict[str, Any]:
    """By case: microseconds per step "launched", through the checks and Triton's own launch, and "repeated".

    "alike" says whether both launched the same kernels with the same arguments, but for the memory made within. Triton
    has no other driver afterwards.
    """
    fake = NoGpu()
    driver.set_active(fake)
    dispatch.choose = lambda impl, device: "triton"
    return {name: _case(fake, settings, rows, width, repeats) for name, settings in CASES.items()}


def _case(fake: NoGpu, settings: dict[str, Any], rows: int, width: int, repeats: int) -> dict[str, Any]:
    weights = (1.0, 0.5, -0.5)
    how: dict[str, Any] = {"want": ("tokens",)}
    if settings:
        how |= {"sampling": ops.SamplingParams.of(rows, **settings), "noise": ops.Noise.of(rows, seed=0)}
    made, members = ([torch.randn(rows, width).bfloat16() for _ in weights] for _ in range(2))
    for _ in range(2):
        ops.step(made, weights, impl="triton", **how)
    calls = {
        "launched": lambda: _launched(members, weights, **how),
        "repeated": lambda: ops.step(members, weights, impl="triton", **how),
    }
    named = {x.data_ptr(): f"member {i}" for i, x in enumerate(members)}
    for of in how.values():
        named |= {x.data_ptr(): k for k, x in getattr(of, "__dict__", {}).items() if isinstance(x, torch.Tensor)}
    shown, found = [], {}
    for name, call in calls.items():
        fake.launched.clear()
        call()
        shown.append([_flat(x, named) for x in fake.launched])
        found[name] = _microseconds(call, repeats)
    return found | {"alike": len(shown[0]) > 0 and shown[0] == shown[1]}


def _microseconds(call: Callable[[], Any], repeats: int) -> float:
    """The tenth percentile: what else runs on the machine only adds."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - start)
    return sorted(took)[repeats // 10] / 1e3


def _flat(launch: tuple[Any, ...], named: dict[int, str]) -> list[Any]:
    """A launch's grid and arguments: tensors given by name, addresses of other memory as such, all else as it is."""

    def of(x: Any) -> Any:
        if isinstance(x, tuple):
            return [of(y) for y in x]
        if isinstance(x, torch.Tensor):
            x = x.data_ptr()
        return named.get(x, "memory" if isinstance(x, int) and x > 1 << 32 else x)

    return [*launch[:3], *map(of, launch[9:])]


def _launched(members: list[torch.Tensor], weights: Any, want: Any, sampling: Any = None, noise: Any = None) -> Any:
    """The step as `ops.step` makes it when it repeats none."""
    refuse_members(members, weights)
    refuse_request(members[0], sampling, noise, 1, want)
    return StepOutput(**dispatch.run_step(members, weights, sampling, noise, 1, want, "triton"))
