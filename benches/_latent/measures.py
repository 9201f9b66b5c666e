"""The metrics of `bench_latent.py`, and how two methods are paired at equal passes.

The unit of cost is one pass of a row through a stack of layers. Per token fed back, a Llama takes one; an HRM takes, in
each of `H_cycles` cycles, one of the high-level stack and `L_cycles` of the low-level stack. The last token of an
answer is not fed back. The prompt's first pass is not counted. Where noise changes the prompt's states, each trajectory
needs its own pass over the prompt; that counts as one more, whatever the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from proxytune.methods.recursion.selection import select_one
from proxytune.stats.bootstrap import Interval
from proxytune.stats.coverage import pass_at_k

SIZES = (4, 16)
"""N of the metrics that depend on the number of samples."""
METRICS = ("valid", *(f"{what}@{n}" for n in SIZES for what in ("pass", "distinct", "coverage")))
SELECTIONS = ("vote@16", "logprob@16")
Values = np.ndarray
"""One value per instance."""


def stack_passes(config: Any) -> int:
    """Passes through a stack of layers in one forward pass of a model."""
    if getattr(config, "model_type", "") == "hrm_text":
        return int(config.H_cycles) * (int(config.L_cycles) + 1)
    return 1


@dataclass(frozen=True)
class Answered:
    """One method's answers to one instance.

    Attributes:
        found: The solution of each sample or leaf; None for an invalid answer.
        passes: Of all of them together.
        solutions: Number of solutions of the instance.
        tree: Whether they are leaves of one tree, of which no smaller number can be taken.
        texts: Generated ids of each, for selectors; empty if nothing is selected. `answers` and `logprobs` likewise.
        answers: What a vote counts.
        logprobs: Mean log-probability of each.
    """

    found: list[Hashable | None]
    passes: int
    solutions: int
    tree: bool = False
    texts: list[list[int]] = field(default_factory=list)
    answers: list[Hashable] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def at(self, metric: str, k: float) -> float:
        """A metric of `k` samples, linear between whole numbers; for a tree, of all its leaves.

        The number in the metric's name is ignored. The estimate is unbiased for independent samples.
        """
        what = metric.partition("@")[0]
        if what == "valid":
            return sum(one is not None for one in self.found) / len(self.found)
        if what in ("vote", "logprob"):
            return between(k, lambda n: self._selected(what, n))
        counts = _counts(self.found)
        if self.tree:
            distinct, some = float(len(counts)), float(bool(counts))
        else:
            total = len(self.found)
            distinct = between(k, lambda n: sum(pass_at_k(count, total, n) for count in counts.values()))
            some = between(k, lambda n: pass_at_k(sum(counts.values()), total, n))
        return {"pass": some, "distinct": distinct, "coverage": distinct / self.solutions}[what]

    def _selected(self, select: Any, n: int) -> float:
        """How often the selected one of n is right, over disjoint blocks of n."""
        right = []
        for first in range(0, len(self.found) - n + 1, n):
            block = slice(first, first + n)
            answers = dict(zip(map(tuple, self.texts[block]), self.answers[block], strict=True))
            how = {"answer": lambda ids, of=answers: of[tuple(ids)]} if select == "vote" else {}
            best, _ = select_one(select, self.texts[block], self.logprobs[block], **how)
            right.append(self.found[first + best] is not None)
        return float(np.mean(right))


def _counts(found: Sequence[Hashable | None]) -> dict[Hashable, int]:
    out: dict[Hashable, int] = {}
    for one in found:
        if one is not None:
            out[one] = out.get(one, 0) + 1
    return out


def between(k: float, of: Callable[[int], float]) -> float:
    """A function of whole numbers, interpolated linearly; 0 for 0 samples."""
    low = int(k)
    value = of(low) if low else 0.0
    return value if k == low else value + (k - low) * (of(low + 1) - value)


def uniform_bound(solutions: int, n: int) -> float:
    """Expected coverage of n independent samples, uniform over the solutions: `1 − (1 − 1/S)^n`."""
    return 1.0 - (1.0 - 1.0 / solutions) ** n


def per_sample(answered: Sequence[Answered]) -> float:
    """Mean passes of a sample, or of a tree."""
    return float(np.mean([a.passes / (1 if a.tree else len(a.found)) for a in answered]))


def size_of(metric: str) -> int:
    """N in a metric's name; 1 if there is none."""
    return int(metric.partition("@")[2] or 1)


@dataclass(frozen=True)
class Pair:
    """A method and a reference at equal passes.

    Attributes:
        method: The method's value per instance.
        reference: The reference's.
        samples: Samples of the method and of the reference.
        passes: Passes per instance.
    """

    method: Values
    reference: Values
    samples: tuple[float, float]
    passes: float

    @property
    def differences(self) -> Values:
        """Method − reference."""
        return self.method - self.reference


def compare(method: Sequence[Answered], reference: Sequence[Answered], metric: str) -> Pair:
    """Values of both at as many passes as N samples of the reference take.

    A tree keeps its own number of passes, and the reference gets as many. If either would need more samples than were
    drawn, both get the passes of the samples drawn.
    """
    one, other = per_sample(method), per_sample(reference)
    most = len(reference[0].found) * other
    if method[0].tree:
        passes = min(one, most)
        samples = (float(len(method[0].found)), passes / other)
    else:
        passes = min(size_of(metric) * other, most, len(method[0].found) * one)
        samples = (passes / one, passes / other)
    return Pair(
        np.array([a.at(metric, min(samples[0], len(a.found))) for a in method]),
        np.array([a.at(metric, min(samples[1], len(a.found))) for a in reference]),
        samples,
        passes,
    )


def pooled(groups: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean over groups (one per training seed) of their means; percentile bootstrap within each group."""
    sums, value = np.zeros(draws), 0.0
    for number, group in enumerate(groups):
        array = np.asarray(group, np.float64)
        assert np.isfinite(array).all()
        sums += _resampled(len(array), draws, seed + number) @ array / len(array) / len(groups)
        value += float(array.mean()) / len(groups)
    low, high = np.quantile(sums, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


@lru_cache(maxsize=16)
def _resampled(count: int, draws: int, seed: int) -> Values:
    """How often each of `count` values is in each resample, `[draws, count]`."""
    found: Values = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return found.astype(np.float64)
