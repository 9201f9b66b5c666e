"""The threshold above which a share of values lies: none comes nearer to the share."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.stats.quantile import share_threshold


@given(
    st.lists(st.floats(0, 12, width=32) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=60), st.floats(0.01, 0.99)
)
@settings(max_examples=200, deadline=None)
def test_no_threshold_comes_nearer_to_the_share(values: list[float], share: float) -> None:
    h, realised = share_threshold(values, share)
    above = (torch.tensor(values) > h).float().mean()
    assert float(above) == pytest.approx(realised, abs=1e-6)
    tried = [np.mean(np.array(values) > t) for t in [-1.0, *values]]
    assert abs(realised - share) <= min(abs(t - share) for t in tried) + 1e-12


def test_the_threshold_lies_between_two_values() -> None:
    values = np.arange(1, 101) / 10
    assert share_threshold(values, 0.2) == (pytest.approx(8.05), 0.2)
    # Ties: the nearest of what can be had, and away from the tied value.
    tied = [0.0] * 70 + [1.0] * 30
    assert share_threshold(tied, 0.2) == (0.5, 0.3)
    assert share_threshold([0.0] * 10, 0.2) == (0.0, 0.0)
    assert share_threshold([0.0] * 10, 0.9) == (-1.0, 1.0)
    assert share_threshold([2.0] * 10, 0.9) == (1.0, 1.0)
