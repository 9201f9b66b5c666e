"""How many operators a step in torch dispatches on a CPU, and how often the host reads a tensor: counts, not times.

Each operator costs about a microsecond, whatever it works on, and a step is run once per token. NumPy's operations on
small arrays are not counted; they cost a third of that.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proxytune import ops
from proxytune.ops import Noise, SamplingParams

MOST, MOST_READS = 70, 1
WIDTH = 2100  # three tiles, the last one padded
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")
STATISTICS = ("tokens", "logprobs", "entropy", "varentropy", "kl", "confidence", "kept")
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 50},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "forks": {"temperature": 0.7, "top_p": 0.9, "fork_threshold": 1.0, "fork_temperature": 1.2},
}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(n for name, n in self.of.items() if name.startswith(READS))


def counted(rows: int, dtype: torch.dtype, settings: dict[str, Any] | None, want: tuple[str, ...]) -> Counted:
    """The operators of a step with base, expert and antiexpert; settings and keys are prepared, as before a loop."""
    g = torch.Generator().manual_seed(rows)
    # A peaked row, as a language model's.
    base = 12 - 2.2 * (torch.rand(rows, WIDTH, generator=g).argsort(1).float() + 1).log()
    members = [(base + 0.3 * torch.randn(base.shape, generator=g)).to(dtype) for _ in range(3)]
    given: dict[str, Any] = {}
    if settings is not None:
        given = {"sampling": SamplingParams.of(rows, **settings), "noise": Noise.of(rows, seed=1)}
    for _ in range(2):
        with Counted() as counts:
            ops.step(members, (1.0, 0.5, -0.5), want=want, impl="torch", **given)
    return counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("want", [("tokens",), ("tokens", "logprobs", "entropy"), STATISTICS], ids=len)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_that_samples(settings: dict[str, Any], want: tuple[str, ...], rows: int, dtype: torch.dtype) -> None:
    counts = counted(rows, dtype, settings, want)
    assert counts.of.total() <= MOST, counts.of.most_common()
    assert counts.reads <= MOST_READS


def test_a_greedy_step() -> None:
    counts = counted(1, torch.bfloat16, None, ("tokens",))
    assert counts.of.total() <= 16, counts.of.most_common()
    assert counts.reads <= MOST_READS


def test_the_control_reads_are_seen() -> None:
    with Counted() as counts:
        float(torch.ones(3).sum())
        torch.ones(3).nonzero()
    assert counts.reads == 2
