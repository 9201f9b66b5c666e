"""A share of forks that drifts is told once, and noise is not."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.entropies import sampled_entropies
from support.tiny import build

from proxytune.errors import DriftWarning
from proxytune.methods.forks.threshold import ForkThreshold


def test_the_band_is_the_documented_one() -> None:
    band = ForkThreshold(0.4, share=0.2).band
    assert band is not None
    half = 0.02 + 4 * math.sqrt(4.0 * 0.2 * 0.8 / 4096)
    assert band == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert half == pytest.approx(0.07, abs=0.001)
    assert ForkThreshold(0.4).band is None
    assert ForkThreshold(0.4, share=0.01).band == (0.0, pytest.approx(0.0424, abs=1e-3))


def watched(model: Any, threshold: ForkThreshold, temperature: float) -> None:
    for step in sampled_entropies(model, temperature, seed=3, rows=120, steps=70).unbind(1):
        threshold.observe(step)


@pytest.mark.parametrize("changed", [False, True])
def test_a_drift_is_told_once_and_only_if_something_changed(changed: bool) -> None:
    model = build("llama", seed=7, vocab=64)
    threshold = ForkThreshold.calibrated(sampled_entropies(model, 1.0, seed=1, rows=120))
    if changed:
        # The model's own temperature, which another α or another checkpoint changes as well.
        model.lm_head.weight.data.mul_(0.8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched(model, threshold, 1.0)
        watched(model, threshold, 1.0)
    assert [w.category for w in told] == ([DriftWarning] if changed else [])
    if changed:
        assert "of the last 4200 tokens" in str(told[0].message)
        assert "20.0% were expected (band 13.0% to 27.0%)" in str(told[0].message)
        threshold.reset()
        with pytest.warns(DriftWarning, match="Calibrate again"):
            watched(model, threshold, 1.0)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_sampling_at_another_temperature_is_a_drift_too(temperature: float) -> None:
    """Raw entropies, but of other texts: near greedy decoding runs into loops, where little is open."""
    model = build("gpt2", seed=7, vocab=1000)
    threshold = ForkThreshold.calibrated(sampled_entropies(model, 1.0, seed=1, rows=120))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched(model, threshold, temperature)
    assert bool(told) == (temperature != 1.0), threshold.realised_share


def test_noise_of_alike_tokens_is_no_drift() -> None:
    """Runs of four equal tokens, for which the default makes room: no false alarm in two hundred windows."""
    rng = np.random.default_rng(0)
    threshold = ForkThreshold(0.8, share=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            threshold.observe(torch.from_numpy(np.repeat(rng.random(1024), 4)))
    assert threshold.tokens == 200 * 4096


def test_tokens_that_do_not_count_do_not_fill_a_window() -> None:
    threshold = ForkThreshold(0.5, share=0.2, window=100)
    some = torch.arange(100) < 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            threshold.observe(torch.ones(100), some)
    with pytest.warns(DriftWarning, match=r"100\.0% of the last 120 tokens"):
        threshold.observe(torch.ones(100), some)
    assert threshold.tokens == 120
