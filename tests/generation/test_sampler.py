"""One step of the fused loop: the host waits once, and a row without a distribution is named."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.fused import SAMPLE, Collector, FirstRowOnly, composed, prompts, run
from support.tiny import EOS, PAD
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, PreTrainedModel

from proxytune import FusedDecoding, ops
from proxytune.errors import NumericalError

# --- the host -------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU, or copy to it from the host's memory, outside of forward passes."""

    NAMES = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.copies, self.paused, self._inside = 0, 0, False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.reads += func is torch.ops.aten._local_scalar_dense.default and not self._inside
            self.reads += func in (torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
            self.copies += func is torch.ops.aten.lift_fresh.default
        return func(*args, **kwargs or {})

    @contextmanager
    def counting(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def patched(name: str) -> Any:
            inner = getattr(torch.Tensor, name)

            def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.reads += not self.paused and not self._inside
                outer, self._inside = self._inside, True
                try:
                    return inner(tensor, *args, **kwargs)
                finally:
                    self._inside = outer

            return call

        def pause(*_: Any) -> None:
            self.paused = True

        def go_on(*_: Any) -> None:
            self.paused = False

        hooks = [model.register_forward_pre_hook(pause), model.register_forward_hook(go_on)]
        with monkeypatch.context() as patch, self:
            for name in self.NAMES:
                patch.setattr(torch.Tensor, name, patched(name))
            yield
        for hook in hooks:
            hook.remove()


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, SAMPLE, {**SAMPLE, "min_p": 0.02}], ids=["greedy", "three", "four"])
def test_the_host_waits_once_per_step(model: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, the step reads on the CPU by design; what it does on a GPU is tested where the step is.
    def step(members: Any, weights: Any, **kwargs: Any) -> ops.StepOutput:
        return ops.StepOutput(tokens=members[0].argmax(-1, keepdim=True))

    monkeypatch.setattr(ops, "step", step)
    found = []
    for new in (3, 4, 11):
        reads = Reads()
        with reads.counting(model, monkeypatch):
            run(
                model,
                prompts(),
                custom_generate=FusedDecoding(seed=0),
                **{"do_sample": False} | settings | {"eos_token_id": EOS, "min_new_tokens": None},
                max_new_tokens=new,
            )
        found.append((reads.reads, reads.copies))
    assert found[0][0] > 3, "nothing was counted"
    assert found[1][0] - found[0][0] == 1
    assert found[2][0] - found[0][0] == 8
    assert found[0][1] == found[1][1] == found[2][1], "a step makes tensors of the host's numbers"


# --- rows without a distribution ------------------------------------------------------------------------------------


@contextmanager
def broken(member: PreTrainedModel, row: int, step: int, value: float) -> Iterator[None]:
    """From some step on, one logit of a row is no number (or all are, if it is −inf)."""
    calls = itertools.count()

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if next(calls) >= step:
            output.logits = output.logits.clone()
            output.logits[row, -1, slice(None) if value == -torch.inf else slice(7, 8)] = value
        return output

    hook = member.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.smoke
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{"do_sample": False}, SAMPLE, {**SAMPLE, "repetition_penalty": 1.1}])
def test_a_row_that_is_no_distribution(model: Any, settings: dict[str, Any], value: float) -> None:
    why = "−inf for every token" if value == -float("inf") else r"NaN or \+inf"
    member = getattr(model, "base", model)
    pattern = rf"row 1 of 3, step 4 \(new tokens counted from 0\): expected .* got {why}"
    settings = {**settings, "eos_token_id": None, "custom_generate": FusedDecoding(seed=0)}
    with broken(member, 1, 4, value), pytest.raises(NumericalError, match=pattern):
        run(model, prompts(), **settings)
    with broken(member, 1, 4, value):  # one step earlier, nothing is wrong
        assert run(model, prompts(), max_new_tokens=4, **settings).shape == (3, 16)


def test_a_companion_that_is_no_distribution() -> None:
    model = composed()
    with broken(model.expert, 2, 0, float("nan")), pytest.raises(NumericalError, match="row 2 of 3, step 0 "):
        run(model, prompts(), do_sample=False, custom_generate=FusedDecoding())
    with broken(model.expert, 2, 0, -float("inf")):  # the base owns the support: this is no opinion
        run(model, prompts(), do_sample=False, custom_generate=FusedDecoding())


@pytest.mark.smoke
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_finished_row_may_be_anything(model: Any, do_sample: bool) -> None:
    settings = {**SAMPLE, "do_sample": do_sample, "custom_generate": FusedDecoding(seed=0)}
    if not do_sample:
        settings = {"do_sample": False, "custom_generate": FusedDecoding()}
    free = run(model, prompts(), **settings | {"eos_token_id": None})
    end = int(free[1, 14])
    want = run(model, prompts(), **settings | {"eos_token_id": end})
    assert (want[1, 15:] == PAD).all()
    assert want.shape[1] == 24
    with broken(getattr(model, "base", model), 1, 3, float("nan")):
        assert torch.equal(run(model, prompts(), **settings | {"eos_token_id": end}), want)
    # Without an EOS no row is padded, and a finished one goes on with any token that can be embedded.
    stop = {"eos_token_id": None, "stopping_criteria": [FirstRowOnly()]}
    with broken(getattr(model, "base", model), 0, 3, float("nan")):
        got = run(model, prompts(), **settings | stop)
    assert torch.equal(got[1:], free[1:])
    assert (got[0, 15:] == 0).all()


def test_nothing_is_streamed_of_a_step_that_fails() -> None:
    streamer, model = Collector(), composed()
    with broken(model.base, 1, 2, float("nan")), pytest.raises(NumericalError):
        run(model, prompts(), do_sample=False, streamer=streamer, custom_generate=FusedDecoding())
    assert len(streamer.got) == 3  # the prompt and two steps


def test_a_constraint_that_leaves_nothing_and_the_remedies(model: Any) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf)

    with pytest.raises(NumericalError, match="row 0 of 3, step 0 .*−inf for every token, after the logits processors"):
        run(model, prompts(), logits_processor=[Nothing()], custom_generate=FusedDecoding(seed=0), **SAMPLE)
    with broken(getattr(model, "base", model), 1, 4, float("nan")):
        settings = {**SAMPLE, "remove_invalid_values": True}
        assert run(model, prompts(), custom_generate=FusedDecoding(seed=0), **settings).shape == (3, 24)
