"""Offsets and floors: for each implementation against the oracle, and what they are the same as.

Random ones are among the trials of `step`, `verify` and `draw_logprobs` (`support.decisions.random_combination`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import (
    ALL,
    MIXED,
    Case,
    RowsElsewhere,
    Run,
    check,
    logits,
    random_combination,
    random_keys,
    same,
    settings_for,
)

from proxytune import ops
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.formulas.shift import shift
from proxytune.ops import Combination

NAN, INF = float("nan"), float("inf")
WEIGHTS = (1.0, 1.5, -0.5, 0.0, 0.25, -1.0, 0.7, 2.0)


def keys(rows: int) -> dict[str, torch.Tensor]:
    return random_keys(np.random.default_rng(0), rows)


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", range(1, 9))
def test_one_to_eight_members(run: Run, slow_one: bool, members: int, device: str) -> None:
    rows, width = (2, 200) if slow_one else (6, 1100)
    widths = [width, max(1, width - 3), width + 70, width // 2, width, width - 9, width + 1, width]
    x = [z.to(device) for z in logits(rows, *widths[:members], seed=members, dtypes=MIXED)]
    weights: Any = WEIGHTS[:members]
    if members % 2 == 0:
        weights = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0])[torch.arange(rows * members) * 3 % 5].view(rows, members)
        weights[:, 0] = torch.tensor([1.0, 0.5, -0.5])[torch.arange(rows) % 3]
        weights = weights.to(device)
    combination = random_combination(np.random.default_rng(3 * members + 2), x, weights)
    floors = ops.floor_of_top(x[members // 2], 0.02)
    combination = replace(combination, floors=floors, floored_by=members // 2)
    case = Case(x, combination, settings_for(rows, width), keys(rows), 2)
    check(case, run).assert_rare()
    if not slow_one:
        check(replace(case, settings=None, draws=1), run)


@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_rows_take_their_own_offsets_and_floors(per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 3, 2100
    x = logits(rows, width, width - 40, 1500)
    weights: Any = torch.rand(rows, 3) if per_row else (1.0, 0.5, -0.5)
    combination = Combination(weights, torch.rand(rows, 3) * 9, ops.floor_of_top(x[1], 0.01), 1)
    case = Case(x, combination, settings_for(rows, width), keys(rows), 2)
    whole = case.step(ops.step)
    monkeypatch.setattr("proxytune.ops.torch_impl.rows._BLOCK", 1)  # a block is one tile of one row
    same(case.step(ops.step), whole)


# --- what it is the same as -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_a_neutral_combination_is_the_plain_weights_bit_for_bit(
    run: Run, slow_one: bool, per_row: bool, device: str
) -> None:
    rows, width = (2, 150) if slow_one else (6, 1100)
    x = [z.to(device) for z in logits(rows, width, width - 3, width + 9, dtypes=MIXED)]
    x[0][0, 3] = x[1][0, 5] = -INF
    x[1][-1, 4] = NAN
    weights: Any = (1.0, 0.5, -0.5)
    if per_row:
        weights = torch.tensor(weights, device=device).repeat(rows, 1)
        weights[1:, 1:] = 0.0  # a shut gate; NaN of a companion that has no say
    plain = Case(x, weights, settings_for(rows, width), keys(rows), 2)
    want = plain.step(run)
    nothing = torch.zeros(rows, 3, device=device), torch.full((rows,), -INF, device=device)
    for neutral in (Combination(weights), Combination(weights, *nothing, floored_by=2)):
        same(replace(plain, weights=neutral).step(run), want)
    if per_row:  # a shut row is the base, whatever is said of the companions
        offsets = torch.tensor([0.0, NAN, INF], device=device).repeat(rows, 1)
        offsets[0] = 0.0
        shut = replace(plain, weights=Combination(weights, offsets, nothing[1], floored_by=1)).step(run)
        same(shut, want)
        alone = replace(plain, members=x[:1], weights=(1.0,)).only(range(1, rows))
        same(shut, alone.step(run), rows=range(1, rows))


def test_a_floor_is_a_mask_on_the_base_but_for_the_divergence(run: Run, slow_one: bool, device: str) -> None:
    rows, width = (2, 150) if slow_one else (6, 1100)
    base, expert, anti = (z.to(device) for z in logits(rows, width, width - 3, width))
    floors = ops.floor_of_top(expert, 0.05)
    wide = torch.nn.functional.pad(expert, (0, 3), value=-INF)
    masked = base.masked_fill(wide < floors[:, None], -INF)
    got = Case([base, expert, anti], Combination((1.0, 1.5, -0.5), floors=floors, floored_by=1),
               settings_for(rows, width), keys(rows), 2).step(run)  # fmt: skip
    want = Case([masked, expert, anti], (1.0, 1.5, -0.5), settings_for(rows, width), keys(rows), 2).step(run)
    same(got, want, [name for name in ALL if name != "kl"])
    # The base's whole row counts: the mass that the mask forbids is lost.
    lost = ops.log_normalisers(base) - ops.log_normalisers(masked)
    torch.testing.assert_close(got.kl, want.kl + lost, rtol=0, atol=2e-5)  # type: ignore[operator]
    assert (lost > 0.1).all()


def test_log_probabilities_leave_the_law_and_move_the_logits(run: Run, slow_one: bool, device: str) -> None:
    rows, width = (2, 150) if slow_one else (6, 1100)
    x = [z.to(device) for z in logits(rows, width, width, width)]
    offsets = torch.stack([ops.log_normalisers(z) for z in x], 1)
    weights = (1.5, -0.5, 0.3)
    want = ("scores", "lse", "entropy")
    raw, logs = run(x, weights, want=want), run(x, Combination(weights, offsets), want=want)
    assert raw.scores is not None
    torch.testing.assert_close(raw.entropy, logs.entropy, rtol=0, atol=1e-4)
    moved = (offsets * torch.tensor(weights, device=device)).sum(1)
    torch.testing.assert_close(logs.lse, raw.lse - moved, rtol=0, atol=1e-4)  # type: ignore[operator]
    exact = sum(w * z.double().log_softmax(1) for w, z in zip(weights, x, strict=True))
    torch.testing.assert_close(logs.scores.double(), exact, rtol=0, atol=3e-5)  # type: ignore[union-attr, arg-type]


# --- bad values -------------------------------------------------------------------------------------------------------

# base, expert at one column (1 elsewhere); weights, offsets; the floor and whose; whether the row has a distribution
# left, and if so whether that column can be drawn.
BROKEN: list[tuple[float, float, tuple[float, float], tuple[float, float], float, int, str]] = [
    (1.0, 0.0, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "forbidden"),
    (1.0, 0.5, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "allowed"),  # at the floor
    (1.0, -INF, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "forbidden"),
    (1.0, -INF, (1.0, 0.5), (0.0, 0.0), -INF, 1, "allowed"),  # no floor
    (-INF, 2.0, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "forbidden"),
    (0.0, 2.0, (1.0, 0.5), (0.0, 0.0), 0.5, 0, "forbidden"),
    # NaN and +inf are not hidden by a floor, in whom it looks at, be it without a weight, or in others.
    (NAN, 0.0, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "bad"),
    (INF, 0.0, (1.0, 0.5), (0.0, 0.0), 0.5, 1, "bad"),
    (1.0, NAN, (1.0, 0.0), (0.0, 0.0), 0.5, 1, "bad"),
    (1.0, INF, (1.0, 0.0), (0.0, 0.0), 0.5, 1, "bad"),
    (0.0, NAN, (1.0, 0.5), (0.0, 0.0), 0.5, 0, "bad"),
    (0.0, NAN, (1.0, 0.0), (0.0, 0.0), 0.5, 0, "forbidden"),  # who has no say is not read
    (1.0, NAN, (1.0, 0.0), (0.0, 0.0), -INF, 1, "allowed"),
    (1.0, 1.0, (1.0, 0.5), (0.0, 0.0), NAN, 0, "bad"),
    (1.0, 1.0, (1.0, 0.5), (0.0, 0.0), INF, 0, "dead"),
    # An offset that is no number spoils the row of a member with a weight; −inf is that of a row of −inf.
    (1.0, 1.0, (1.0, 0.5), (NAN, 0.0), -INF, 0, "bad"),
    (1.0, 1.0, (1.0, 0.5), (0.0, NAN), -INF, 0, "bad"),
    (1.0, 1.0, (1.0, 0.5), (0.0, INF), -INF, 0, "bad"),
    (1.0, 1.0, (1.0, -0.5), (INF, 0.0), -INF, 0, "bad"),
    (1.0, 1.0, (1.0, 0.0), (0.0, NAN), -INF, 0, "allowed"),
    (1.0, 1.0, (1.0, 0.5), (-INF, -INF), -INF, 0, "allowed"),
]


@pytest.mark.parametrize("per_row", [False, True])
def test_what_is_broken_stays_visible(run: Run, per_row: bool, device: str) -> None:
    """Each line is a row of its own; the rows around it do not notice."""
    rows = len(BROKEN)
    base, expert = torch.ones(rows, 9, device=device), torch.ones(rows, 9, device=device)
    base[:, 5] = torch.tensor([x[0] for x in BROKEN])
    expert[:, 5] = torch.tensor([x[1] for x in BROKEN])
    weights = torch.tensor([x[2] for x in BROKEN], device=device)
    offsets, floors = torch.tensor([x[3] for x in BROKEN], device=device), torch.tensor([x[4] for x in BROKEN])
    floors = floors.to(device)
    for by in (0, 1):
        for numbers in {x[2] for x in BROKEN if not per_row} or {None}:
            lines = [i for i, x in enumerate(BROKEN) if x[5] == by and (per_row or x[2] == numbers)]
            if not lines:
                continue
            at = torch.tensor(lines, device=device)
            combination = Combination(weights[at] if per_row else numbers, offsets[at], floors[at], by)  # type: ignore[arg-type]
            got = run([base[at], expert[at]], combination, want=("tokens", "lse", "scores"))
            assert got.tokens is not None
            assert got.lse is not None
            assert got.scores is not None
            for i, line in enumerate(lines):
                fate = BROKEN[line][6]
                token, lse, z = int(got.tokens[i, 0]), float(got.lse[i]), float(got.scores[i, 5])
                assert (token == -1) == (fate in ("bad", "dead")), BROKEN[line]
                assert math.isnan(lse) == (fate == "bad"), BROKEN[line]
                if fate in ("allowed", "forbidden"):
                    assert math.isfinite(z) == (fate == "allowed"), BROKEN[line]
                    assert z == -INF or fate == "allowed"


# --- combine, a graph -------------------------------------------------------------------------------------------------


def test_combine_takes_the_base_s_weight_from_a_combination(run: Run, impl: str, device: str) -> None:
    x = [z.view(2, 2, -1).to(device) for z in logits(4, 120, 117, dtypes=MIXED)]
    flat = [z.flatten(0, 1) for z in x]
    combination = random_combination(np.random.default_rng(2), flat, torch.rand(4, 2, device=device) + 0.5)
    with np.errstate(all="ignore"):
        got = ops.combine(x, combination, impl=impl.partition(" ")[0])  # type: ignore[arg-type]
    assert torch.equal(got.flatten(0, 1), run(flat, combination, want=("scores",)).scores)
    assert got.shape == x[0].shape


def test_combine_in_a_graph_and_with_gradients() -> None:
    x = [z.view(2, 2, -1) for z in logits(4, 30, 27)]
    offsets = torch.rand(4, 2)
    combination = Combination((0.5, 1.5), offsets, ops.floor_of_top(x[1].flatten(0, 1), 0.3), 1)
    want = ops.combine(x, combination)
    torch._dynamo.reset()
    inside = torch.compile(lambda *z: ops.combine(z, combination), backend="eager", fullgraph=True)(*x)
    assert torch.equal(inside, want)
    with_graph = [z.clone().requires_grad_() for z in x]
    kept = ops.combine(with_graph, combination)
    assert torch.equal(kept, want)
    kept.logsumexp(-1).sum().backward()
    allowed = want > -INF
    for z, weight in zip(with_graph, (0.5, 1.5), strict=True):
        assert z.grad is not None
        assert z.grad.isfinite().all()
        live = allowed[..., : z.shape[-1]]
        assert (z.grad[~live] == 0).all()
        torch.testing.assert_close(z.grad.sum(-1), torch.full((2, 2), weight))


def test_a_step_with_a_combination_is_one_node_of_a_graph() -> None:
    x = logits(3, 150, 140, 160)
    combination = random_combination(np.random.default_rng(1), x, (1.0, 0.5, -0.5))
    combination = replace(combination, offsets=torch.rand(3, 3), floors=ops.floor_of_top(x[0], 0.01), floored_by=0)
    sampling, noise = ops.SamplingParams.of(3), ops.Noise.of(3, seed=1)

    def decide(*rows: torch.Tensor) -> Any:
        return ops.step(rows, combination, sampling=sampling, noise=noise, want=("tokens", "entropy")).tokens

    torch._dynamo.reset()
    assert torch.equal(torch.compile(decide, backend="aot_eager", fullgraph=True)(*x), decide(*x))


# --- what offsets and floors are taken from ---------------------------------------------------------------------------


def nucleus(row: Any, p: float) -> float:
    """The smallest logit of the nucleus, in float64, by a sort."""
    z = np.sort(row.astype(np.float64))[::-1]
    mass = np.exp(z - z[0])
    return float(z[np.searchsorted(np.cumsum(mass), p * mass.sum())])


@pytest.mark.parametrize("dtype", MIXED)
def test_normalisers_and_floors_against_float64(impl: str, slow_one: bool, dtype: torch.dtype, device: str) -> None:
    width = 140 if slow_one else 1100
    x = torch.cat([*logits(3, width), torch.zeros(4, width)])
    x[3] = x[3].index_fill(0, torch.tensor([7, 9, width - 20]), 4.0)  # ties inside, at the edge, and everywhere
    x[4] = -INF
    x[5, 8], x[6, width - 2] = NAN, INF
    x = x[2:] if slow_one else x
    x = x.to(dtype).to(device)
    bad, dead = x.isnan().any(1) | (x == INF).any(1), (x == -INF).all(1)
    good = ~(bad | dead)
    which: Any = impl.partition(" ")[0]
    z = x.double().cpu().numpy()
    nuclei = [(p, ops.floor_of_nucleus(x, p, which)) for p in ((0.9,) if slow_one else (0.9, 0.3, 1e-3))]
    for p, floors in nuclei:
        assert floors[good].tolist() == [nucleus(row, p) for row in z[good.cpu().numpy()]]
    top, lse = ops.floor_of_top(x, 0.1), ops.log_normalisers(x, which)
    torch.testing.assert_close(top[good].double(), x[good].double().amax(1) + math.log(0.1), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse[good].double(), x[good].double().logsumexp(1), rtol=0, atol=1e-5)
    assert torch.equal(ops.floor_of_top(x, 1)[good], x[good].float().amax(1))
    everything = ops.floor_of_nucleus(x, 1.0, which)
    assert (everything[good] == -INF).all()
    for found in (*(floors for _, floors in nuclei), top, lse, everything):
        assert found.dtype == torch.float32
        assert found.device == x.device
        assert found[bad].isnan().all()
        assert (found[dead] == -INF).all()


def test_a_floor_of_the_nucleus_allows_what_top_p_does(run: Run, impl: str, slow_one: bool, device: str) -> None:
    rows, width = (2, 300) if slow_one else (5, 2100)
    x = logits(rows, width, dtypes=(torch.bfloat16,), seed=5)[0].to(device)
    floors = ops.floor_of_nucleus(x, 0.8, impl.partition(" ")[0])  # type: ignore[arg-type]
    noise = ops.Noise.of(rows, seed=1, device=device)
    kept = run([x], sampling=ops.SamplingParams.of(rows, top_p=0.8, device=device), noise=noise, want=("kept",)).kept
    scores = run([x], Combination((1.0,), floors=floors), want=("scores",)).scores
    assert torch.equal((scores > -INF).sum(1), kept)  # type: ignore[operator]


def test_the_floor_of_the_nucleus_in_torch_s_way_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(4, 1500)[0]
    want = ops.floor_of_nucleus(x, 0.7)
    monkeypatch.setattr(importlib.import_module("proxytune.ops.offsets_and_floors"), "MemberRows", RowsElsewhere)
    assert torch.equal(ops.floor_of_nucleus(x, 0.7), want)


# --- wrong use --------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"offsets": torch.zeros(2)}, r"offsets: expected float32 \[2, 2\] on cpu, or None; got shape \[2\],.* Stack"),
        ({"offsets": torch.zeros(2, 3)}, r"offsets: .* got shape \[2, 3\], torch.float32, on cpu"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.float64)}, r"offsets: .* got shape \[2, 2\], torch.float64"),
        ({"offsets": torch.zeros(2, 2, device="meta")}, r"offsets: .* on meta"),
        ({"offsets": [0.0, 1.0]}, r"offsets: .* got a list"),
        ({"floors": torch.zeros(2, 1)}, r"floors: expected float32 \[2\] on cpu, or None; got shape \[2, 1\], .* Pass"),
        ({"floors": torch.zeros(3)}, r"floors: .* got shape \[3\]"),
        ({"floors": 0.1}, r"floors: .* got a float"),
        ({"floored_by": 2}, r"floored_by: expected a whole number of a member, from 0 to 1; got 2\. 0 is the base"),
        ({"floored_by": -1}, r"floored_by: .* got -1"),
        ({"weights": (1.0,)}, r"weights: expected 2 finite numbers.* got 1 numbers"),
        ({"weights": torch.ones(3, 2)}, r"weights: .* got shape \[3, 2\]"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(given: dict[str, Any], says: str) -> None:
    combination = Combination(**{"weights": (1.0, 0.5), **given})
    ids = torch.zeros(2, 1, dtype=torch.int64)
    sampling, noise = ops.SamplingParams.of(2), ops.Noise.of(2)
    calls: list[Callable[[], Any]] = [
        lambda: ops.step([X, X], combination),
        lambda: ops.combine([X, X], combination),
        lambda: ops.combine([X, X.clone().requires_grad_()], combination),
        lambda: ops.draw_logprobs([X, X], combination, sampling=sampling, ids=ids),
        lambda: ops.verify([X, X], combination, drafted=ids[:, :0], sampling=sampling, noise=noise),
    ]
    for call in calls:
        with pytest.raises(InputError, match=says):
            call()


def test_measures_refuse_what_they_cannot_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    for measure in (ops.log_normalisers, lambda x: ops.floor_of_top(x, 0.1), lambda x: ops.floor_of_nucleus(x, 0.9)):
        with pytest.raises(InputError, match=r"member 0: expected a tensor \[B, V\].*; got shape \[9\]"):
            measure(X[0])
        with pytest.raises(InputError, match=r"member 0: expected float32, float16 or bfloat16; got torch.float64"):
            measure(X.double())
    for share in (0.0, 1.5, NAN, "0.1"):
        with pytest.raises(InputError, match=r"share: expected a .*number in \(0, 1\]; got"):
            ops.floor_of_top(X, share)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"p: expected a .*number in \(0, 1\]; got"):
            ops.floor_of_nucleus(X, share)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedModeError, match="floor_of_nucleus: expected a call outside torch.compile"):
        ops.floor_of_nucleus(X, 0.9)


def test_the_rows_of_a_combination_can_be_picked() -> None:
    x = logits(4, 20, 20)
    whole = random_combination(np.random.default_rng(5), x, torch.rand(4, 2))
    whole = replace(whole, offsets=torch.rand(4, 2), floors=torch.rand(4))
    order = torch.tensor([3, 0, 0])
    z = ops.combine(x, whole)
    assert torch.equal(ops.combine([y[order] for y in x], whole.pick(order)), z[order])
    assert torch.equal(ops.combine([y[1:3] for y in x], whole.pick(slice(1, 3))), z[1:3])
    by_hand = shift(x[0], x[1:], whole.weights[:, 1:], whole.weights[:, 0], offsets=whole.offsets,  # type: ignore[call-overload, index]
                    floors=whole.floors, floored_by=whole.floored_by)  # fmt: skip
    assert torch.equal(by_hand, z)
