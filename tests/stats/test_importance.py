"""Weights of draws without replacement, in closed form and in 120 digits, and the means that they make."""

import itertools
import math
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import InputError
from proxytune.stats.importance import kool_log_weights, log_importance, weighted_mean

NAN, INF = math.nan, math.inf


# --- several weights at once -----------------------------------------------------------------------------------------


def test_kool_weights_in_closed_form() -> None:
    log_p = np.log([0.5, 0.25, 0.01])
    want = np.exp(log_p) / (1 - np.exp(-np.exp(log_p + 1.5)))
    np.testing.assert_allclose(np.exp(kool_log_weights(log_p, -1.5)), want, rtol=1e-12)
    np.testing.assert_allclose(kool_log_weights(log_p, -INF), log_p)  # all were drawn
    # Far below κ a weight is exp(κ), far above it is p; nothing overflows or underflows.
    np.testing.assert_allclose(kool_log_weights([-5000.0, -40.0, -1e-3], -2.0)[:2], -2.0, atol=1e-15)
    np.testing.assert_allclose(kool_log_weights([-0.5, -3000.0], -9000.0), [-0.5, -3000.0])
    np.testing.assert_allclose(kool_log_weights([-0.5, -0.6], [-1.0, -INF])[1], -0.6)


@given(st.floats(-60, 0), st.floats(-60, 5))
def test_kool_weights_are_continuous_and_at_least_both_limits(log_p: float, kappa: float) -> None:
    got = float(kool_log_weights([log_p], kappa)[0])
    assert max(log_p, kappa) - 1e-12 <= got <= np.logaddexp(log_p, kappa) + 1e-12
    assert abs(float(kool_log_weights([log_p], kappa + 1e-9)[0]) - got) < 1e-8 + 1e-9


def test_the_estimate_without_normalising_is_unbiased() -> None:
    """Gumbel-top-2 of five, many times: the mean of Σ w f is Σ p f; equal votes would be far off."""
    rng = np.random.default_rng(0)
    p, f = np.array([0.5, 0.2, 0.15, 0.1, 0.05]), np.array([1.0, 0, 1, 0, 0])
    estimates, normalised, equal = [], [], []
    for _ in range(6000):
        g = np.log(p) + rng.gumbel(size=5)
        order = np.argsort(-g)
        top, kappa = order[:2], g[order[2]]
        logs = kool_log_weights(np.log(p)[top], kappa)
        estimates.append(weighted_mean(f[top], logs, normalised=False))
        normalised.append(weighted_mean(f[top], logs))
        equal.append(f[top].mean())
    error = 5 * np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(f @ p, abs=error)
    assert abs(np.mean(equal) - f @ p) > 2 * error
    assert abs(np.mean(normalised) - f @ p) < abs(np.mean(equal) - f @ p) / 2
    assert np.std(normalised) < np.std(estimates)
    assert weighted_mean([1.0, 0.0], [-2000.0, -2001.0]) == pytest.approx(1 / (1 + math.exp(-1)))


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: kool_log_weights([0.5], 0.0), "log_p: expected at most 0; got 0.5"),
        (lambda: kool_log_weights([-INF], 0.0), "log_p: expected finite numbers"),
        (lambda: kool_log_weights([-1.0], NAN), "kappa: expected one number or 1, finite or −inf; got nan"),
        (lambda: weighted_mean([1.0], [0.0, 0.0]), "log_weights: expected 1, one per value; got 2"),
        (lambda: weighted_mean([1.0], [800.0], normalised=False), "weights that a float can hold"),
    ],
)
def test_wrong_use_is_an_error_with_text(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


# --- one weight at a time -----------------------------------------------------------------------------------------


def exact(logprob: float, kappa: float) -> float:
    """log p − log(1 − exp(−exp(log p − κ))) in 120 digits."""
    getcontext().prec = 120
    p, k = Decimal(logprob), Decimal(kappa)
    return float(p - (1 - (-((p - k).exp())).exp()).ln())


@pytest.mark.parametrize("logprob", [-1e-9, -0.3, -2.0, -20.0, -80.0])
@pytest.mark.parametrize("rate", [-90.0, -36.1, -35.9, -12.0, -1.0, 0.0, 1.0, 3.99, 4.01, 5.0])
def test_log_importance_in_120_digits(logprob: float, rate: float) -> None:
    kappa = logprob - rate
    assert log_importance(logprob, kappa) == pytest.approx(exact(logprob, kappa), rel=1e-12, abs=1e-12)


def test_log_importance_at_the_ends() -> None:
    assert log_importance(-3.0, -math.inf) == -3.0
    assert log_importance(-3.0, -1e9) == -3.0
    assert log_importance(-3000.0, -1.0) == -1.0  # e^rate underflows
    for logprob, kappa in itertools.product([-0.1, -5.0, -800.0], [-math.inf, -40.0, -4.0, 0.0, 20.0]):
        assert kool_log_weights([logprob], kappa)[0] == pytest.approx(log_importance(logprob, kappa), abs=1e-12)
