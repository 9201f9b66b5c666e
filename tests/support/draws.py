"""Counts of draws against the distribution that they are of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def sigmas(counts: np.ndarray[Any, Any], p: np.ndarray[Any, Any]) -> float:
    """χ² of counts against probabilities, as a number of σ (Wilson and Hilferty); bins with few draws are pooled."""
    n = counts.sum()
    assert (counts[p == 0] == 0).all(), "a token of probability 0 was drawn"
    order = np.argsort(-p)
    expected, seen = n * p[order], counts[order]
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    if expected[-1] < 10 and len(expected) > 1:  # the pool itself is rare: into its neighbour
        expected, seen = np.append(expected[:-2], expected[-2:].sum()), np.append(seen[:-2], seen[-2:].sum())
    k = len(expected) - 1
    assert k >= 1, "one bin tests nothing"
    chi = float(((seen - expected) ** 2 / expected).sum())
    return ((chi / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def counts_of(tokens: torch.Tensor, width: int) -> np.ndarray[Any, Any]:
    return torch.bincount(tokens.flatten(), minlength=width).numpy().astype(float)


def law(z: torch.Tensor, temperature: float = 1.0, kept: torch.Tensor | None = None) -> np.ndarray[Any, Any]:
    z = z.double() / temperature
    return (z if kept is None else z.masked_fill(~kept, -torch.inf)).softmax(-1).numpy()
