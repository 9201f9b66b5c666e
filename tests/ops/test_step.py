"""One decision against the float64 oracle, for each implementation: every output, in every shape that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.decisions import (
    ALL,
    MIXED,
    UNDRAWN,
    Case,
    Run,
    Tally,
    check,
    compare,
    logits,
    poisoned,
    random_case,
    random_keys,
    same,
    settings_for,
)

from proxytune import ops
from proxytune.ops import dispatch
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")


def keys(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_keys(np.random.default_rng(seed), rows)


# Around groups of 128 and tiles of 1024, one, two, a vocabulary of GPT-2's and one of Qwen's.
SMALL = [1, 2, 5, 127, 128, 129, 1000, 1023, 1024, 1025, 2049]
LARGE = [5000, 50257, 151936]


@pytest.mark.parametrize("width", SMALL + LARGE)
def test_the_matrix_of_members_dtypes_and_widths(run: Run, impl: str, slow_one: bool, width: int, device: str) -> None:
    if width > 5000 and impl != "torch" and device == "cpu":
        pytest.skip("the interpreter and a sort of all tokens are too slow for that width")
    if slow_one and width in (1000, 1023, 5000):
        pytest.skip("the interpreter is slow: the widths around it are enough")
    at = (SMALL + LARGE).index(width)
    every = not slow_one and width <= 5000  # every number of members, or one for each width
    tally = Tally()
    for m in range(1, 6) if every else [1 + (at + 2) % 5]:
        rows = 2 if slow_one and width > 1000 else 6 if every else 3
        # Companions in turn as wide, narrower, wider, and of half the width.
        widths = [width, width, max(1, width - 3), width + 70, max(1, width // 2)][:m]
        members = logits(rows, *widths, seed=at, dtypes=MIXED[m % 3 :] + MIXED[: m % 3])
        weights: Any = (1.0, 1.5, -0.5, 0.0, 0.25)[:m]
        if m % 2 == 0:  # per row, zeros and negatives among them
            weights = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0])[(torch.arange(rows * m) * 3 % 5)].view(rows, m)
            weights = weights.contiguous().to(device)
            weights[:, 0] = torch.tensor([1.0, 0.5, -0.5])[torch.arange(rows) % 3]
        members = [x.to(device) for x in members]
        case = Case(members, weights, settings_for(rows, width, forks=m > 2), keys(rows, m), min(width, 1 + m))
        tally += check(case, run)
        tally += check(replace(case, settings=None, draws=1), run)
    tally.assert_rare()


def test_random_trials(run: Run, slow_one: bool, device: str) -> None:
    g = np.random.default_rng(5)
    trials, widest = (5, 400) if slow_one else (150, 3000)
    tally = Tally()
    for _ in range(trials):
        tally += check(random_case(g, widest, device), run)
    tally.assert_rare()


@pytest.mark.parametrize("kind", ["padded", "offset", "expanded", "every other row", "one column"])
def test_rows_lie_anywhere_in_memory(run: Run, slow_one: bool, kind: str, device: str) -> None:
    """Everything around the rows is NaN, so that one element too far would show."""
    rows, width = 3, 140 if slow_one else 1100
    members = [x.to(device) for x in logits(rows, width, width - 9, width + 99, dtypes=MIXED)]
    if kind == "padded":
        members = [poisoned(x, pad=1) for x in members]
    elif kind == "offset":  # starts that are no multiple of anything
        members = [poisoned(x, pad=5, start=i + 1) for i, x in enumerate(members)]
    elif kind == "expanded":
        members = [members[0], *(x[1:2].expand(rows, -1) for x in members[1:])]
    elif kind == "every other row":
        members = [poisoned(x.repeat_interleave(2, 0), pad=7)[::2] for x in members]
    else:  # an inner stride of anything, where there is one column
        members = [poisoned(x[:, :1].repeat(1, 4))[:, ::4] for x in members]
    case = Case(members, (1.0, 0.5, -0.5), settings_for(rows, members[0].shape[1]), keys(rows), 1)
    check(case, run)
    contiguous = replace(case, members=[x.contiguous() for x in members])
    same(case.step(run), contiguous.step(run))


@pytest.mark.parametrize("part", ["weights", "settings", "keys"])
def test_weights_settings_and_keys_lie_anywhere_in_memory(run: Run, part: str, device: str) -> None:
    rows, width = 3, 300
    members = [x.to(device) for x in logits(rows, width, width)]
    weights = torch.tensor([[1.0, 0.5], [1.0, -2.0], [0.5, 0.0]], device=device)
    sampling = SamplingParams.of(
        rows, temperature=torch.tensor([0.5, 1.0, 2.0]), top_k=torch.tensor([0, 7, 30]), device=device
    )
    noise = Noise.of(rows, seed=3, device=device)
    if part == "keys":
        noise = noise.at(torch.tensor([4, 5, 6], device=device))

    def call() -> Any:
        return run(members, weights, sampling=sampling, noise=noise, draws=3, want=ALL)

    plain = call()
    if part == "weights":
        weights = torch.stack([weights, weights + NAN], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
        assert not weights.is_contiguous()
    elif part == "settings":
        strided = torch.stack([sampling.temperature, sampling.temperature * NAN], -1)[:, 0]
        sampling = replace(sampling, temperature=strided)
    else:  # a column of a table of positions, which is what a loop may well have
        noise = noise.at(torch.tensor([[4, 99], [5, 99], [6, 99]], device=device)[:, 0])
    same(call(), plain)


# --- masks and ties ---------------------------------------------------------------------------------------------------


def _mask(x: torch.Tensor, kind: str) -> torch.Tensor:
    rows, width = x.shape
    x = x.clone()
    if kind == "some":
        x[torch.rand(rows, width, generator=torch.Generator().manual_seed(1)) < 0.3] = -INF
    elif kind == "all but one":
        keep = x[torch.arange(rows), torch.arange(rows) * 31 % width].clone()
        x.fill_(-INF)
        x[torch.arange(rows), torch.arange(rows) * 31 % width] = keep
    elif kind == "whole tiles":
        x[:, :1024] = -INF
        x[1:, 1024 + 128 : 1024 + 256] = -INF
    elif kind == "all but the last column":
        x[:, :-1] = -INF
    else:
        x.fill_(-INF)
    return x


@pytest.mark.parametrize("kind", ["some", "all but one", "whole tiles", "all but the last column", "all"])
@pytest.mark.parametrize("whose", ["base", "companion"])
def test_masks(run: Run, slow_one: bool, kind: str, whose: str, device: str) -> None:
    if slow_one and whose == "companion" and kind not in ("some", "all"):
        pytest.skip("the interpreter is slow: two of them are enough")
    rows, width = (3, 1300) if slow_one else (5, 2100)
    base, expert, anti = logits(rows, width, width, width, seed=2)
    if whose == "base":
        base = _mask(base, kind)
    else:
        expert = _mask(expert, kind)
    members = [x.to(device) for x in (base, expert, anti)]
    case = Case(members, (1.0, 1.0, -1.0), settings_for(rows, width), keys(rows), 3)
    got = case.step(run)
    check(case, run)
    assert got.tokens is not None
    if whose == "base" and kind == "all":
        assert (got.tokens == -1).all()
    elif whose == "companion":
        assert (got.tokens[:, 0] >= 0).all()
        if kind == "all":  # an expert without an opinion anywhere: the base alone, to the bit
            assert torch.equal(got.scores, members[0])  # type: ignore[arg-type]
    else:
        drawn = got.tokens.cpu()
        assert (base.gather(1, drawn.clamp(min=0))[drawn >= 0] > -INF).all()


@pytest.mark.parametrize("width", [130, 2200])
def test_the_argmax_is_the_first_of_equal_ones(run: Run, width: int, device: str) -> None:
    x = torch.zeros(5, width, device=device)
    x[1, 7:] = 1.0
    x[2, -1] = 1.0
    x[3, [100, 129, width - 1]] = 2.0  # in two groups, and in the last tile
    x[4, :] = -0.0
    x[4, 5] = 0.0  # equal to all others
    case = Case([x], (1.0,))
    got = case.step(run)
    check(case, run)
    assert got.argmax is not None
    assert got.tokens is not None
    assert got.argmax.tolist() == [0, 7, width - 1, 100, 0]
    assert got.tokens[:, 0].tolist() == got.argmax.tolist()


def test_the_confidence_of_few_tokens_and_of_ties(run: Run, device: str) -> None:
    x = torch.full((4, 300), -INF, device=device)
    x[0, ::100] = torch.tensor([1.0, 2.0, 3.0], device=device)  # fewer than 20: of those that are left
    x[1] = 0.5  # all the same: log V
    x[2, :20] = 4.0
    x[2, 20:] = -50.0
    x[3, :19] = 4.0  # the 20th is one of many
    x[3, 19:] = 1.0
    got = run([x], want=("confidence", "entropy"))
    p = torch.tensor([1.0, 2.0, 3.0]).double().log_softmax(0)
    z = torch.tensor([4.0] * 19 + [1.0] * 281).double().log_softmax(0)
    expected = [float(-p.mean()), np.log(300), np.log(20), float(-z[:20].mean())]
    np.testing.assert_allclose(got.confidence.cpu(), expected, atol=1e-6)  # type: ignore[union-attr]


# --- bad rows ---------------------------------------------------------------------------------------------------------


def _bad_batch(width: int) -> tuple[list[torch.Tensor], torch.Tensor, list[int], list[int]]:
    """Members, weights, the rows that are bad, and the rows that have to be as if nothing had happened."""
    base, expert, anti = logits(14, width, width, width + 100, seed=4)
    w = torch.tensor([1.0, 0.7, -0.7]).repeat(14, 1)
    at = width - 3
    base[1, at] = NAN
    base[2, at] = INF
    expert[3, at] = NAN
    expert[4, at] = INF
    anti[5, at] = INF  # times a negative weight: no mask
    expert[6, at], w[6, 1] = NAN, 0.0
    expert[7, at] = NAN
    base[7, at] = -INF
    expert[8, at], anti[8, at] = NAN, -INF  # one without an opinion silences the other
    expert[9, at] = anti[9, at] = INF
    base[10] = -INF
    expert[10] = NAN
    anti[11, width + 50] = NAN  # past the base's width
    base[12, at], w[12, 0] = INF, 0.0  # the base counts whatever its weight
    base[13, at], w[13, 0] = -INF, -2.0  # forbidden under a negative weight as well
    return [base, expert, anti], w, [1, 2, 3, 4, 5, 9, 12], [0, 6, 7, 8, 11, 13]


@pytest.mark.parametrize("sampled", [True, False])
def test_bad_rows_say_so_and_their_neighbours_do_not_notice(
    run: Run, slow_one: bool, sampled: bool, device: str
) -> None:
    width = 140 if slow_one else 1200
    members, weights, bad, good = _bad_batch(width)
    members, weights = [x.to(device) for x in members], weights.to(device)
    settings = settings_for(14, width, forks=True) if sampled else None
    case = Case(members, weights, settings, keys(14), 2 if sampled else 1)
    got = case.step(run)
    check(case, run)
    for name in ALL if sampled else UNDRAWN:
        x = getattr(got, name)
        assert x is not None
        if name in ("tokens", "argmax"):
            assert (x[bad] == -1).all(), name
            assert (x[[10]] == -1).all(), name
            assert (x[good] >= 0).all(), name
        elif name == "kept":
            assert (x[bad] == 0).all()
            assert (x[good] > 0).all()
        elif name == "fork":
            assert not x[[*bad, 10]].any()
        elif name != "scores":
            assert x[bad].isnan().all(), name
            assert x[good].isfinite().all(), name
            assert (x[10] == -INF if name == "lse" else x[10].isnan()).all(), name
    # Without the numbers that are to be ignored, and with neighbours that are well, the good rows are the same.
    clean = [torch.where(x < INF, x, 0.0) for x in members]
    same(got, replace(case, members=clean).only(good).step(run), ALL if sampled else UNDRAWN, good)


def test_a_whole_tile_of_finite_numbers_and_one_that_holds_others_are_measured_alike(run: Run, device: str) -> None:
    members = logits(6, 1030, 1030, 1100, seed=5)
    base, expert, anti = members
    weights = torch.tensor([1.0, 0.7, -0.7]).repeat(6, 1)
    expert[0, 5], weights[0, 1] = NAN, 0.0  # heard by nobody
    base[1, 5] = -INF
    expert[2, 5] = -INF  # silent, not forbidden
    anti[3, 5] = -INF
    base[4, ::2], weights[4] = torch.finfo(torch.float32).min, torch.tensor([0.5, 0.0, 0.0])
    base[5, 5], expert[5, 5], anti[5, 5] = -0.0, -0.0, 0.0
    settings = {"temperature": 0.7, "fork_threshold": 3.0, "fork_temperature": 1.0}
    case = Case([x.to(device) for x in members], weights.to(device), settings, keys(6))
    got = case.step(run)
    compare(case, got, case.truth())
    expert[0, 5] = 0.0
    same(got, replace(case, members=[x.to(device) for x in members]).only([0]).step(run), ALL, [0])


def test_no_shift_past_the_end_of_a_companion_that_has_no_weight_in_a_row(run: Run, device: str) -> None:
    """Only companions with a weight have a say in where the shift ends: row 0 has none for the narrow one."""
    base, wide, narrow = (x.to(device) for x in logits(2, 40, 40, 30, seed=6))
    weights = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, -1.0]], device=device)
    case = Case([base, wide, narrow], weights, settings_for(2, 40), keys(2), 4)
    check(case, run)
    scores = case.step(run, ["scores"]).scores
    assert scores is not None
    assert torch.equal(scores[0], base[0] + 2.0 * wide[0])
    assert torch.equal(scores[1, 30:], base[1, 30:])


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["±1e4", "a spread of 1e30", "the ends of float16", "tiny differences", "one has all"])
def test_extreme_logits(run: Run, slow_one: bool, kind: str, device: str) -> None:
    rows, width = (3, 1210) if slow_one else (6, 1500)  # two tiles
    (x,) = logits(rows, width, seed=8)
    if kind == "±1e4":
        x = x.sign() * 1e4 + x
    elif kind == "a spread of 1e30":
        x = torch.where(x > 3.0, x, x * 1e30)
        x[0] = torch.linspace(-1e30, 1e30, width)
    elif kind == "the ends of float16":
        x = x.sign().mul(65504.0).half()
    elif kind == "tiny differences":
        x = 1.0 + x * 1e-7
    else:  # what is drawn after the first follows the law among those that have no mass in float32
        x[:, 1200] = 2000.0
        x[1, 3] = 1999.0
    case = Case([x.to(device)], (1.0,), settings_for(rows, width), keys(rows), 4)
    check(case, run).assert_rare()
    got = case.step(run)
    for name in ("lse", "entropy", "varentropy", "kl", "confidence", "temperature"):
        assert getattr(got, name).isfinite().all(), name
    drawn = got.tokens >= 0  # type: ignore[operator]
    for name in ("logprobs", "draw_logprobs", "keys"):
        assert torch.equal(getattr(got, name).isfinite(), drawn), name


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures(run: Run, slow_one: bool, temperature: float, device: str) -> None:
    rows, width = (5, 410) if slow_one else (6, 1300)
    (x,) = logits(rows, width, seed=9)
    x[:, 200:400] = -INF
    settings = settings_for(rows, width) | {"temperature": temperature}
    case = Case([x.to(device)], (1.0,), settings, keys(rows), 5)
    check(case, run)
    got = case.step(run, ["tokens"]).tokens
    assert got is not None
    assert not ((got >= 200) & (got < 400)).any()
    if temperature == 1e-6:
        assert torch.equal(got[:, 0].cpu(), x.argmax(1))


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6, 1e37])
@pytest.mark.parametrize("truncated", [False, True])
def test_masked_tokens_are_never_drawn_however_many_are_asked_for(
    run: Run, temperature: float, truncated: bool, device: str
) -> None:
    x = torch.full((2, 2100), -INF, device=device)
    x[0, [5, 1023, 2099]] = torch.tensor([1.0, -2.0, 3.0], device=device)
    x[1, 1500] = -1e4
    sampling = SamplingParams.of(
        2, temperature=temperature, min_p=1e-30 if truncated and temperature > 1 else 0.0, device=device
    )
    noise = Noise.of(2, seed=-1, device=device)
    got = run(
        [x], sampling=sampling, noise=noise, draws=6, want=("tokens", "keys", "logprobs", "draw_logprobs", "kept")
    )
    tokens = got.tokens
    assert tokens is not None
    assert sorted(tokens[0].tolist()) == [-1, -1, -1, 5, 1023, 2099]
    assert tokens[0, 3:].tolist() == [-1, -1, -1]
    assert tokens[1].tolist() == [1500, -1, -1, -1, -1, -1]
    assert got.kept is not None
    assert got.kept.tolist() == [3, 1]
    for x in (got.keys, got.logprobs, got.draw_logprobs):
        assert x is not None
        assert torch.equal(x > -INF, tokens >= 0)


def test_logits_at_the_end_of_float32_are_no_masks(run: Run, device: str) -> None:
    """Some models mask with the lowest finite number: beside real logits it has no mass, but it can be drawn."""
    lowest = torch.finfo(torch.float32).min
    x = torch.full((2, 1100), lowest, device=device)
    x[0, 3], x[1, [2, 1050]] = 1.0, torch.tensor([0.0, 0.5], device=device)
    got = run([x], want=("tokens", "lse", "entropy", "kl", "varentropy", "argmax"))
    assert got.tokens is not None
    assert got.tokens[:, 0].tolist() == [3, 1050]
    for name in ("lse", "entropy", "kl", "varentropy"):
        assert getattr(got, name).isfinite().all(), name


# --- a row on its own -------------------------------------------------------------------------------------------------


def _batch(device: str, width: int = 1100) -> Case:
    rows = 17
    members = logits(rows, width, width - 100, width + 100, seed=10, dtypes=MIXED)
    members[0][3] = -INF
    members[0][5, 7] = NAN
    members[0][8] = 0.0  # flat: the widest of candidates beside narrow ones
    weights = torch.tensor([[1.0, 0.5, -0.5], [0.5, 0.0, 2.0]]).repeat(9, 1)[:rows].contiguous()
    settings = settings_for(rows, width, forks=True)
    settings["top_p"][8] = 0.99
    return Case([x.to(device) for x in members], weights.to(device), settings, keys(rows, 2), 3)


def test_a_row_does_not_depend_on_its_batch(run: Run, slow_one: bool, device: str) -> None:
    """Bit for bit in batches of 1, 3 and 17, of rows with other settings, bad ones among them."""
    case = _batch(device, 300 if slow_one else 1100)
    whole = case.step(run)
    for rows in ([0], [1], [2], [4], [8], [10], [3, 8, 0], [16, 5, 4], [8, 1, 9])[:: 2 if slow_one else 1]:
        same(whole, case.only(rows).step(run), rows=rows)


def test_rows_permute(run: Run, slow_one: bool, device: str) -> None:
    case = _batch(device, 300 if slow_one else 1100).only([0, 2, 3, 5, 8, 9, 10])
    order = [4, 0, 6, 2, 5, 1, 3]
    same(case.step(run), case.only(order).step(run), rows=order)


def test_without_settings_a_row_does_not_depend_on_its_batch(run: Run, slow_one: bool, device: str) -> None:
    case = replace(_batch(device, 300 if slow_one else 1100), settings=None, draws=1)
    whole = case.step(run)
    for rows in ([0], [8], [3, 8, 0]):
        same(whole, case.only(rows).step(run), rows=rows)


def test_numbers_are_weights_of_every_row(run: Run, device: str) -> None:
    members = [x.to(device) for x in logits(3, 300, 280, 310, dtypes=MIXED)]
    case = Case(members, (1.0, 0.3, -1.7), settings_for(3, 300), keys(3), 2)
    tensor = torch.tensor([[1.0, 0.3, -1.7]], device=device).repeat(3, 1)
    same(case.step(run), replace(case, weights=tensor).step(run))


def test_noise_depends_on_every_part_of_its_key(run: Run, device: str) -> None:
    x = torch.zeros(1, 2000, device=device)
    sampling = SamplingParams.of(1, device=device)
    alone = {"seed": 1, "row": torch.tensor([2]), "position": 3, "branch": 4}
    seen = set()
    for change in ({}, {"seed": 2}, {"seed": 1 + 2**32}, {"row": torch.tensor([3])}, {"position": 4}, {"branch": 5}):
        noise = Noise.of(1, device=device, **(alone | change))
        got = run([x], sampling=sampling, noise=noise, draws=3).tokens
        assert got is not None
        seen.add(tuple(got[0].tolist()))
    assert len(seen) == 6


def test_the_first_of_many_draws_is_the_only_one_of_one(run: Run, slow_one: bool, device: str) -> None:
    case = _batch(device, 300 if slow_one else 1100).only([0, 1, 2, 4, 6, 7])
    many, one = (replace(case, draws=n).step(run, ["tokens", "keys"]) for n in (5, 1))
    assert torch.equal(many.tokens[:, :1], one.tokens)  # type: ignore[index, arg-type]
    assert torch.equal(many.keys[:, :1], one.keys)  # type: ignore[index, arg-type]


def test_drawing_everything_is_a_permutation_of_the_support(run: Run, slow_one: bool, device: str) -> None:
    width = 20 if slow_one else 1100
    (x,) = logits(4, width)
    x[:, ::3] = -INF
    case = Case([x.to(device)], (1.0,), {"top_k": torch.tensor([0, 0, width // 2, width])}, keys(4), width)
    check(case, run).assert_rare()


def test_what_is_asked_for_does_not_change_what_is_found(run: Run, slow_one: bool, device: str) -> None:
    case = _batch(device, 150 if slow_one else 1100).only([0, 2, 3] if slow_one else [0, 1, 2, 3, 5])
    whole = case.step(run)
    for want in [(name,) for name in ALL] + [("tokens", "entropy"), ("scores", "keys"), ("kl", "lse"), ()]:
        got = case.step(run, want)
        assert {name for name in ALL if getattr(got, name) is not None} == set(want)
        same(got, replace(whole, **{name: None for name in ALL if name not in want}))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nan", "huge", "-inf"])
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fresh memory holds the worst there is. Gives a list that holds how many tensors there were."""
    value = {"nan": NAN, "huge": 3e38, "-inf": -INF}[request.param]
    count = [0]

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def new(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            count[0] += 1
            if x.dtype == torch.bool:
                return x.fill_(True)
            if x.is_floating_point():
                return x.fill_(min(value, torch.finfo(x.dtype).max) if value == value else value)
            return x.fill_(torch.iinfo(x.dtype).max // 2)

        return new

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    return count


def test_nothing_of_what_memory_held_before_comes_out(
    run: Run, impl: str, slow_one: bool, poison: list[int], device: str
) -> None:
    width = 300 if slow_one else 1100
    members = [poisoned(x.to(device)) for x in logits(6, width, width - 50, width + 50, seed=12, dtypes=MIXED)]
    members[0][3] = -INF
    case = Case(members, (1.0, 0.5, -0.5), settings_for(6, width, forks=True), keys(6), 3)
    check(case, run)
    check(replace(case, settings=None, draws=1), run)
    if impl == "triton":
        assert poison[0] > 0  # the kernels' outputs and workspaces did come from here


def test_inputs_are_read_only(run: Run, device: str) -> None:
    case = _batch(device, 300).only([0, 1, 2, 3, 5])
    sampling = SamplingParams.of(5, device=device, **case.settings)  # type: ignore[arg-type]
    noise = Noise.of(5, device=device, **case.keys)  # type: ignore[arg-type]
    tensors = [*case.members, case.weights]
    tensors += [x for s in (sampling, noise) for x in vars(s).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]  # type: ignore[union-attr]
    run(case.members, case.weights, sampling=sampling, noise=noise, draws=2, want=ALL)
    for x, was in zip(tensors, before, strict=True):
        assert torch.equal(torch.as_tensor(x).nan_to_num(nan=7e7), was.nan_to_num(nan=7e7))


def test_scores_are_of_one_s_own(run: Run, device: str) -> None:
    """Asked for alone, of the base alone: still not the base's own memory."""
    (base,) = logits(2, 50)
    base = base.to(device)
    scores = run([base], want=("scores",)).scores
    assert scores is not None
    assert scores.is_contiguous()
    assert torch.equal(scores, base)
    scores.fill_(0.0)
    assert base.abs().sum() > 0


# --- the combination --------------------------------------------------------------------------------------------------


def test_scores_are_within_rounding_of_float64(run: Run, device: str) -> None:
    members = logits(3, 700, 650, 720, 700, 690, seed=13, dtypes=MIXED)
    weights = (1.0, 0.5, -0.7, 1.3, -0.2)
    scores = run([x.to(device) for x in members], weights, want=("scores",)).scores
    assert scores is not None
    table = np.tile(np.array(weights, np.float32), (3, 1))
    exact = oracle.combine([x.float().numpy() for x in members], table, np.float64)
    # Nine roundings, each of half a unit of the largest number that was added.
    sizes = oracle.combine([x.float().abs().numpy() for x in members], abs(table), np.float64)
    assert (abs(scores.cpu().numpy() - exact) <= 9 * oracle.UNIT * sizes).all()


# --- which implementation ---------------------------------------------------------------------------------------------


def test_auto_on_the_cpu_imports_no_triton() -> None:
    program = (
        "import sys, torch, proxytune.ops as ops\n"
        "from proxytune.ops.noise import Noise\nfrom proxytune.ops.sampling_params import SamplingParams\n"
        "got = ops.step([torch.zeros(2, 9)], sampling=SamplingParams.of(2, top_k=3), noise=Noise.of(2))\n"
        "assert got.tokens.shape == (2, 1)\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('triton', 'proxytune_kernels')])"
    )
    for asked in ({}, {"TRITON_INTERPRET": "1"}):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | asked
        out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"


def test_the_implementation_asked_for_is_the_one_that_runs(
    run: Run, impl: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the other implementation ran")

    monkeypatch.setattr(dispatch, "decide" if impl == "triton" else "kernels", fail)
    x = torch.zeros(2, 9, device=device)
    run([x], sampling=SamplingParams.of(2, device=device), noise=Noise.of(2, device=device), want=ALL)
    with pytest.raises(AssertionError, match="the other implementation ran"):  # the control
        ops.step([x], impl="torch" if impl == "triton" else "triton")
