"""Passes of companions under a gate."""

import pytest

from proxytune.costs.roofline import gated_passes
from proxytune.errors import InputError


def test_companions_run_where_any_row_asks() -> None:
    assert gated_passes(0.0) == 0.0
    assert gated_passes(1.0, 3) == 1.0
    assert gated_passes(0.2) == pytest.approx(0.2)
    assert gated_passes(0.2, 8) == pytest.approx(0.8322, abs=1e-4)
    with pytest.raises(InputError, match="share: expected"):
        gated_passes(1.5)
