"""The reference for siblings that repel each other.

It shares nothing with the loop: every prefix is forwarded anew without a cache, distributions are cut and penalised in
float64, and who is repelled by what is counted from the finished texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from support.trees import LOW

from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.methods.trees.tree import ForkTree

Text = tuple[int, ...]


@dataclass(frozen=True)
class How:
    """How tokens are drawn, and what repels."""

    threshold: float = LOW
    repulsion: float = 0.5
    ngram: int | None = None
    ngram_repulsion: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    fork_temperature: float | None = None

    def loop(self, **more: Any) -> SiblingDecoding:
        names = ("threshold", "repulsion", "ngram", "ngram_repulsion", "fork_temperature")
        return SiblingDecoding(**{name: getattr(self, name) for name in names} | more)

    @property
    def draw(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def distribution(logits: np.ndarray, how: How) -> tuple[np.ndarray, float]:
    """p after temperature and truncation, `[V]`, and the entropy before, nats; float64."""
    raw = np.exp(logits - logits.max())
    raw /= raw.sum()
    entropy = float(-(raw[raw > 0] * np.log(raw[raw > 0])).sum())
    hot = how.fork_temperature is not None and entropy > how.threshold
    z = logits / (how.fork_temperature if hot else how.temperature)
    if how.top_k:
        z = np.where(z >= np.sort(z)[-how.top_k], z, -np.inf)
    p = np.exp(z - z.max())
    p /= p.sum()
    if how.top_p < 1:
        order = np.argsort(-p)
        last = int(np.argmax(np.cumsum(p[order]) >= how.top_p))
        p = np.where(p >= p[order[last]], p, 0.0)
        p /= p.sum()
    return p, entropy


def penalty_of(texts: Sequence[Text], i: int, t: int, how: How, width: int) -> np.ndarray:
    """What is subtracted for sibling i's token t, `[V]`, counted from texts that may be longer than they were then."""
    out = np.zeros(width)
    mine = texts[i][:t]
    for j, other in enumerate(texts):
        if j < i and len(other) > t and other[:t] == mine:
            out[other[t]] += how.repulsion
        if how.ngram is None or j == i:
            continue
        n = how.ngram
        for s in range(n - 1, min(t, len(other))):
            if t >= n - 1 and other[s - n + 1 : s] == mine[t - n + 1 :]:
                out[other[s]] += how.ngram_repulsion
    return out


def repelled(p: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    q = p * np.exp(-penalty)
    return q / q.sum()


def texts_of(tree: ForkTree) -> list[Text]:
    return [tuple(branch.along("tokens")) for branch in tree]
