"""What is kept is what transformers keeps: temperature, top-k, top-p, min-p, with the same settings in the same order.

The kept set is read off the contract itself, by drawing more tokens than there are. Two differences are meant, and are
tested as such: of tokens that tie at the boundary of top-p transformers keeps an arbitrary part, we keep all; and
where the cumulated mass comes within 1e-6 of p, float32 decides, and may decide differently: these cases are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.decisions import Run, random_keys
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

INF = float("inf")


@dataclass
class Setting:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def warp(self, x: torch.Tensor) -> torch.Tensor:
        """transformers' own chain, in the order in which `generate()` puts it."""
        chain = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            chain.append(MinPLogitsWarper(self.min_p))
        return chain(torch.zeros(1, 1, dtype=torch.long), x[None])[0]

    def near(self, x: torch.Tensor) -> bool:
        """Whether a mass is within 1e-6 of top-p, or a probability that close to min-p, so that rounding decides."""
        s = (x / self.temperature).double()
        if self.top_k:
            s = s.masked_fill(s < s.topk(self.top_k).values[-1], -INF)
        if self.top_p < 1:
            masses = s.softmax(0).sort(descending=True).values.cumsum(0)
            p = float(np.float32(self.top_p))
            if bool(((masses - p).abs() < 1e-6).any()):
                return True
        ratio = (s[s < s.max()] - s.max()).exp()  # the largest always stays
        return self.min_p > 0 and bool(((ratio / float(np.float32(self.min_p)) - 1).abs() < 1e-6).any())


def draw_all(run: Run, x: torch.Tensor, settings: list[Setting], draws: int) -> Any:
    rows = len(settings)
    columns = {
        name: torch.tensor([getattr(s, name) for s in settings]) for name in ("temperature", "top_k", "top_p", "min_p")
    }
    return run(
        [x],
        sampling=SamplingParams.of(rows, device=x.device, **columns),
        noise=Noise.of(rows, device=x.device, **random_keys(np.random.default_rng(0), rows)),
        draws=draws,
        want=("tokens", "kept", "draw_logprobs"),
    )


def assert_as_transformers(run: Run, x: torch.Tensor, settings: list[Setting], *, draws: int | None = None) -> int:
    """Kept sets and renormalised log-probabilities; returns how many rows were too close to call.

    `draws` are as many as there are kept tokens at most, and one more to see that there are not more.
    """
    rows, width = x.shape
    warped = [s.warp(row) for s, row in zip(settings, x, strict=True)]
    sizes = [int((w > -INF).sum()) for w in warped]
    got = draw_all(run, x, settings, min(width, max(sizes) + 1) if draws is None else draws)
    close = 0
    for b in range(rows):
        ids = got.tokens[b][got.tokens[b] >= 0]
        if settings[b].near(x[b]):
            close += 1
            continue
        assert int(got.kept[b]) == sizes[b], settings[b]
        expected = (warped[b] > -INF).nonzero()[:, 0]
        if draws is None:
            assert torch.equal(ids.sort().values, expected), settings[b]
        else:
            assert torch.isin(ids, expected).all()
        # Float32 on both sides: a dozen units of rounding, of numbers the size of the logits.
        size = float(warped[b][expected].abs().max())
        expected_logp = warped[b].double().log_softmax(0)[ids]
        off = (got.draw_logprobs[b, : len(ids)].double() - expected_logp).abs()
        assert float(off.max()) <= 16 * 2**-24 * (2 + size), settings[b]
    return close


def rows_of(kind: str, rows: int, width: int, device: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=g) * {"wide": 4.0, "flat": 0.01}.get(kind, 1.5)
    if kind == "coarse":  # a bfloat16 model's logits: ties everywhere
        x = x.bfloat16().float()
    elif kind == "masked":
        x[:, ::2] = -INF
    return x.to(device)


@pytest.mark.parametrize("kind", ["wide", "flat", "normal", "masked"])
@pytest.mark.parametrize("width", [7, 300, 1500])
def test_every_setting_alone_and_all_together(run: Run, slow_one: bool, kind: str, width: int, device: str) -> None:
    if slow_one and (width == 1500 or kind == "flat"):
        pytest.skip("as many draws as tokens take the interpreter minutes")
    settings = [
        Setting(),
        Setting(top_k=1),
        Setting(top_k=min(5, width)),
        Setting(top_p=0.5),
        Setting(top_p=0.95, temperature=0.3),
        Setting(min_p=0.1),
        Setting(min_p=1.0),
        Setting(top_k=min(50, width), top_p=0.8, min_p=0.01, temperature=1.3),
        Setting(top_p=0.9, min_p=0.3),
        Setting(top_k=min(4, width), top_p=0.4),
        Setting(top_p=1e-6),
        Setting(top_k=min(3, width), min_p=1e-3, temperature=5.0),
    ]
    if slow_one:  # rows that keep hundreds of tokens are drawn from a few times only
        assert_as_transformers(run, rows_of(kind, 12, width, device), settings, draws=min(width, 6))
        return
    close = assert_as_transformers(run, rows_of(kind, 12, width, device), settings)
    assert close <= 1


@pytest.mark.parametrize("width", [129, 1300])
def test_k_from_one_to_all(run: Run, slow_one: bool, width: int, device: str) -> None:
    """Below and above the number of groups of 128 columns, of candidates looked at first, and all there is."""
    ks = [1, 2, width // 128 + 1, width // 128 + 2, 31, 33, 128, width - 1, width]
    if slow_one:
        ks = [1, width // 128 + 2, 33, width]
    settings = [Setting(top_k=k, temperature=0.7 + 0.1 * i) for i, k in enumerate(ks)]
    x = rows_of("normal", len(ks), width, device)
    assert assert_as_transformers(run, x, settings, draws=8 if slow_one else None) == 0


def test_p_from_nothing_to_all(run: Run, slow_one: bool, device: str) -> None:
    width = 500 if slow_one else 2500
    ps = [1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999, 0.99999, 1 - 2**-24]
    ps = ps[::2] if slow_one else ps
    x = rows_of("wide", len(ps), width, device)
    # At 1 − 2⁻²⁴ the tail's masses are all within 1e-6 of p, and at 0.99999 they may be.
    assert assert_as_transformers(run, x, [Setting(top_p=p) for p in ps], draws=8 if slow_one else None) <= 2


def test_min_p_from_nothing_to_all(run: Run, slow_one: bool, device: str) -> None:
    width = 200 if slow_one else 2500
    ms = [1e-30, 1e-9, 1e-4, 0.01, 0.5, 0.999, 1.0]
    x = rows_of("wide", len(ms), width, device)
    assert assert_as_transformers(run, x, [Setting(min_p=m) for m in ms], draws=8 if slow_one else None) == 0


@pytest.mark.parametrize("k", [1, 3, 100, 199])
def test_massive_ties_at_the_boundary_of_top_k_are_all_kept(run: Run, slow_one: bool, k: int, device: str) -> None:
    """transformers keeps them too: it masks what is below the k-th."""
    width = 200 if slow_one else 1500
    x = torch.zeros(3, width, device=device)
    x[0, 5] = 1.0
    x[1, ::2] = 2.0
    x[2] = rows_of("coarse", 1, width, device)[0].round()
    draws = 6 if slow_one else None
    assert assert_as_transformers(run, x, [Setting(top_k=k)] * 3, draws=draws) == 0
    kept = draw_all(run, x, [Setting(top_k=k)] * 3, 1).kept
    assert kept[0] == (1 if k == 1 else width)


def test_ties_of_top_p_are_all_kept_where_transformers_keeps_some(run: Run, slow_one: bool, device: str) -> None:
    width = 100 if slow_one else 1000
    flat = torch.zeros(1, width, device=device)
    some = (Setting(top_p=0.35).warp(flat[0]) > -INF).sum()
    assert 0.34 * width <= int(some) <= 0.36 * width  # an arbitrary third of equals
    got = draw_all(run, flat, [Setting(top_p=0.35)], 1)
    assert int(got.kept[0]) == width
    # In coarse logits: ours is theirs and what ties with its smallest.
    x = rows_of("coarse", 6, width, device)
    settings = [Setting(top_p=p) for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)]
    got = draw_all(run, x, settings, 1)
    close = 0
    for b, s in enumerate(settings):
        if s.near(x[b]):
            close += 1
            continue
        theirs = s.warp(x[b]) > -INF
        assert int(got.kept[b]) == int((x[b] >= x[b][theirs].min()).sum())
        assert int(got.kept[b]) >= int(theirs.sum())
    assert close <= 1


def test_a_flat_row_keeps_nearly_all_of_the_vocabulary(run: Run, slow_one: bool, device: str) -> None:
    """Where the first candidates are far from enough, beside a row for which one is."""
    width = 2100 if slow_one else 20_000
    x = rows_of("flat", 3, width, device)
    x[1, 17] = 50.0
    settings = [Setting(top_p=0.9), Setting(top_p=0.9), Setting(top_k=width * 3 // 4, top_p=0.95, min_p=0.5)]
    got = draw_all(run, x, settings, 1)
    expected = [(s.warp(row) > -INF).sum() for s, row in zip(settings, x, strict=True)]
    assert int(got.kept[1]) == 1
    for b in (0, 2):  # each token has a mass of 5e-5, but float32's cumulated sums are off by some 1e-6 on their side
        assert abs(int(got.kept[b]) - int(expected[b])) <= 1
        assert int(got.kept[b]) > width // 2


@pytest.mark.parametrize("width", [1500])
def test_random_settings_row_by_row_in_one_batch(run: Run, slow_one: bool, width: int, device: str) -> None:
    g = np.random.default_rng(3)
    rows = 8 if slow_one else 60
    width = 300 if slow_one else width
    x = torch.cat([rows_of(kind, rows // 4, width, device) for kind in ("wide", "flat", "normal", "masked")])
    live = width // 2  # of masked rows; transformers' top-k takes −inf as a tie beyond
    settings = []
    for _ in range(rows):
        on = g.random(3) < 0.5  # an eighth of the rows has none
        settings.append(
            Setting(
                temperature=float(np.float32(np.exp(g.uniform(-1.5, 1.5)))),
                top_k=int(g.integers(1, live)) if on[0] else 0,
                top_p=float(np.float32(g.uniform(0.05, 1.0))) if on[1] else 1.0,
                min_p=float(np.float32(np.exp(g.uniform(-8, 0)))) if on[2] else 0.0,
            )
        )
    close = assert_as_transformers(run, x, settings, draws=3 if slow_one else None)
    assert close <= 0.05 * rows
