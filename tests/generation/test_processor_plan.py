"""Which processors become settings of one step, and which run before it."""

from typing import Any

import pytest
import torch
from support.fused import NEW, SAMPLE, USABLE, Discourage, prompts, run
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from proxytune import FusedDecoding, ops
from proxytune.generation.processor_plan import plan_processors
from proxytune.models.assisted import TailMask


class Calls:
    """Counts the calls of `ops.step`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.members: list[list[torch.Tensor]] = []
        self.want: list[tuple[str, ...]] = []
        self.sampling: list[Any] = []
        inner = ops.step

        def step(members: Any, weights: Any = (1.0,), **kwargs: Any) -> ops.StepOutput:
            self.members.append(list(members))
            self.want.append(tuple(kwargs.get("want", ("tokens",))))
            self.sampling.append(kwargs.get("sampling"))
            return inner(members, weights, **kwargs)

        monkeypatch.setattr(ops, "step", step)


def forbid(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not on the fast path")

    for owner, name in places:
        monkeypatch.setattr(owner, name, never)


@pytest.mark.smoke
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_what_can_be_fused_is_one_step(model: Any, do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    warpers = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TailMask)
    forbid(monkeypatch, (ops, "combine"), *((w, "__call__") for w in warpers))
    settings = {**SAMPLE, "min_p": 0.02} if do_sample else {"do_sample": False, "eos_token_id": None}
    run(model, prompts(), custom_generate=FusedDecoding(seed=0), **settings)
    assert calls.want == [("tokens",)] * NEW
    count, width = (3, USABLE) if hasattr(model, "formula") else (1, 256)
    for members in calls.members:
        assert len(members) == count
        assert members[0].shape == (3, width)
        assert members[0].stride(0) == 256, "a view of the base's rows, not a copy"
    for sampling in calls.sampling:
        assert (sampling is not None) == do_sample
        assert sampling is calls.sampling[0], "made once"
    if do_sample:
        s = calls.sampling[0]
        assert (s.largest_k, float(s.top_p[0])) == (40, pytest.approx(0.95))
        assert float(s.temperature[0]) == pytest.approx(0.9)
        assert float(s.log_min_p[0].exp()) == pytest.approx(0.02)


@pytest.mark.smoke
def test_what_cannot_runs_before_on_all_columns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    widths = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            widths.append((scores.shape[1], scores.dtype, bool((scores[:, USABLE:] == -torch.inf).all())))
            return scores

    forbid(monkeypatch, (TemperatureLogitsWarper, "__call__"), (TopKLogitsWarper, "__call__"))
    run(model, prompts(), custom_generate=FusedDecoding(seed=0), logits_processor=[Look()], **SAMPLE)
    assert calls.want == [("scores",), ("tokens",)] * NEW
    assert widths == [(256, torch.float32, hasattr(model, "formula"))] * NEW
    assert all(len(members) == 1 and members[0].shape == (3, 256) for members in calls.members[1::2])


T, K, P, M = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)


class Mine(TopKLogitsWarper):
    """A subclass may do anything."""


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("processors", "before", "warpers"),
    [
        ([], 0, 0),
        ([T, K, P, M], 0, 4),
        ([T, P], 0, 2),
        ([Discourage(), T, K], 1, 2),
        ([K, T], 1, 1),  # top-k first is another law only by name, but it is not what the step does
        ([T, K, P, TypicalLogitsWarper(0.9)], 4, 0),
        ([T, T], 1, 1),
        ([M, P], 1, 1),
        ([T, Mine(5), P], 2, 1),
        ([T, TopKLogitsWarper(5, min_tokens_to_keep=3)], 2, 0),
        ([T, TopPLogitsWarper(0.9, filter_value=-1e4), M], 2, 1),
        ([T, TopPLogitsWarper(0.0)], 2, 0),
        ([TemperatureLogitsWarper(1e-60), K], 1, 1),
        ([TemperatureLogitsWarper(1e60), K], 1, 1),
        ([TopPLogitsWarper(1e-60)], 1, 0),
        ([MinPLogitsWarper(0.0)], 0, 1),
        ([MinPLogitsWarper(1.0)], 0, 1),
        ([TopPLogitsWarper(1.0)], 0, 1),
        ([TopKLogitsWarper(2**40), P], 1, 1),
    ],
)
def test_translation(processors: list[LogitsProcessor], before: int, warpers: int) -> None:
    for tail in ([], [TailMask(250)]):
        found = plan_processors([*tail, *processors], do_sample=True)
        assert found.usable == (250 if tail else None)
        assert list(found.before) == processors[:before]
        assert list(found.warpers) == processors[before:]
        assert len(found.warpers) == warpers
        found.sampling(2, 8, torch.device("cpu"))  # the settings are ones that the step takes
    greedy = plan_processors(processors, do_sample=False)
    assert list(greedy.before) == processors
    assert not greedy.warpers


def test_a_tail_mask_elsewhere_runs_as_it_is() -> None:
    found = plan_processors([TailMask(250), Discourage(), TailMask(250), T], do_sample=True)
    assert found.usable == 250
    assert [type(p) for p in found.before] == [Discourage, TailMask]
