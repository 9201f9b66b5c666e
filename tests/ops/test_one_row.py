"""One row with top-k has a way of its own on a CPU: its tokens are those of the same row in a batch, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from proxytune import ops
from proxytune.ops import Noise, SamplingParams
from proxytune.ops.torch_impl import decide

SETTINGS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 50, "top_p": 0.95},
    {"top_k": 7, "temperature": 0.7, "min_p": 0.05},
    {"top_k": 40, "temperature": 1e-3, "top_p": 0.5},
    {"top_k": 120, "temperature": 3.0, "top_p": 0.999, "min_p": 0.01},
]
WIDTHS = (120, 564, 5000)


def rows_of(kind: str, width: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(width)
    members = [3 * torch.randn(16, v, generator=g) for v in (width, width - 3, width)]
    if kind == "tied":
        members = [x.round() for x in members]
    if kind == "masked":
        members[0][torch.rand(16, width, generator=g) < 0.9] = -math.inf
    if kind == "strange":
        members[0][::4] = -math.inf
        members[0][1::4, 5] = math.nan
        members[0][2::4, 9] = math.inf
    return [x.half() for x in members] if kind == "half" else members


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "tied", "masked", "strange", "half"])
def test_a_row_alone_has_the_token_that_it_has_in_a_batch(
    kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, weights, alone = rows_of(kind, width), (1.0, 1.0, -1.0), decide.token_of_one_row
    served: list[bool] = []

    def token(*given: Any) -> Any:
        found = alone(*given)
        served.append(found is not None)
        return found

    monkeypatch.setattr(decide, "token_of_one_row", token)
    for settings in SETTINGS:
        noise = Noise.of(16, seed=3, position=torch.arange(16))
        want = ops.step(members, weights, sampling=SamplingParams.of(16, **settings), noise=noise).tokens
        one = SamplingParams.of(1, **settings)
        for row in range(16):
            rows, keys = [x[row : row + 1] for x in members], noise.pick(torch.tensor([row]))
            got = ops.step(rows, weights, sampling=one, noise=keys).tokens
            assert torch.equal(got, want[row : row + 1])
            assert got.dtype == torch.int64
    assert len(served) == 16 * len(SETTINGS)
    assert sum(served) == len(served) // (4 if kind == "strange" else 1)


def test_other_settings_take_the_other_way() -> None:
    rows = [torch.randn(1, 300)]
    for settings in ({}, {"top_p": 0.9}, {"top_k": 5, "fork_threshold": 1.0, "fork_temperature": 2.0}):
        sampling = SamplingParams.of(1, **settings)
        found = decide.token_of_one_row(decide.MemberRows(rows, (1.0,)), sampling, Noise.of(1))
        assert found is None
