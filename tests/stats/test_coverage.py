"""pass@k against the mean over all subsets."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest

from proxytune.errors import InputError
from proxytune.stats.coverage import pass_at_k


@pytest.mark.parametrize("total", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(total: int) -> None:
    for right in range(total + 1):
        for k in range(1, total + 1):
            subsets = list(combinations(range(total), k))
            share = Fraction(sum(min(subset) < right for subset in subsets), len(subsets))
            assert pass_at_k(right, total, k) == pytest.approx(float(share), abs=1e-12)


@pytest.mark.parametrize(
    ("right", "total", "k", "message"),
    [
        (3, 2, 1, r"right ≤ 2"),
        (1, 2, 3, r"k ≤ 2.*k = 3"),
        (0, 0, 1, r"total: expected a whole number of samples, at least 1"),
        (1, 4, 0, r"k: expected a whole number of samples, at least 1"),
        (1.5, 4, 1, r"right: expected a whole number of samples"),
    ],
)
def test_impossible_numbers_are_refused(right: int, total: int, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pass_at_k(right, total, k)
