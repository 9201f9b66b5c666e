"""pass@k: the probability that at least one of k samples is right."""

from __future__ import annotations

import math

from proxytune.errors import InputError
from proxytune.validation import whole

__all__ = ["pass_at_k"]


def pass_at_k(right: int, total: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k independent samples is right), `1 − C(n−c, k)/C(n, k)`.

    Chen et al. 2021, arXiv 2107.03374, eq. 1, with c = `right` and n = `total`. For independent samples only; the
    leaves of a tree are not.

    Raises:
        InputError: If a number is not an integer, k is 0 or > n, or c > n.
    """
    total = whole("total", total, "of samples", least=1)
    right, k = whole("right", right, "of samples"), whole("k", k, "of samples", least=1)
    if right > total or k > total:
        raise InputError.of(
            "pass@k",
            expected=f"right ≤ {total} and k ≤ {total}, the number of samples",
            got=f"{right} right and k = {k}",
            remedy="Draw more samples, or lower k.",
        )
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)
