"""Entropy, varentropy, branching factor and KL divergence, against float64 and closed forms."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune import ops
from proxytune.errors import InputError
from proxytune.ops.entropy import branching_factor, entropy, kl_divergence, varentropy

INF, NAN = torch.inf, torch.nan


def reference(row: torch.Tensor) -> tuple[float, float]:
    """Entropy and varentropy of one row by their definitions, in float64, over the tokens that have a probability."""
    z = row.double()[row > -INF]
    logp = z - z.logsumexp(0)
    p = logp.exp()
    h = float(-(p * logp).sum())
    return h, float((p * (logp + h) ** 2).sum())


def reference_kl(row: torch.Tensor, base: torch.Tensor) -> float:
    logp, logq = row.double().log_softmax(0), base.double().log_softmax(0)
    kept = logp > -INF
    return float((logp.exp()[kept] * (logp - logq)[kept]).sum())


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 2, 7, 1000, 150_000])
def test_a_uniform_row_has_the_logarithm_of_its_width(n: int) -> None:
    row = torch.full((n,), 3.5)
    assert float(entropy(row)) == pytest.approx(math.log(n), abs=2e-5)
    assert float(varentropy(row)) == pytest.approx(0.0, abs=1e-6)
    assert float(branching_factor(row)) == pytest.approx(n, rel=2e-5)


def test_two_tokens_in_closed_form() -> None:
    p = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    want = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(entropy(logits).double(), want, atol=1e-6, rtol=1e-6)
    want = p * (1 - p) * (p.log() - (1 - p).log()) ** 2
    torch.testing.assert_close(varentropy(logits).double(), want, atol=1e-6, rtol=1e-6)
    q = p.flip(0)
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    got = kl_divergence(logits, torch.stack([q.log(), (1 - q).log()], -1))
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # nearly uniform, like a model's, nearly certain
def test_rows_against_float64(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.randn(2, 3, 1500) * scale).to(dtype)
    logits[..., ::7] = -INF
    base = (torch.randn(2, 3, 1500) * scale).to(dtype)
    h, v, kl = entropy(logits), varentropy(logits), kl_divergence(logits, base)
    assert h.dtype == v.dtype == kl.dtype == torch.float32
    assert h.shape == v.shape == kl.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            want_h, want_v = reference(logits[i, j])
            assert float(h[i, j]) == pytest.approx(want_h, rel=2e-6, abs=2e-6)
            assert float(v[i, j]) == pytest.approx(want_v, rel=2e-5, abs=2e-5)
            assert float(kl[i, j]) == pytest.approx(reference_kl(logits[i, j], base[i, j]), rel=1e-5, abs=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("width", [5, 1024, 2100])  # less than a tile of the fused pass, one, and a rest
def test_they_agree_with_the_fused_step(width: int) -> None:
    base, expert, antiexpert = (3.0 * torch.randn(9, width) for _ in range(3))
    base[:, 1::5] = -INF
    base[3, 2], base[4, 2], base[5] = NAN, INF, -INF
    base[6, 1:] = -INF
    step = ops.step([base, expert, antiexpert], (1.0, 0.7, -0.7), want=("scores", "entropy", "varentropy", "kl"))
    assert step.scores is not None
    for ours, fused in ((entropy, step.entropy), (varentropy, step.varentropy)):
        torch.testing.assert_close(ours(step.scores), fused, atol=2e-5, rtol=2e-5, equal_nan=True)
    torch.testing.assert_close(kl_divergence(step.scores, base), step.kl, atol=3e-5, rtol=3e-5, equal_nan=True)
    assert step.entropy is not None
    assert step.entropy.isnan().tolist() == [False, False, False, True, True, True, False, False, False]


def test_rows_without_a_distribution_are_nan_and_leave_the_others_alone() -> None:
    good = torch.tensor([1.0, 2.0, -INF])
    rows = torch.stack([good, torch.tensor([1.0, NAN, 0.0]), torch.tensor([INF, 0.0, 0.0]), torch.full((3,), -INF)])
    for measure in (entropy, varentropy, branching_factor):
        values = measure(rows)
        assert values.isnan().tolist() == [False, True, True, True]
        assert values[0] == measure(good)
    assert kl_divergence(rows, good.expand(4, 3)).isnan().tolist() == [False, True, True, True]
    assert kl_divergence(good.expand(4, 3), rows).isnan().tolist() == [False, True, True, True]


def test_a_divergence_from_what_is_masked() -> None:
    p, q = torch.tensor([0.0, 0.0, -INF]), torch.tensor([0.0, 0.0, 0.0])
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(1.5), abs=1e-6)
    assert float(kl_divergence(q, p)) == INF
    assert float(kl_divergence(p, p)) == 0.0
    # What has no probability in float32 anyway does not escape.
    assert math.isfinite(float(kl_divergence(torch.tensor([0.0, 0.0, -500.0]), p)))


finite_rows = st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=40)


@given(finite_rows, st.floats(-100, 100, width=32), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_neither_a_constant_nor_the_order_matters(row: list[float], constant: float, random: Any) -> None:
    order = list(range(len(row)))
    random.shuffle(order)
    z = torch.tensor(row)
    q = z.flip(0)
    # Adding a constant rounds the logits themselves.
    close = {"atol": 2e-3, "rtol": 2e-3}
    for measure in (entropy, varentropy):
        torch.testing.assert_close(measure(z + constant), measure(z), **close)
        torch.testing.assert_close(measure(z[order]), measure(z), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kl_divergence(z + constant, q - constant), kl_divergence(z, q), **close)
    torch.testing.assert_close(kl_divergence(z[order], q[order]), kl_divergence(z, q), atol=1e-4, rtol=1e-4)
    assert 0.0 <= float(entropy(z)) <= math.log(len(row)) + 1e-5
    assert float(kl_divergence(z, q)) >= 0.0
    masked = torch.cat([z, torch.full((3,), -INF)])
    torch.testing.assert_close(entropy(masked), entropy(z), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 0), torch.tensor(1.0), [0.0, 1.0]])
def test_what_are_no_logits_is_refused(bad: Any) -> None:
    for measure in (entropy, varentropy, branching_factor, lambda x: kl_divergence(x, x)):
        with pytest.raises(InputError, match=r"logits: expected a floating tensor \[\.\.\., V\]"):
            measure(bad)
    with pytest.raises(InputError, match="two rows of the same width, 4 as the base's; got 3 columns"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
