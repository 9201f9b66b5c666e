"""The weights of forks: unbiased, by enumeration of every text."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import EOS
from support.trees import LOW, SMALL, START, grow, reference_logits, small_model

from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.methods.trees.tree import ForkTree

TREES = 2500


@functools.cache
def law(temperature: float, top_k: int, length: int, ends: bool) -> dict[tuple[int, ...], float]:
    """The probability of every full sequence, by enumeration."""
    model, out = small_model(), {}

    def go(text: tuple[int, ...], p: float) -> None:
        if len(text) == length or (ends and text and text[-1] == EOS):
            out[text] = p
            return
        with torch.no_grad():
            logits = model(torch.tensor([(*START, *text)]), use_cache=False).logits[0, -1].double() / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        for token, q in enumerate(logits.softmax(-1).tolist()):
            if q:
                go((*text, token), p * q)

    go((), 1.0)
    assert math.fsum(out.values()) == pytest.approx(1)
    return out


def estimates(trees: Sequence[ForkTree], p: dict[tuple[int, ...], float], weigh: Any) -> np.ndarray:
    """Differences from p in standard errors, `[N]`; sequences too rare for a normal law are put together."""
    common = [s for s, q in p.items() if q >= 0.004]
    place = {s: i for i, s in enumerate(common)}
    found = np.zeros((len(trees), len(common) + 1))
    for row, tree in enumerate(trees):
        for branch, weight in zip(tree, weigh(tree), strict=True):
            found[row, place.get(tuple(branch.along("tokens")), len(common))] += weight
    want = np.array([p[s] for s in common])
    want = np.append(want, 1 - want.sum())
    error = np.maximum(found.std(0), 1e-6) / math.sqrt(len(trees))
    return (found.mean(0) - want) / error


def kool(tree: ForkTree) -> list[float]:
    return [math.exp(branch.log_weight) for branch in tree]


def equal(tree: ForkTree) -> list[float]:
    return [1 / len(tree)] * len(tree)


LAWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forks": ({"threshold": 1.2, "branches": 4}, {"top_k": 5}),
    "forks-hot": ({"threshold": 0.9, "branches": 5, "children": 3}, {"temperature": 1.7, "top_k": 4}),
    "forks-gap": ({"threshold": LOW, "branches": 4, "min_gap": 2}, {"temperature": 0.8, "top_k": 3}),
    "random": ({"where": "random", "share": 0.4, "branches": 4, "children": 3}, {"temperature": 1.3, "top_k": 5}),
    "random-k": ({"where": "random", "share": 0.5, "branches": 4}, {"temperature": 1.3, "top_k": 3}),
    "start": ({"where": "start", "branches": 3}, {"temperature": 1.2, "top_k": 4}),
    "start-all": ({"where": "start", "branches": 4}, {"temperature": 1.2, "top_k": 4}),
    "start-some-left": ({"where": "start", "branches": 4}, {"top_k": 3}),
    "budget": ({"threshold": 1.0, "branches": 5, "max_total_tokens": 10}, {"ends": True}),
}


@pytest.mark.parametrize("which", LAWS)
def test_the_weights_are_unbiased_and_equal_ones_are_not(which: str) -> None:
    options, draw = LAWS[which]
    length, ends = 3, draw.get("ends", False)
    temperature, top_k = draw.get("temperature", 1.0), draw.get("top_k", 0)
    ids = torch.tensor([START]).repeat(TREES, 1)
    loop = ForkDecoding(seed=11, stream_ids=range(TREES), **options)
    more = {"eos_token_id": EOS if ends else None, "temperature": temperature, "top_k": top_k}
    out = grow(small_model(), loop, ids, max_new_tokens=length, **more)
    p = law(temperature, top_k, length, ends)
    z = estimates(out.trees, p, kool)
    assert np.abs(z).max() < 4, z
    assert Counter(len(tree) > 1 for tree in out.trees)[True] > TREES // 20
    # The control: what the weights are for.
    biased = estimates(out.trees, p, equal)
    assert np.abs(biased).max() > 8, biased
    # Σ w is 1 on average, and exactly after normalisation.
    totals = np.array([sum(kool(tree)) for tree in out.trees])
    assert abs(totals.mean() - 1) < 4 * totals.std() / math.sqrt(TREES) + 1e-6
    normalised = np.array([math.fsum(tree.weights()) for tree in out.trees])
    assert np.abs(normalised - 1).max() < 1e-12
    assert out.weights.tolist() == [w for tree in out.trees for w in tree.weights()]
    assert out.log_weights.tolist() == [b.log_weight for tree in out.trees for b in tree]


def test_all_children_at_the_start_weigh_their_probabilities() -> None:
    ids = torch.tensor([START])
    out = grow(small_model(), ForkDecoding(where="start", branches=SMALL, seed=1), ids, max_new_tokens=1)
    logp = reference_logits(small_model(), ids[0]).log_softmax(-1)
    assert sorted(b.tokens[0] for b in out.trees[0]) == list(range(SMALL))
    for branch in out.trees[0]:
        assert branch.log_weight == pytest.approx(float(logp[branch.tokens[0]]), abs=1e-5)
