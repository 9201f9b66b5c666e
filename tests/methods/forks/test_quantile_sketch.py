"""A streaming threshold: its sketch converges on the quantile, whatever the order, the warm-up and the ties."""

import math

import numpy as np
import pytest
import torch
from support.entropies import sampled_entropies
from support.tiny import build

from proxytune.methods.forks.threshold import ForkThreshold

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_stream_converges_on_the_quantile(share: float) -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(0.5, 0.8, (600, 16))).float()
    threshold = ForkThreshold.streaming(share)
    for step in values[:300]:
        threshold.observe(step)
    assert threshold.nats == pytest.approx(float(values[:300].flatten().quantile(1 - share)), rel=0.005)
    above = 0
    for step in values[300:]:
        above += int(threshold.is_fork(step).sum())
        threshold.observe(step)
    assert above / values[300:].numel() == pytest.approx(share, abs=0.02)
    assert threshold.realised_share == pytest.approx(share, abs=0.02)
    assert threshold.tokens == values.numel() - 256  # without the warm-up, 16 steps of 16


def test_a_stream_on_a_model_s_text() -> None:
    model = build("llama", seed=7, vocab=300)
    threshold = ForkThreshold.streaming()
    for step in sampled_entropies(model, 1.0, seed=1, rows=40, steps=100).unbind(1):
        threshold.observe(step)
    assert threshold.realised_share == pytest.approx(0.2, abs=0.02)


def test_a_stream_does_not_depend_on_the_order_of_the_rows() -> None:
    values = torch.rand(50, 8)
    one, other = ForkThreshold.streaming(warm_up=16), ForkThreshold.streaming(warm_up=16)
    for step in values:
        order = torch.randperm(8)
        assert torch.equal(one.is_fork(step)[order], other.is_fork(step[order]))
        one.observe(step)
        other.observe(step[order])
        assert one.nats == other.nats
    assert one.realised_share == other.realised_share


def test_a_stream_s_warm_up() -> None:
    values = torch.linspace(0.1, 2.0, 32)
    silent, given = ForkThreshold.streaming(warm_up=64), ForkThreshold.streaming(warm_up=64, initial=1.0)
    assert silent.nats == INF
    assert given.nats == 1.0
    for _ in range(2):
        assert not silent.is_fork(values).any()
        assert given.is_fork(values).sum() == (values > 1.0).sum()
        silent.observe(values)
        given.observe(values)
        assert silent.tokens == 0
    assert silent.nats == given.nats == pytest.approx(float(values.quantile(0.8)), rel=0.03)
    silent.observe(values, torch.zeros(32, dtype=torch.bool))
    assert silent.tokens == 0
    silent.observe(values)
    assert silent.tokens == 32
    silent.reset()
    assert silent.nats == INF


def test_a_stream_with_ties() -> None:
    """Most tokens certain, and the rest at one entropy: the threshold lies between, not on one of the two."""
    threshold = ForkThreshold.streaming(warm_up=10)
    threshold.observe(torch.tensor([0.0] * 80 + [math.log(2)] * 20))
    assert 1e-4 < threshold.nats < 0.5
    threshold.observe(torch.tensor([NAN] * 50 + [0.0] * 4 + [math.log(2)]))
    assert threshold.tokens == 5
    assert threshold.realised_share == 0.2
