"""Quantiles of Student's t, against tables."""

import pytest

from proxytune.errors import InputError
from proxytune.stats.student import t_quantile


@pytest.mark.parametrize(
    ("share", "freedom", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 4, 2.77645),
        (0.95, 5, 2.01505),
        (0.995, 3, 5.84091),
        (0.995, 9, 3.24984),
        (0.975, 30, 2.04227),
        (0.975, 100000, 1.95999),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_are_those_of_tables(share: float, freedom: int, value: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(value, rel=1e-2)
    assert t_quantile(1 - share, freedom) == pytest.approx(-value, rel=1e-2)


def test_no_degrees_of_freedom_have_no_quantile() -> None:
    with pytest.raises(InputError, match="freedom: expected a whole number of degrees, at least 1; got 0"):
        t_quantile(0.9, 0)
