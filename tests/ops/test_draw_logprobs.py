"""Shares of given tokens against the float64 oracle: what may be drawn, with what probability, and what is left."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import Case, RowsElsewhere, logits, random_case, random_keys, settings_for

from proxytune import ops
from proxytune.errors import InputError
from proxytune.ops.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["at once", "without waiting"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without waiting":
        monkeypatch.setattr(importlib.import_module("proxytune.ops.step"), "MemberRows", RowsElsewhere)
    return str(request.param)


def shares(case: Case, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert case.settings is not None
    return ops.draw_logprobs(
        case.members, case.weights, sampling=SamplingParams.of(case.rows, **case.settings), ids=ids
    )


def check(case: Case, ids: torch.Tensor) -> int:
    """Compare with the truth; how many rows' remaining mass was compared."""
    truth, (logprobs, rest) = case.truth(), shares(case, ids)
    assert logprobs.shape == ids.shape
    assert rest.shape == (case.rows,)
    assert logprobs.dtype == rest.dtype == torch.float32
    compared = 0
    for b in range(case.rows):
        if truth.bad[b] or truth.dead[b]:
            assert logprobs[b].isnan().all()
            assert rest[b].isnan()
            continue
        slack = truth.slack["draw_logprobs"][b]
        for token, got in zip(ids[b].tolist(), logprobs[b].tolist(), strict=True):
            if not 0 <= token < case.width or not truth.most[b, token]:
                assert got == -INF, (b, token)
            elif truth.least[b, token] or got > -INF:
                assert abs(got - truth.draw_logp[b, token]) <= slack[token], (b, token)
        if (truth.least[b] != truth.most[b]).any():
            continue  # a token at the boundary is a matter of rounding, and the rest with it
        left = truth.kept[b].copy()
        left[[t for t in ids[b].tolist() if 0 <= t < case.width]] = False
        if not left.any():
            assert rest[b] == -INF
        else:
            of = truth.draw_logp[b, left]
            want = of.max() + math.log(np.exp(of - of.max()).sum())
            assert abs(float(rest[b]) - want) <= slack[left].max() + 4e-6, (b, float(rest[b]), want)
        compared += 1
    return compared


def some_ids(g: np.random.Generator, case: Case) -> torch.Tensor:
    """Likely tokens, any tokens, one twice, none, and one past the end."""
    likely = torch.from_numpy(np.argsort(-case.truth().combined, axis=1)[:, :4].copy())
    others = torch.from_numpy(g.integers(-1, case.width + 2, (case.rows, int(g.integers(1, 8)))))
    return torch.cat([likely[:, : int(g.integers(0, 5))], others, others[:, :1]], 1)


def test_random_trials() -> None:
    g = np.random.default_rng(3)
    compared = 0
    for _ in range(150):
        case = random_case(g, 3000)
        compared += check(case, some_ids(g, case))
    assert compared > 100


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("width", [1, 2, 129, 1024, 2500])
def test_settings_and_tiles(width: int, forks: bool) -> None:
    g = np.random.default_rng(width)
    members = logits(12, width, max(1, width - 3), seed=width)
    case = Case(members, (1.0, 0.5), settings_for(12, width, forks=forks), random_keys(g, 12))
    assert check(case, some_ids(g, case)) > 6


@pytest.mark.parametrize("settings", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.01}], ids=str)
def test_they_are_what_a_step_says_of_its_draws(settings: dict[str, Any]) -> None:
    g = np.random.default_rng(1)
    case = Case(logits(5, 1500, seed=2), (1.0,), {"temperature": 1.3, **settings}, random_keys(g, 5), draws=6)
    step = case.step(ops.step, ("tokens", "draw_logprobs"))
    logprobs, rest = shares(case, step.tokens)
    assert torch.equal(logprobs, step.draw_logprobs)
    # With what they have, the others make 1.
    total = torch.cat([logprobs, rest[:, None]], 1).logsumexp(1)
    assert total.abs().max() < 4e-6


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}], ids=str)
def test_what_is_left_keeps_its_digits_where_it_is_small(settings: dict[str, Any]) -> None:
    """1 − p of the first token is 2e-18 here, and 0 in float64 if it is taken from 1."""
    z = torch.tensor([[0.0, -41.0, -43.0, -44.0]])
    case = Case([z], (1.0,), {"temperature": 1.0, **settings}, None)
    _, rest = shares(case, torch.tensor([[0]]))
    want = -41.0 + math.log1p(math.exp(-2)) if settings else -41.0 + math.log1p(math.exp(-2) + math.exp(-3))
    assert float(rest) == pytest.approx(want, abs=1e-5)
    _, rest = shares(case, torch.tensor([[0, 1, 2, 3]]))
    assert float(rest) == -INF


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_without_a_distribution_has_no_shares(value: float, settings: dict[str, Any]) -> None:
    z = torch.zeros(2, 9)
    z[0] = value
    case = Case([z], (1.0,), {"temperature": 1.0, **settings}, None)
    logprobs, rest = shares(case, torch.tensor([[1], [1]]))
    assert logprobs.isnan().tolist() == [[True], [False]]
    assert rest.isnan().tolist() == [True, False]


X = torch.zeros(2, 9)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "sampling", "message"),
    [
        (IDS[0], SamplingParams.of(2), r"ids: expected token ids \[2, K\], torch.int64, on cpu; got shape \[1\]"),
        (
            IDS[:1],
            SamplingParams.of(2),
            r"ids: expected token ids \[2, K\].* got shape \[1, 1\], torch.int64, on cpu\. Pad",
        ),
        (IDS.int(), SamplingParams.of(2), r"ids: .* got shape \[2, 1\], torch.int32, on cpu"),
        (IDS.to("meta"), SamplingParams.of(2), r"ids: .* torch.int64, on meta"),
        (IDS, SamplingParams.of(3), r"sampling: expected keys and settings for 2 rows on cpu"),
        (IDS, SamplingParams.of(2, top_k=10), r"top_k: expected at most 9, the width of the logits; got 10"),
    ],
)
def test_wrong_use_is_refused(ids: torch.Tensor, sampling: SamplingParams, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.draw_logprobs([X], sampling=sampling, ids=ids)
    with pytest.raises(InputError, match="weights: expected 1 finite numbers"):
        ops.draw_logprobs([X], (1.0, 2.0), sampling=SamplingParams.of(2), ids=IDS)
