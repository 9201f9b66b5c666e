"""Steps that are repeated without checks and without Triton's work on arguments: the same as steps that are not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decisions import same
from support.interpreter import patch_the_language_once_per_launch

from proxytune import ops
from proxytune.errors import InputError
from proxytune.ops import StepOutput

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    from proxytune_kernels import prepared

    if DEVICE == "cpu":
        patch_the_language_once_per_launch()
    prepared._KEPT.clear()
    prepared._SEEN.clear()


def logits(seed: int, width: int = 150, rows: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=g).to(DEVICE) for _ in range(3)]


def step(members: Any, weights: Any = (1.0, 0.5, -0.5), **how: Any) -> StepOutput:
    return ops.step(members, weights, impl="triton", **how)


class Launched(Exception):
    """The step went through the checks and Triton's launch."""


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on, a step that is no repetition raises Launched."""

    def fail(*_: Any, **__: Any) -> None:
        raise Launched

    return lambda: monkeypatch.setattr(sys.modules["proxytune.ops.step"], "run_step", fail)


@pytest.mark.parametrize("draws", [None, 2])
def test_a_repetition_gives_what_a_step_of_its_own_does(draws: int | None, no_launch: Any) -> None:
    how: dict[str, Any] = {"want": ("tokens", "entropy", "argmax", "scores")}
    noise = None
    if draws:
        noise = ops.Noise.of(2, seed=1, device=DEVICE)
        sampling = ops.SamplingParams.of(2, temperature=0.7, top_k=torch.tensor([5, 0]), device=DEVICE)
        how = {"sampling": sampling, "draws": draws, "want": ("tokens", "keys", "lse", "kept", "scores")}
    position = torch.tensor([7, 9], device=DEVICE)
    own = [step(logits(1), **how, **({"noise": noise} if noise else {})) for _ in range(2)]  # kept from here on
    expected = step(logits(2), (1.0, 2.0, -1.0), **how, **({"noise": noise.at(position)} if noise else {}))
    no_launch()
    again = step(logits(2), (1.0, 2.0, -1.0), **how, **({"noise": noise.at(position.clone())} if noise else {}))
    same(again, expected, how["want"])
    first = step(logits(1), **how, **({"noise": noise} if noise else {}))
    same(first, own[0], how["want"])
    pointers = [getattr(first, name).untyped_storage().data_ptr() for name in how["want"]]
    assert not set(pointers) & {getattr(again, name).untyped_storage().data_ptr() for name in how["want"]}


def test_memory_that_is_not_returned_is_not_shared_by_what_lies_in_it() -> None:
    noise = ops.Noise.of(2, seed=1, device=DEVICE)
    sampling = ops.SamplingParams.of(2, top_p=0.3, device=DEVICE)
    want = ("tokens", "entropy")
    how: dict[str, Any] = {"sampling": sampling, "noise": noise, "draws": 3, "want": want}
    expected, _, again = (step(logits(1), **how) for _ in range(3))
    same(again, expected, want)


def test_other_forms_and_wrong_ones_go_through_the_checks(no_launch: Any) -> None:
    sampling, noise = ops.SamplingParams.of(2, device=DEVICE), ops.Noise.of(2, device=DEVICE)
    x = logits(1)
    per_row = torch.ones(2, 3, device=DEVICE)
    for _ in range(2):
        step(x, sampling=sampling, noise=noise)
        step([x[0], x[0], x[1]], want=["tokens"])  # one tensor twice: not kept
        step(x, per_row, sampling=sampling, noise=noise, want=("tokens",))
        step(x, want=("argmax",))
    no_launch()
    step(logits(2), per_row * 2, sampling=sampling, noise=noise)
    step(logits(2), (1, 0, 0), want=("argmax",))
    with pytest.raises(InputError, match="sampling: expected SamplingParams together with noise"):
        step(logits(2), noise=noise, want=("argmax",))
    with pytest.raises(Launched):
        step(logits(2), want=["tokens"])
    others = [
        (logits(1, 151), {}), ([*x[:2], x[2].half()], {}), (x[:2], {"weights": (1.0, 0.5)}), (x, {"draws": 2}),
        (x, {"want": ("tokens", "lse")}), (x, {"sampling": ops.SamplingParams.of(2, device=DEVICE)}),
        (x, {"noise": ops.Noise.of(2, device=DEVICE)}), (x, {"weights": ops.Combination((1.0, 0.5, -0.5))}),
    ]  # fmt: skip
    for members, how in others:
        with pytest.raises(Launched):
            step(members, **({"sampling": sampling, "noise": noise} | how))
    wrong = [
        (x, {"weights": (1.0, float("nan"), 1.0)}), (x, {"weights": (1.0, 1e39, 1.0)}), (x, {"weights": ("a", 1, 2)}),
        ([*x[:2], x[2].double()], {}), ([*x[:2], x[2][:1]], {}), ([*x[:2], [1.0]], {}), (x, {"want": "tokens"}),
        ([*x[:2], x[2].T.contiguous().T], {}), (x, {"noise": noise.at(torch.zeros(3, dtype=torch.int64))}),
        (x, {"noise": noise.at(torch.zeros(2))}), (x, {"draws": 0}), (x, {"weights": per_row.double()}),
    ]  # fmt: skip
    for members, how in wrong:
        with pytest.raises(InputError):
            step(members, **({"sampling": sampling, "noise": noise} | how))


@pytest.mark.slow
def test_compiled_kernels_are_launched_again_with_the_same_arguments() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, "benches/bench_kernels.py", "--host"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case in json.loads(done.stdout).items():
        assert case["alike"], name
        # A fifth to a sixth as long; far from where noise of a loaded machine would count.
        assert case["repeated"] < 0.5 * case["launched"], name
