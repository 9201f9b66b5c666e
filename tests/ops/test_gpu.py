"""The contract on a GPU, at real vocabularies; and on the CPU, at small ones, the helpers that those tests stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import (
    ALL,
    UNDRAWN,
    Case,
    Run,
    Tally,
    check,
    logits,
    random_case,
    random_keys,
    same,
    settings_for,
)
from support.gpu import gpu, in_a_graph, needs_gpu, no_waiting

from proxytune import ops
from proxytune.ops import StepOutput, dispatch
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Qwen's head and Gemma's: no multiple of the tile, and a power of two's multiple.
WIDTHS = [151_936, 256_000]


def runner(impl: str) -> Run:
    def run(*args: Any, **kwargs: Any) -> StepOutput:
        return ops.step(*args, impl=impl, **kwargs)  # type: ignore[arg-type]

    return run


def steering_case(rows: int, width: int, device: str, *, draws: int = 1, forks: bool = False, seed: int = 0) -> Case:
    """Three members of the usual kind: bfloat16, one head padded, all settings in turn."""
    members = logits(rows, width, width, width + 128, seed=seed, dtypes=(torch.bfloat16,))
    keys = random_keys(np.random.default_rng(seed), rows)
    members = [x.to(device) for x in members]
    return Case(members, (1.0, 0.7, -0.7), settings_for(rows, width, forks=forks), keys, draws)


def agree(case: Case, first: Run, second: Run) -> Tally:
    """Two implementations on the same case: the tokens equal wherever the keys are not too close to call.

    The smaller key gap of two draws that differ says how close it was. The kept sets may differ by the tokens at the
    boundary of top-p; these change every log-probability, by no more than their mass.
    """
    a, b = case.step(first), case.step(second)
    assert a.tokens is not None
    assert b.tokens is not None
    assert a.keys is not None
    assert b.keys is not None
    differ = a.tokens != b.tokens
    # Both of two draws that changed places have nearly the same key.
    close = (a.keys - b.keys).abs() <= 1e-3 * (1 + a.keys.abs())
    assert close[differ].all(), (a.tokens[differ], b.tokens[differ], a.keys[differ], b.keys[differ])
    assert torch.equal(a.argmax, b.argmax)  # type: ignore[arg-type]
    assert torch.equal(a.scores.isnan(), b.scores.isnan())  # type: ignore[union-attr]
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=0, equal_nan=True)
    for name in ("lse", "entropy", "varentropy", "kl", "confidence"):
        # Float32 sums of a quarter of a million terms, in another order. Two are differences of terms of a hundred.
        atol = 1e-3 if name in ("varentropy", "kl") else 1e-4
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=atol, equal_nan=True, msg=name)
    return Tally(differ.numel(), int(differ.sum()))


def batch_invariance(run: Run, rows: int, width: int, device: str) -> None:
    case = steering_case(rows, width, device, draws=2, forks=True)
    whole = case.step(run)
    for row in (0, 1, 2, 4, rows - 1):
        same(whole, case.only([row]).step(run), rows=[row])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    same(whole, case.only(order).step(run), rows=order)


def decode_loop(
    case: Case, steps: int, capture: Callable[[Callable[[], None]], Callable[[], None]], run: Run
) -> list[torch.Tensor]:
    """Tokens of `steps` steps in static buffers, the position advanced in place, as a captured loop does it.

    `capture` takes the step as a function, and gives back what replays it.
    """
    rows, device = case.rows, case.members[0].device
    assert case.settings is not None
    assert case.keys is not None
    sampling = SamplingParams.of(rows, device=device, **case.settings)
    start = torch.arange(rows, device=device) * 1000
    position = start.clone()
    noise = Noise.of(rows, device=device, **case.keys).at(position)
    out = torch.empty(rows, case.draws, dtype=torch.int64, device=device)

    def step() -> None:
        got = run(case.members, case.weights, sampling=sampling, noise=noise, draws=case.draws)
        assert got.tokens is not None
        out.copy_(got.tokens)
        position.add_(1)

    replay = capture(step)
    position.copy_(start)
    tokens = []
    for _ in range(steps):
        replay()
        tokens.append(out.clone())
    assert torch.equal(position, start + steps)
    return tokens


def eagerly(step: Callable[[], None]) -> Callable[[], None]:
    return step


def prepared(case: Case) -> tuple[SamplingParams, Noise]:
    """Settings and keys, made before the loop, which is where waiting is allowed."""
    assert case.settings is not None
    device = case.members[0].device
    return (
        SamplingParams.of(case.rows, device=device, **case.settings),
        Noise.of(case.rows, device=device, **(case.keys or {})),
    )


# --- on the CPU, small ------------------------------------------------------------------------------------------------


def test_the_helpers_on_the_cpu(run: Run, slow_one: bool) -> None:
    width = 100 if slow_one else 1200
    torch_run = runner("torch")
    case = steering_case(5, width, "cpu", draws=2, forks=True)
    agree(case, torch_run, run)
    batch_invariance(run, 5, width, "cpu")
    tokens = decode_loop(case, 3, eagerly, run)
    expected = []
    for i in range(3):
        position = torch.arange(5) * 1000 + i
        assert case.keys is not None
        got = replace(case, keys=case.keys | {"position": position}).step(torch_run, ["tokens"]).tokens
        assert got is not None
        expected.append(got)
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    assert not torch.equal(tokens[0], tokens[1])
    sampling, noise = prepared(case)
    assert sampling.temperature.shape == noise.seed.shape == (5,)


def test_the_comparison_of_implementations_sees_other_tokens_and_other_numbers() -> None:
    case = steering_case(4, 300, "cpu", draws=2)
    good = runner("torch")

    def other_noise(*args: Any, noise: Noise, **kwargs: Any) -> StepOutput:
        return good(*args, noise=noise.at(noise.position + 1), **kwargs)

    def other_entropy(*args: Any, **kwargs: Any) -> StepOutput:
        got = good(*args, **kwargs)
        return replace(got, entropy=got.entropy * 1.001)  # type: ignore[operator]

    for wrong in (other_noise, other_entropy):
        with pytest.raises(AssertionError):
            agree(case, good, wrong)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("width", WIDTHS)
def test_real_vocabularies_against_the_oracle(width: int, impl: str) -> None:
    tally = Tally()
    for seed, dtypes in enumerate([DTYPES, (torch.bfloat16,), (torch.float32,)]):
        members = [x.cuda() for x in logits(6, width, width - 64, width + 128, width // 2, seed=seed, dtypes=dtypes)]
        keys = random_keys(np.random.default_rng(seed), 6)
        case = Case(members, (1.0, 0.7, -0.7, 0.1), settings_for(6, width, forks=seed == 1), keys, 4)
        tally += check(case, runner(impl))
        tally += check(replace(case, settings=None, draws=1), runner(impl), UNDRAWN)
    # At this width some rows' top-p boundary is too close to call, and with it the fourth of four draws.
    assert tally.unsure <= 0.1 * tally.draws


@gpu
@needs_gpu
def test_random_trials_against_the_oracle() -> None:
    g = np.random.default_rng(11)
    tally = Tally()
    for trial in range(1000):
        tally += check(random_case(g, 40_000 if trial % 10 == 0 else 5000, "cuda"), runner("triton"))
    tally.assert_rare()


@gpu
@needs_gpu
def test_random_trials_against_torch_at_full_width() -> None:
    g = np.random.default_rng(12)
    tally = Tally()
    for _ in range(100):
        tally += agree(random_case(g, 256_000, "cuda", rows=4), runner("triton"), runner("torch"))
    tally.assert_rare()


@gpu
@needs_gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_batches_of_one_and_of_sixty_four_are_bitwise_equal(width: int, impl: str) -> None:
    batch_invariance(runner(impl), 64 if impl == "triton" else 8, width, "cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("width", [50_257, 151_936])
def test_a_captured_step_replays_with_advancing_positions(width: int, impl: str) -> None:
    case = steering_case(6, width, "cuda", draws=2, forks=True)
    replayed = decode_loop(case, 8, in_a_graph, runner(impl))
    eager = decode_loop(case, 8, eagerly, runner(impl))
    for a, b in zip(replayed, eager, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(replayed[0], replayed[1])


@gpu
@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("want", [("tokens",), ALL])
def test_nothing_waits_for_the_device(want: tuple[str, ...], impl: str) -> None:
    case = steering_case(4, 50_257, "cuda", draws=2, forks=True)
    sampling, noise = prepared(case)
    run = runner(impl)
    moved = torch.full_like(noise.position, 9)
    for keys in (noise, noise.at(moved)):  # the first call compiles
        run(case.members, case.weights, sampling=sampling, noise=keys, draws=2, want=want)
    with no_waiting():
        run(case.members, case.weights, sampling=sampling, noise=noise.at(moved), draws=2, want=want)
        run(case.members, case.weights, want=("tokens", "entropy"))
        ops.combine([x[:, None] for x in case.members], (0.7, -0.7), impl=impl)  # type: ignore[arg-type]
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):  # the control
        noise.position.tolist()


@gpu
@needs_gpu
def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch ran")

    monkeypatch.setattr(dispatch, "decide", fail)
    case = steering_case(2, 3000, "cuda")
    assert case.step(runner("auto"), ["tokens"]).tokens is not None


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_the_tensors() -> None:
    torch.cuda.set_device(0)
    rows = torch.randn(4, 32_000, device="cuda:1")
    keys = {"sampling": SamplingParams.of(4, temperature=0.7, device="cuda:1"), "noise": Noise.of(4, device="cuda:1")}
    tokens = ops.step([rows], impl="triton", **keys).tokens
    expected = ops.step([rows], impl="torch", **keys).tokens
    assert tokens is not None
    assert expected is not None
    assert tokens.device == rows.device
    assert torch.equal(tokens, expected)
