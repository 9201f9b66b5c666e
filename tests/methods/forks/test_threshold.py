"""Fork thresholds that keep the share of forks that they promise."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.entropies import sampled_entropies
from support.tiny import build

from proxytune.errors import CalibrationWarning, DriftWarning, InputError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.recipe import ForkCalibration
from proxytune.stats.quantile import share_threshold

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_calibration_takes_tensors_arrays_and_lists(dtype: torch.dtype) -> None:
    values = torch.rand(40, 50).to(dtype)
    threshold = ForkThreshold.calibrated(values)
    assert threshold.nats == ForkThreshold.calibrated(values.double().numpy()).nats
    assert threshold.nats == ForkThreshold.calibrated(values.flatten().tolist()).nats
    assert float(threshold.is_fork(values.float()).float().mean()) == pytest.approx(0.2, abs=0.005)


def test_ties_that_keep_the_share_away_are_told() -> None:
    with pytest.warns(CalibrationWarning, match=r"30\.0% of the calibration tokens are forks, not 20\.0%"):
        assert ForkThreshold.calibrated([0.0] * 70 + [1.0] * 30).nats == 0.5
    ForkThreshold.calibrated([0.0] * 79 + [1.0] * 21)  # within 2 points: nothing to tell


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, NAN, "0.2", None, True])
def test_a_share_is_between_0_and_1(share: Any) -> None:
    for make in (
        lambda: ForkThreshold.calibrated(np.ones(1000), share),
        lambda: ForkThreshold.streaming(share),
        lambda: share_threshold([1.0], share),
        lambda: ForkCalibration(share=share, nats=1.0, tokens=10),
    ):
        with pytest.raises(InputError, match=r"share: expected a number in \(0, 1\)"):
            make()


def test_what_cannot_be_calibrated_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 50 tokens for a share of 0\.2, ten on either side .* got 49\."):
        ForkThreshold.calibrated(np.ones(49))
    with pytest.raises(InputError, match="at least 1000 tokens"):
        ForkThreshold.calibrated(np.ones(999), 0.99)
    with pytest.raises(InputError, match="entropies: expected some tokens; got none"):
        share_threshold([], 0.2)
    for bad in (NAN, INF, -0.5):
        with pytest.raises(InputError, match="expected finite numbers ≥ 0, in nats; got "):
            ForkThreshold.calibrated([1.0] * 99 + [bad])
    for bad in (NAN, INF, "0.4", None, True, 10**400):
        with pytest.raises(InputError, match="threshold: expected a finite number"):
            ForkThreshold(bad)
    for wrong in ({"window": 0}, {"window": 1.5}, {"inflation": 0.5}, {"margin": -0.1}):
        with pytest.raises(InputError, match="window: expected|inflation: expected|margin: expected"):
            ForkThreshold(0.4, share=0.2, **wrong)
    for warm_up in (0, 1.5, True):
        with pytest.raises(InputError, match="warm_up: expected a whole number"):
            ForkThreshold.streaming(warm_up=warm_up)


def test_nan_is_no_fork_and_is_not_counted() -> None:
    threshold = ForkThreshold(0.5, share=0.2)
    h = torch.tensor([0.4, 0.6, NAN, 0.5, 0.7])
    assert threshold.is_fork(h).tolist() == [False, True, False, False, True]
    assert math.isnan(threshold.realised_share)
    threshold.observe(h)
    assert (threshold.tokens, threshold.realised_share) == (4, 0.5)
    threshold.observe(h, torch.tensor([True, True, True, True, False]))
    assert (threshold.tokens, threshold.realised_share) == (7, pytest.approx(3 / 7))
    threshold.reset()
    assert threshold.tokens == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("vocab", [32, 1000])  # smaller and larger than a byte vocabulary
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_the_share_holds_on_fresh_text(kind: str, vocab: int, temperature: float) -> None:
    model = build(kind, seed=7, vocab=vocab)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        threshold = ForkThreshold.calibrated(sampled_entropies(model, temperature, seed=1), window=1000)
        fresh = sampled_entropies(model, temperature, seed=2)
        for step in fresh.unbind(1):
            threshold.observe(step)
    assert threshold.tokens == fresh.numel()
    assert threshold.realised_share == pytest.approx(0.2, abs=0.02)
