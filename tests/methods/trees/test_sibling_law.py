"""Siblings that repel each other: their joint law by enumeration, and that their weights are unbiased."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.draws import sigmas
from support.siblings import How, Text, distribution, penalty_of, repelled, texts_of
from support.tiny import EOS
from support.trees import START, grow, reference_logits, small_model

from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.methods.trees.tree import ForkTree


@functools.cache
def small_logits(text: Text) -> np.ndarray:
    return reference_logits(small_model(), torch.tensor([*START, *text])).double().numpy()


Law = dict[tuple[Text, ...], tuple[float, tuple[float, ...]]]
"""Of every outcome its probability, and what each sibling weighs in it, N times."""


@functools.cache
def joint_law(n: int, length: int, how: How) -> Law:
    """The law of n siblings by enumeration, token after token and sibling after sibling."""
    out: Law = {}

    def ended(text: Text) -> bool:
        return len(text) > 0 and text[-1] == EOS

    def go(texts: tuple[Text, ...], weights: tuple[float, ...], i: int, t: int, probability: float) -> None:
        if t == length:
            out[texts] = (probability, weights)
            return
        if i == n:
            go(texts, weights, 0, t + 1, probability)
            return
        if ended(texts[i]):
            go(texts, weights, i + 1, t, probability)
            return
        p, entropy = distribution(small_logits(texts[i]), how)
        q = repelled(p, penalty_of(texts, i, t, how, len(p))) if entropy > how.threshold else p
        for token in np.flatnonzero(q).tolist():
            longer = (*texts[:i], (*texts[i], token), *texts[i + 1 :])
            more = (*weights[:i], weights[i] * float(p[token] / q[token]), *weights[i + 1 :])
            go(longer, more, i + 1, t, probability * float(q[token]))

    go(((),) * n, (1.0,) * n, 0, 0, 1.0)
    assert math.fsum(q for q, _ in out.values()) == pytest.approx(1)
    return out


def own_law(length: int, how: How) -> dict[Text, float]:
    """The probability of every text of one sample."""
    return {text: q for (text,), (q, _) in joint_law(1, length, how).items()}


TREES = 3000
# Everything that decides a draw at least once: rank, places after a step, truncation, both repulsions, ends, thresholds
# in the middle of the entropies (0.9 to 1.6 nats here).
LAWS: dict[str, tuple[int, int, How]] = {
    "first-token": (3, 1, How(repulsion=1.0)),
    "two-tokens": (2, 2, How(repulsion=2.5, temperature=1.3, top_k=4)),
    "three-siblings": (3, 2, How(repulsion=0.8, top_k=3)),
    "some-forks": (2, 2, How(repulsion=2.5, threshold=1.3)),
    "bigrams": (2, 3, How(repulsion=2.0, ngram=2, ngram_repulsion=1.5, top_k=3)),
    "bigrams-alone": (2, 3, How(repulsion=0.0, ngram=2, ngram_repulsion=1.5, temperature=0.8, top_k=3)),
    "nucleus": (2, 2, How(repulsion=2.5, top_p=0.8)),
    "fork-temperature": (3, 2, How(repulsion=2.5, threshold=1.3, fork_temperature=2.0, temperature=0.7, top_k=3)),
    "strong": (3, 1, How(repulsion=30.0)),
}


@functools.cache
def drawn(which: str) -> tuple[tuple[ForkTree, ...], Law]:
    n, length, how = LAWS[which]
    ids = torch.tensor([START]).repeat(TREES, 1)
    loop = how.loop(siblings=n, seed=5, stream_ids=range(TREES))
    out = grow(small_model(), loop, ids, max_new_tokens=length, eos_token_id=EOS, **how.draw)
    return tuple(out.trees), joint_law(n, length, how)


def deviation(trees: Sequence[ForkTree], law: Law) -> float:
    """χ² of the outcomes against a law, in σ; an outcome that it does not know is an infinite deviation."""
    outcomes = list(law)
    place = {outcome: i for i, outcome in enumerate(outcomes)}
    counts = np.zeros(len(outcomes))
    for tree in trees:
        found = place.get(tuple(texts_of(tree)))
        if found is None:
            return math.inf
        counts[found] += 1
    return abs(sigmas(counts, np.array([law[outcome][0] for outcome in outcomes])))


@pytest.mark.parametrize("which", LAWS)
def test_the_joint_law_is_the_enumerated_one(which: str) -> None:
    trees, law = drawn(which)
    assert deviation(trees, law) < 4
    # Controls: siblings that do not see each other would have been noticed, and so would half of the repulsion.
    n, length, how = LAWS[which]
    without = How(**{**vars(how), "repulsion": 0.0, "ngram": None})
    half = How(**{**vars(how), "repulsion": how.repulsion / 2, "ngram_repulsion": how.ngram_repulsion / 2})
    assert deviation(trees, joint_law(n, length, without)) > 8
    if which != "strong":
        assert deviation(trees, joint_law(n, length, half)) > 4


def shifts(trees: Sequence[ForkTree], law: Law, p: dict[Text, float], number: int | None, weighed: bool) -> np.ndarray:
    """How far estimates of each text's probability are from p, in standard errors, which are enumerated as well.

    Weights reach far up, so that an error estimated from the same draws would be too small where few of them are large.

    Args:
        trees: What was drawn.
        law: The law of that.
        p: The law of one sample.
        number: Which sibling estimates by itself; None for all together.
        weighed: Whether by their weights, or as if these were all the same.
    """
    common = [text for text, q in p.items() if q >= 0.01]

    def value(texts: Sequence[Text], weights: Sequence[float], text: Text) -> float:
        of = [w if weighed else 1.0 for w in weights]
        if number is not None:
            return of[number] if texts[number] == text else 0.0
        return sum(w for w, t in zip(of, texts, strict=True) if t == text) / len(of)

    out = []
    seen = [(texts_of(tree), [len(tree) * math.exp(b.log_weight) for b in tree]) for tree in trees]
    for text in common:
        moments = [math.fsum(q * value(texts, w, text) ** k for texts, (q, w) in law.items()) for k in (1, 2)]
        assert not weighed or moments[0] == pytest.approx(p[text])  # the weights that ours are compared with
        error = math.sqrt((moments[1] - moments[0] ** 2) / len(trees))
        mean = math.fsum(value(texts, w, text) for texts, w in seen) / len(trees)
        out.append((mean - p[text]) / error)
    return np.array(out)


@pytest.mark.parametrize("which", [which for which in LAWS if which != "strong"])
def test_the_weights_are_unbiased_and_equal_ones_are_not(which: str) -> None:
    trees, law = drawn(which)
    n, length, how = LAWS[which]
    p = own_law(length, how)
    for number in (None, *range(n)):
        z = shifts(trees, law, p, number, weighed=True)
        assert np.abs(z).max() < 4, (number, z)
    # The control: what the weights are for. The last sibling is repelled by all others.
    biased = shifts(trees, law, p, n - 1, weighed=False)
    assert np.abs(biased).max() > 6, biased
    totals = np.array([math.fsum(math.exp(branch.log_weight) for branch in tree) for tree in trees])
    error = math.sqrt(math.fsum(q * (sum(w) / n - 1) ** 2 for q, w in law.values()) / TREES)
    assert abs(totals.mean() - 1) < 4 * error


def test_random_places_are_the_control() -> None:
    """A share of the places, whatever their entropy; siblings at one place are at a fork together."""
    ids = torch.tensor([START]).repeat(400, 1)
    loop = SiblingDecoding(where="random", share=0.3, siblings=3, repulsion=40.0, seed=1, stream_ids=range(400))
    out = grow(small_model(), loop, ids, max_new_tokens=1, eos_token_id=None)
    apart = 0
    for tree in out.trees:
        tokens = [b.tokens[0] for b in tree]
        assert {len(b.forks) for b in tree.branches[1:]} in ({0}, {1})
        if tree.branches[1].forks:
            assert len(set(tokens)) == 3
            apart += 1
    assert abs(apart - 120) < 4 * math.sqrt(400 * 0.3 * 0.7)
    # Their weights are exact as well.
    p = {text[0]: q for text, q in own_law(1, How()).items()}
    weak = SiblingDecoding(where="random", share=0.5, siblings=3, repulsion=1.5, seed=1, stream_ids=range(400))
    for tree in grow(small_model(), weak, ids, max_new_tokens=1, eos_token_id=EOS).trees:
        before: Counter[int] = Counter()
        for branch in tree:
            token = branch.tokens[0]
            left = sum(q * math.exp(-1.5 * before[v]) for v, q in p.items())
            want = math.log(left) + 1.5 * before[token] if branch.forks else 0.0
            assert branch.log_weight + math.log(3) == pytest.approx(want, abs=1e-4)
            before[token] += 1


def test_fewer_siblings_are_still_unbiased() -> None:
    """How many begin is known before anything is drawn: N is that number."""
    how = How(repulsion=1.0)
    ids = torch.tensor([START]).repeat(TREES, 1)
    loop = how.loop(siblings=8, seed=6, stream_ids=range(TREES), max_total_tokens=3 + 5)
    trees = grow(small_model(), loop, ids, max_new_tokens=2, eos_token_id=EOS).trees
    assert {len(tree) for tree in trees} == {2}
    law = joint_law(2, 2, how)
    assert np.abs(shifts(trees, law, own_law(2, how), None, weighed=True)).max() < 4
    assert deviation(trees, law) < 4
