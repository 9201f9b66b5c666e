"""Small arrays of the step in torch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proxytune.ops.torch_impl.arrays import columns_of_largest

VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan])


@given(
    st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=4)),
    st.data(),
)
def test_the_columns_are_those_of_the_largest_values(rows: list[list[float]], data: st.DataObject) -> None:
    x = np.array(rows, np.float32)
    count = data.draw(st.integers(1, x.shape[1]))
    columns = columns_of_largest(x, count)
    for row, found in zip(x, columns, strict=True):
        assert sorted(set(found.tolist())) == found.tolist()
        np.testing.assert_array_equal(np.sort(row[found]), np.sort(row)[-count:])  # NaN counts as the largest
