"""The laws of the mixtures, against closed forms, loops in float64, and a Gumbel-softmax that draws no token first.

Nothing here compares the package with itself but where two calls have to agree: words come from the oracle's Philox or
from numpy's generator, expectations from formulas. Statistics have fixed seeds, so a failure is a change of the code;
the false-alarm level said beside a bound is what another seed would run into.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from proxytune.errors import InputError
from proxytune.methods.latent.mixture import Candidates, Kind, LatentMixture, _log_gamma
from proxytune.ops.mix import mix
from proxytune.ops.noise import COORDINATES, LATENT, SLOTS, Noise

KINDS = get_args(Kind)
ROWS = 60_000
SETTINGS: dict[str, list[float]] = {
    "tau": [1e-3, 0.05, 0.25, 1.0, 30.0],
    "alpha": [1e-4, 0.05, 1.0, 20.0, 1e4],
    "beta": [0.0, 0.5, 1.0, 50.0],
    "samples": [1, 2, 3, SLOTS // 2],
    "sigma": [0.0, 0.3],
}
P = {
    "peaked": [0.94, 0.02, 0.02, 0.01, 0.01],
    "flat": [0.2] * 5,
    "uneven": [0.55, 0.25, 0.12, 0.05, 0.03],
    "zeros": [0.6, 0.0, 0.3, 0.0, 0.1],
    "one of several": [0.0, 1.0, 0.0],
    "single": [1.0],
}
IDS = [17, 100_003, 5, 2**27 - 1, 99, 0]


def logs(p: Any) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(p, np.float64))


def made(logprobs: Any, tokens: Any, ids: Any = None) -> Candidates:
    """Candidates of `[B, k]` or `[k]` log-probabilities; tokens are places among them."""
    tokens = torch.as_tensor(tokens)
    logprobs = torch.as_tensor(np.asarray(logprobs), dtype=torch.float32)
    logprobs = logprobs.expand(len(tokens), -1).contiguous()
    count = logprobs.shape[1]
    ids = torch.tensor(IDS[:count] if count <= len(IDS) else list(range(3, 3 + count))) if ids is None else ids
    own = torch.nn.functional.one_hot(tokens, count).bool()
    return Candidates(ids.expand(len(tokens), -1).contiguous(), logprobs, own)


def drawn(p: list[float], seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(p), size=rows, p=p)


def every_setting(kind: str) -> list[LatentMixture]:
    """A kind with each value of each of its settings; a new kind inherits the values of the settings it has."""
    default = LatentMixture(kind=kind)  # type: ignore[arg-type]
    own = [f.name for f in fields(LatentMixture) if f.name in SETTINGS and getattr(default, f.name) is not None]
    return [
        LatentMixture(kind=kind, **dict(zip(own, x, strict=True)))
        for x in itertools.product(*(SETTINGS[n] for n in own))
    ]  # type: ignore[arg-type]


def z_scores(one: np.ndarray, other: np.ndarray | float) -> np.ndarray:
    """Of the difference of two means `[n, statistics]`, or of one from its expectation; both standard errors."""
    variance = one.var(0) / len(one)
    if isinstance(other, np.ndarray) and other.ndim == 2:
        variance = variance + other.var(0) / len(other)
        other = other.mean(0)
    # What float32 rounds is no deviation, also where nothing varies.
    return abs(one.mean(0) - other) / (np.sqrt(variance) + 1e-7)


def moments(w: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`[n, …]`: w_i, w_i w_j, and w_i where the token is j."""
    n, k = w.shape
    i, j = np.triu_indices(k)
    return np.concatenate([w, w[:, i] * w[:, j], (w[:, :, None] * np.eye(k)[y][:, None]).reshape(n, -1)], 1)


# --- gumbel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.05, 0.25, 1.0, 5.0])
@pytest.mark.parametrize("name", P)
def test_gumbel_over_the_draw_of_the_token_is_the_forward_gumbel_softmax(name: str, tau: float) -> None:
    """First and second moments, and both joint with the token: about 700 of them, 4.5 σ: 0.5% of all seeds alarm."""
    p = P[name]
    y = drawn(p, 1)
    w = LatentMixture(kind="gumbel", tau=tau).weights(made(logs(p), y), Noise.of(ROWS, seed=5, position=9))
    got = w.double().numpy()
    # "argmax = token": where a truncated variate is at its bound to the last bit of float32, two are largest.
    own = got[np.arange(ROWS), y]
    assert (own == got.max(1)).all()
    assert ((got == own[:, None]).sum(1) > 1).mean() < 1e-4

    g = np.random.default_rng(2).gumbel(size=(200_000, len(p))) + logs(p)
    forward = np.exp((g - g.max(1, keepdims=True)) / tau)
    forward /= forward.sum(1, keepdims=True)
    assert z_scores(moments(got, y), moments(forward, g.argmax(1))).max() < 4.5


def test_a_control_noise_that_does_not_know_its_token_is_noticed() -> None:
    p, tau = P["uneven"], 0.25
    rng = np.random.default_rng(3)

    def soft(g: np.ndarray) -> np.ndarray:
        e = np.exp((g - g.max(1, keepdims=True)) / tau)
        return e / e.sum(1, keepdims=True)

    g = rng.gumbel(size=(ROWS, 5)) + logs(p)
    forward = moments(soft(g), g.argmax(1))
    y = drawn(p, 4)
    free = rng.gumbel(size=(ROWS, 5)) + logs(p)
    assert z_scores(moments(soft(free), y), forward).max() > 20
    # Truncated, but with a maximum of another law: that of log p_y instead of log Σp.
    largest = rng.gumbel(size=ROWS) + logs(p)[y]
    bounded = -np.logaddexp(-largest[:, None], -(rng.gumbel(size=(ROWS, 5)) + logs(p)))
    bounded[np.arange(ROWS), y] = largest
    assert z_scores(moments(soft(bounded), y), forward).max() > 20


def words_of(noise: Noise, row: int, token: int, slot: int) -> tuple[int, int, int, int]:
    key = [int(x[row]) for x in (noise.seed, noise.position, noise.row, noise.branch)]
    found = oracle.philox(key[0], token + slot * 2**27, key[1], key[2], key[3] * 4 + 3)
    return tuple(int(x) for x in found)  # type: ignore[return-value]


def gumbel_of(noise: Noise, row: int, token: int, slot: int = 0) -> float:
    return float(oracle.gumbel(np.array(words_of(noise, row, token, slot)[0], np.uint64)))


def random_rows(rows: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor, Noise]:
    """Normalised float32 log-probabilities with some zeros, places of tokens, ids, keys."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, count)) * rng.choice([0.1, 2.0, 8.0], size=(rows, 1))
    tokens = rng.integers(count, size=rows)
    logits[(rng.random((rows, count)) < 0.2) & (np.arange(count) != tokens[:, None])] = -np.inf
    logits -= np.logaddexp.reduce(logits, 1, keepdims=True)
    ids = np.stack([rng.choice(200_000, size=count, replace=False) for _ in range(rows)])
    keys = {
        "seed": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, size=rows)),
        "row": torch.from_numpy(rng.integers(2**32, size=rows)),
        "position": torch.from_numpy(rng.integers(2**32, size=rows)),
        "branch": torch.from_numpy(rng.integers(2**30, size=rows)),
    }
    return logits.astype(np.float32), tokens, torch.from_numpy(ids), Noise.of(rows, **keys)


@pytest.mark.parametrize("tau", [0.05, 0.25, 1.0, 5.0])
def test_gumbel_from_the_oracle_s_words(tau: float) -> None:
    rows, count = 150, 7
    logprobs, tokens, ids, noise = random_rows(rows, count, 6)
    got = LatentMixture(kind="gumbel", tau=tau).weights(made(logprobs, tokens, ids), noise)
    for b, y in enumerate(tokens):
        top = gumbel_of(noise, b, int(ids[b, y]))
        keys = []
        for i in range(count):
            if i == y:
                keys.append(top)
            elif logprobs[b, i] == -math.inf:
                keys.append(-math.inf)
            else:  # P(g ≤ x | g ≤ top), by inversion of the very word: e^−top is added to e^−g
                g = float(logprobs[b, i]) + gumbel_of(noise, b, int(ids[b, i]))
                keys.append(-math.log(math.exp(-top) + math.exp(-g)))
        e = [math.exp((x - top) / tau) for x in keys]
        expected = [x / math.fsum(e) for x in e]
        assert got[b].tolist() == pytest.approx(expected, abs=4e-6 * max(1.0, 1 / tau)), b


# --- dirichlet -------------------------------------------------------------------------------------------------------


def beyond(a: float, b: float, t: float) -> float:
    """P(X > t) of Beta(a, b), by the continued fraction of the incomplete beta function (DLMF 8.17.22)."""
    if a == 0.0 or b == 0.0:
        return float(a > 0)
    x = 1.0 - t  # X > t where 1 − X ~ Beta(b, a) is below
    a, b = b, a
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beyond(a, b, x)
    value = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1.0 + even / (1.0 + odd / value)
    first = -(a + b) * x / (a + 1)
    value = 1.0 + first / value
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / (a * value)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (0.5, 0.5), (0.02, 0.03), (4.0, 7.0)])
def test_the_reference_s_beta_function(a: float, b: float) -> None:
    for t in (0.1, 0.5, 0.9):
        known = {
            (1.0, 1.0): 1 - t,
            (2.0, 1.0): 1 - t * t,
            (1.0, 3.0): (1 - t) ** 3,
            (0.5, 0.5): 1 - 2 / math.pi * math.asin(math.sqrt(t)),
        }
        if (a, b) in known:
            assert beyond(a, b, t) == pytest.approx(known[a, b], rel=1e-10)
        # By the substitution x = u^(1/a) for small a, Simpson's rule has nothing singular to meet.
        power = max(1.0, 1 / a)
        u = np.linspace(0.0, t ** (1 / power), 20_001)
        f = (1 - u**power) ** (b - 1) * u ** (power * a - 1) * power
        h = u[1] / 3 * (f[0] + 4 * f[1::2].sum() + 2 * f[2:-1:2].sum() + f[-1])
        whole = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
        assert beyond(a, b, t) == pytest.approx(1 - h / whole, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("name", P)
def test_dirichlet_s_marginal_is_dirichlet(name: str, alpha: float) -> None:
    """Mean, covariance, and the tail of the largest: about 400 statistics, 4.5 σ: 0.3% of all seeds alarm."""
    p = np.array(P[name])
    y = drawn(P[name], 7)
    law = LatentMixture(kind="dirichlet", alpha=alpha)
    w = law.weights(made(logs(p), y), Noise.of(ROWS, seed=6, position=3)).double().numpy()
    assert z_scores(w, p).max() < 4.5
    off = w - p
    i, j = np.triu_indices(len(p))
    covariance = ((np.diag(p) - np.outer(p, p)) / (alpha + 1))[i, j]
    assert z_scores(off[:, i] * off[:, j], covariance).max() < 4.5
    for t in (0.5, 0.7, 0.95):  # from one half on, at most one is larger
        expected = sum(beyond(alpha * q, alpha * (1 - q), t) for q in p)
        share = (w.max(1) > t).mean()
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * max(1 - expected, 0.0) / ROWS) + 1e-9
    # And given the token, which the marginal alone would not tell.
    for token in set(y.tolist()):
        given_y = w[y == token]
        mean = (alpha * p + np.eye(len(p))[token]) / (alpha + 1)
        often = mean * len(given_y) > 100  # weights of small shapes are next to 0, or 1 now and then
        error = np.sqrt(mean * (1 - mean) / (alpha + 2) / len(given_y)) + 1e-7
        assert (abs(given_y.mean(0) - mean) / error)[often].max() < 4.5


@pytest.mark.parametrize("alpha", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_dirichlet_of_tiny_and_of_huge_shapes_is_finite(alpha: float) -> None:
    p = np.array([1.0, 1e-6, 1e-20, 1e-37, 1e-44, 0.0])
    y = np.arange(600) % 6
    w = LatentMixture(kind="dirichlet", alpha=alpha).weights(made(logs(p), y), Noise.of(600, seed=1))
    assert w.isfinite().all()
    assert (w.sum(1) - 1).abs().max() <= 1e-6
    assert (w >= 0).all()
    assert (w[y != 5, 5] == 0).all()
    if alpha == 1e-30:  # Dir(αp) is then the token, one of them
        assert torch.equal(w, torch.nn.functional.one_hot(torch.from_numpy(y), 6).float())
    if alpha == 1e30:
        np.testing.assert_allclose(w.numpy(), np.tile(p, (600, 1)), rtol=2e-4, atol=1e-6)


def digammas(a: float) -> tuple[float, float]:
    """ψ(a) and ψ′(a), by recurrence and their asymptotic series."""
    low = high = 0.0
    while a < 30:
        low, high, a = low - 1 / a, high + 1 / a**2, a + 1
    i = 1 / a**2
    return (
        low + math.log(a) - 0.5 / a - i * (1 / 12 - i * (1 / 120 - i / 252)),
        high + 1 / a + 0.5 * i + (i / a) * (1 / 6 - i * (1 / 30 - i / 42)),
    )


@pytest.mark.parametrize("shape", [1e-3, 0.01, 0.1, 0.5, 0.999, 1.0, 1.5, 3.0, 10.0, 100.0])
def test_gamma_variates(shape: float) -> None:
    """Moments of the logarithm, and of the variate; about 40 statistics, 4.5 σ."""
    noise = Noise.of(ROWS // 3, seed=8, position=2)
    log_g = _log_gamma(torch.full((ROWS // 3, 3), shape), torch.tensor([4, 8, 15]).expand(ROWS // 3, 3), noise)
    x = log_g.double().numpy().reshape(-1, 1)
    assert np.isfinite(x).all()
    mean, variance = digammas(shape)
    assert z_scores(x, mean).max() < 4.5
    assert z_scores((x - mean) ** 2, variance).max() < 4.5
    g = np.exp(x)
    assert z_scores(g, shape).max() < 4.5
    assert z_scores((g - shape) ** 2, shape).max() < (4.5 if shape > 0.05 else 6.0)  # few variates carry it
    related = np.corrcoef(log_g.double().numpy().T) - np.eye(3)
    assert abs(related).max() < 4.5 / math.sqrt(ROWS // 3)
    if shape == 1.0:  # exponential, to the tails: Kolmogorov–Smirnov at about 0.001
        rank = (np.arange(ROWS) + 0.5) / ROWS
        assert abs(-np.expm1(-np.sort(g[:, 0])) - rank).max() * math.sqrt(ROWS) < 1.95


def test_dirichlet_from_the_oracle_s_words() -> None:
    """Marsaglia and Tsang by loops in float64; rows where an attempt is accepted within rounding are left out."""
    rows, count, alpha = 120, 5, 0.8
    logprobs, tokens, ids, noise = random_rows(rows, count, 9)
    got = LatentMixture(kind="dirichlet", alpha=alpha).weights(made(logprobs, tokens, ids), noise)
    compared = 0
    for b, y in enumerate(tokens):
        logarithms, sure = [], True
        for i in range(count):
            shape = alpha * math.exp(logprobs[b, i]) + (i == y)
            if shape == 0:
                logarithms.append(-math.inf)
                continue
            d = (shape + 1 if shape < 1 else shape) - 1 / 3
            for attempt in range(8):
                r0, r1, r2, _ = words_of(noise, b, int(ids[b, i]), attempt)
                u0, u1, u2 = ((r + 0.5) / 2**32 for r in (r0, r1, r2))
                x = math.sqrt(-2 * math.log1p(-u0)) * math.cos(2 * math.pi * u1)
                v = (1 + x / math.sqrt(9 * d)) ** 3
                if v <= 0:
                    continue
                margin = 0.5 * x * x + d * (1 - v + math.log(v)) - math.log(u2)
                sure &= abs(margin) > 1e-4
                if margin > 0:
                    break
            boost = -math.log1p(-(words_of(noise, b, int(ids[b, i]), 0)[3] + 0.5) / 2**32) / shape if shape < 1 else 0.0
            logarithms.append(math.log(d) + math.log(v) - boost)
        top = max(logarithms)
        e = [math.exp(x - top) for x in logarithms]
        if sure:
            compared += 1
            assert got[b].tolist() == pytest.approx([x / sum(e) for x in e], abs=3e-5), b
    assert compared > 0.9 * rows


# --- multiplex, and what needs no noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, SLOTS // 2])
@pytest.mark.parametrize("name", P)
def test_multiplex_counts_are_multinomial_given_the_token(name: str, samples: int) -> None:
    """Means and covariances of 4 · 6 laws: about 350 statistics, 4.5 σ: 0.3% of all seeds alarm."""
    p = np.array(P[name])
    y = drawn(P[name], 10)
    w = LatentMixture(kind="multiplex", samples=samples).weights(made(logs(p), y), Noise.of(ROWS, seed=3, position=1))
    counts = w.double().numpy() * samples
    assert abs(counts - counts.round()).max() < 1e-5
    further = counts.round() - np.eye(len(p))[y]
    assert further.min() >= 0
    assert (further.sum(1) == samples - 1).all()
    n = samples - 1
    i, j = np.triu_indices(len(p))
    for token in (None, *sorted(set(y.tolist()))):  # the further draws do not depend on the token
        x = further if token is None else further[y == token]
        if len(x) < 2000:  # too few for the normal law of a mean
            continue
        assert z_scores(x, n * p).max() < 4.5
        off = x - n * p
        assert z_scores(off[:, i] * off[:, j], n * (np.diag(p) - np.outer(p, p))[i, j]).max() < 4.5


def test_multiplex_from_the_oracle_s_words() -> None:
    rows, count, samples = 100, 6, SLOTS // 2
    logprobs, tokens, ids, noise = random_rows(rows, count, 12)
    got = LatentMixture(kind="multiplex", samples=samples).weights(made(logprobs, tokens, ids), noise)
    for b, y in enumerate(tokens):
        counts = [int(i == y) for i in range(count)]
        for slot in range(samples - 1):
            keys = [float(logprobs[b, i]) + gumbel_of(noise, b, int(ids[b, i]), slot) for i in range(count)]
            counts[int(np.argmax(keys))] += 1
        assert got[b].tolist() == pytest.approx([c / samples for c in counts], abs=1e-7), b


def normalised_entropy(p: list[float]) -> float:
    return 0.0 if len(p) == 1 else -math.fsum(q * math.log(q) for q in p if q > 0) / math.log(len(p))


@pytest.mark.parametrize("name", P)
def test_closed_forms_in_float64(name: str) -> None:
    p = P[name]
    h = normalised_entropy(p)
    for token in range(len(p)):
        candidates, noise = made(logs(p), [token]), Noise.of(1)
        y = [float(i == token) for i in range(len(p))]
        assert candidates.spread.item() == pytest.approx(h, abs=1e-6)
        want: dict[tuple[Kind, float], list[float]] = {
            ("onehot", 0): y,
            ("gaussian", 0): y,
            ("mean", 0): p,
        }
        for beta in (0.0, 0.3, 1.0, 7.0):
            want["moi", beta] = [(h * q + (1 + beta - h) * one) / (1 + beta) for q, one in zip(p, y, strict=True)]
        for (kind, beta), expected in want.items():
            law = LatentMixture(kind=kind, beta=beta) if kind == "moi" else LatentMixture(kind=kind)
            assert law.weights(candidates, noise)[0].tolist() == pytest.approx(expected, abs=2e-7)


def test_moi_s_defaults_and_ends() -> None:
    """β = 1; at Ĥ = 1 and β = 0 the input is p alone, at Ĥ = 0 the token alone."""
    noise = Noise.of(1)
    flat = [0.25] * 4
    assert LatentMixture(kind="moi").beta == 1.0
    assert LatentMixture(kind="moi").weights(made(logs(flat), [2]), noise)[0].tolist() == pytest.approx(
        [0.125, 0.125, 0.625, 0.125]
    )
    assert LatentMixture(kind="moi", beta=0).weights(made(logs(flat), [2]), noise)[0].tolist() == pytest.approx(flat)
    sure = LatentMixture(kind="moi", beta=0).weights(made(logs([0.0, 0.0, 1.0, 0.0]), [2]), noise)
    assert sure[0].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_gaussian_is_the_token_s_embedding_with_noise_of_its_own_size() -> None:
    """x + σ · rms(x) · n, n of the oracle's words; a float64 table, so that rounding hides nothing."""
    law = LatentMixture(kind="gaussian", sigma=0.3)
    rng = np.random.default_rng(13)
    table = rng.normal(size=(6, 24)) * 3
    tokens = [4, 1, 4]
    noise = Noise.of(3, seed=-9, row=torch.tensor([7, 0, 2**32 - 1]), position=torch.tensor([5, 2**31, 1]))
    ids = torch.arange(6).expand(3, 6)
    w = law.weights(made(logs([1 / 6] * 6), tokens, ids), noise)
    assert law.sigma == 0.3
    got = mix(
        torch.from_numpy(table), ids, w, tokens=torch.tensor(tokens), soft=None, sigma=law.sigma, noise=noise
    ).numpy()
    for b, token in enumerate(tokens):
        x = table[token]
        size = math.sqrt(math.fsum(v * v for v in x) / len(x))
        for c in range(len(x)):
            r0, r1, _, _ = words_of(noise, b, c, COORDINATES)
            n = math.sqrt(-2 * math.log1p(-(r0 + 0.5) / 2**32)) * math.cos(2 * math.pi * (r1 + 0.5) / 2**32)
            assert got[b, c] == pytest.approx(x[c] + 0.3 * size * n, abs=1e-5)


# --- what every kind keeps -------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[Candidates, Noise]:
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    logit = st.one_of(st.floats(-4, 4), st.floats(-200, 200), st.just(-math.inf))
    logits = np.array(draw(st.lists(st.lists(logit, min_size=count, max_size=count), min_size=rows, max_size=rows)))
    tokens = [draw(st.integers(0, count - 1)) for _ in range(rows)]
    for b, token in enumerate(tokens):
        if logits[b, token] == -math.inf:
            logits[b, token] = draw(st.floats(-4, 4))
    logits -= np.logaddexp.reduce(logits, 1, keepdims=True)
    keys = {
        name: torch.tensor(draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows)))
        for name, low, high in (("seed", -(2**63), 2**63 - 1), ("row", 0, 2**32 - 1), ("position", 0, 2**32 - 1))
    }
    ids = torch.tensor(draw(st.permutations(range(2**27 - count, 2**27))))
    return made(logits, tokens, ids), Noise.of(rows, **keys)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_weights_are_convex_and_only_where_there_is_probability(
    kind: str, batch: tuple[Candidates, Noise], data: st.DataObject
) -> None:
    candidates, noise = batch
    law = data.draw(st.sampled_from(every_setting(kind)))
    w = law.weights(candidates, noise)
    assert w.shape == candidates.ids.shape
    assert w.dtype == torch.float32
    assert (w >= 0).all()
    assert (w.double().sum(1) - 1).abs().max() <= 1e-6
    assert (w[(candidates.logprobs == -torch.inf) & ~candidates.own] == 0).all()
    spread = candidates.spread
    assert ((spread >= 0) & (spread <= 1)).all()


def many(rows: int, count: int, seed: int = 14) -> tuple[Candidates, Noise]:
    logprobs, tokens, ids, noise = random_rows(rows, count, seed)
    return made(logprobs, tokens, ids), noise


def picked(candidates: Candidates, noise: Noise, which: Any) -> tuple[Candidates, Noise]:
    part = Candidates(candidates.ids[which], candidates.logprobs[which], candidates.own[which])
    return part, Noise(noise.seed[which], noise.row[which], noise.position[which], noise.branch[which])


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_candidates_have_permuted_weights(kind: str) -> None:
    """Bit for bit where the weights' sum is exact, of a one-hot or of K whole numbers; else to its rounding."""
    candidates, noise = many(64, 9)
    for n, law in enumerate(every_setting(kind)):
        w = law.weights(candidates, noise)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(n))
        moved = Candidates(*(x[:, order].contiguous() for x in vars(candidates).values()))
        got = law.weights(moved, noise)
        if kind in ("onehot", "gaussian", "multiplex"):
            assert torch.equal(got, w[:, order]), law
        else:
            torch.testing.assert_close(got, w[:, order], rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 10, 33])
def test_a_row_s_weights_do_not_depend_on_its_batch(kind: str, count: int) -> None:
    candidates, noise = many(40, count)
    for law in every_setting(kind):
        w = law.weights(candidates, noise)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(count))
        for which in (order, order[:13], torch.tensor([7, 3]), torch.tensor([39]), torch.tensor([5, 5, 5])):
            assert torch.equal(law.weights(*picked(candidates, noise, which)), w[which]), law
        # A neighbour without a distribution is nobody's concern.
        broken = candidates.logprobs.clone()
        broken[::2] = torch.nan
        got = law.weights(Candidates(candidates.ids, broken, candidates.own), noise)
        assert torch.equal(got[1::2], w[1::2]), law


def others(noise: Noise) -> dict[str, Noise]:
    of: Callable[..., Noise] = lambda **changed: Noise(**vars(noise) | changed)  # noqa: E731
    return {
        "seed": of(seed=noise.seed ^ 1),
        "seed, high": of(seed=noise.seed ^ (1 << 63 - 1)),
        "row": of(row=noise.row ^ 1),
        "position": of(position=noise.position ^ 1),
        "branch": of(branch=noise.branch ^ 1),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_keyed_by_seed_row_and_position(kind: str) -> None:
    rows = 400
    p = [0.3, 0.25, 0.2, 0.15, 0.1]
    candidates = made(logs(p), np.arange(rows) % 5)
    noise = Noise.of(rows, seed=21, position=4)
    law = LatentMixture(kind=kind, **({"samples": 8} if kind == "multiplex" else {}))  # type: ignore[arg-type]
    w = law.weights(candidates, noise)
    assert torch.equal(law.weights(candidates, noise), w)
    drawn_weights = law.is_random and not law.sigma
    for part, other in others(noise).items():
        got = law.weights(candidates, other)
        if not drawn_weights:
            assert torch.equal(got, w), part
            continue
        assert (got != w).any(1).float().mean() > 0.9, part
        # Nor are they related: correlations given the token are those of chance (25 of each part, 4.5 σ).
        for token in range(5):
            a, b = w[token::5, :].double(), got[token::5, :].double()
            both = torch.corrcoef(torch.cat([a, b], 1).T)[:5, 5:]
            assert both.abs().max() < 4.5 / math.sqrt(rows / 5), part


@pytest.mark.parametrize("kind", KINDS)
def test_another_id_has_other_noise_and_the_stream_is_not_that_of_the_tokens(kind: str) -> None:
    law = LatentMixture(kind=kind)  # type: ignore[arg-type]
    if not law.is_random or law.sigma:
        pytest.skip("no noise in its weights")
    p, rows = logs([0.25] * 4), 50
    y = np.arange(rows) % 4
    noise = Noise.of(rows, seed=2)
    w = law.weights(made(p, y, torch.tensor([1, 2, 3, 4])), noise)
    assert not torch.equal(law.weights(made(p, y, torch.tensor([1, 2, 3, 5])), noise), w)
    assert LATENT == 3  # 0 is what tokens are drawn with


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_a_row_without_a_distribution_gets_its_token(kind: str, count: int) -> None:
    for law in every_setting(kind):
        for nothing in (math.nan, -math.inf):
            tokens = [count - 1, 0]
            logprobs = np.full((2, count), nothing)
            if nothing == -math.inf and kind == "multiplex":
                continue  # never handed over: normalised, nothing at all is NaN
            candidates = made(logprobs, tokens)
            w = law.weights(candidates, Noise.of(2, seed=1))
            assert torch.equal(w, candidates.own.float()), law
            if math.isnan(nothing) or count == 1:
                assert candidates.spread.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_no_probability_still_belongs_to_its_mixture(kind: str) -> None:
    """A draw by another law (a forced token) may have a probability of 0 among the candidates."""
    p = [0.0, 0.5, 0.5]
    for law in every_setting(kind):
        w = law.weights(made(logs(p), [0] * 20), Noise.of(20, seed=4))
        assert w.isfinite().all()
        assert (w.double().sum(1) - 1).abs().max() <= 1e-6
        if kind != "mean" and not (kind == "moi" and law.beta == 0) and kind != "dirichlet":
            assert (w[:, 0] > 0).all(), law


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    law = LatentMixture()
    assert (law.kind, law.candidates, law.tau, law.alpha, law.beta, law.samples, law.sigma) == (
        *("gumbel", 10, 0.25),
        *(None, None, None, 0.0),
    )
    assert LatentMixture(kind="dirichlet").alpha == 1.0
    assert LatentMixture(kind="multiplex").samples == 3
    assert LatentMixture(kind="gaussian").sigma == 0.1
    assert {kind for kind in KINDS if LatentMixture(kind=kind).is_random} >= {
        "gumbel",
        "dirichlet",
        "multiplex",
        "gaussian",
    }
    assert not any(LatentMixture(kind=kind).is_random for kind in ("onehot", "mean", "moi"))
    assert LatentMixture(kind="mean", sigma=0.1).is_random
    assert not LatentMixture(kind="gaussian", sigma=0).is_random


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": "gumble"}, "kind: expected 'onehot', .* or 'gaussian'; got 'gumble'. Did you mean 'gumbel'?"),
    ({"kind": "zzz"}, "kind: expected .*; got 'zzz'. Use one of these."),
    ({"kind": None}, "kind: expected"),
    ({"kind": ["gumbel"]}, "kind: expected"),
    ({"kind": "mean", "tau": 1.0}, "tau: expected only settings of 'mean' .*; got tau=1.0, a setting of 'gumbel'"),
    ({"kind": "gumbel", "alpha": 1.0}, "alpha: .*a setting of 'dirichlet'. Leave it out, or pass kind='dirichlet'."),
    ({"kind": "gumbel", "beta": 1.0}, "beta: .*a setting of 'moi'"),
    ({"kind": "dirichlet", "samples": 2}, "samples: .*a setting of 'multiplex'"),
    *(
        ({"kind": kind, name: value}, f"{name}: expected a finite number > 0; got")
        for kind, name in (("gumbel", "tau"), ("dirichlet", "alpha"))
        for value in (0, 0.0, -1.0, math.inf, math.nan, True, "1")
    ),
    *(
        ({"kind": kind, name: value}, f"{name}: expected a finite number ≥ 0; got")
        for kind, name in (("moi", "beta"), ("mean", "sigma"), ("gaussian", "sigma"))
        for value in (-1e-9, math.inf, math.nan, False, "1")
    ),
    *(
        ({"candidates": value}, "candidates: expected a whole number of tokens, at least 1; got")
        for value in (0, -3, 2.0, True, "10", None)
    ),
    *(
        ({"kind": "multiplex", "samples": value}, "samples: expected a whole number of tokens, from 1 to 16; got")
        for value in (0, -3, 2.0, True, 17)
    ),
]


@pytest.mark.parametrize(("wrong", "said"), BAD, ids=[str(x) for x, _ in BAD])
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LatentMixture(**wrong)
