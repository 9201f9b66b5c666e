"""Siblings that repel each other: their joint law by enumeration, their weights by hand, budgets, costs, refusals.

The reference shares nothing with the loop: every prefix is forwarded anew without a cache, distributions are cut and
penalised in float64, and who is repelled by what is counted from the finished texts.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.trees.test_fork_decoding import (
    ALPHA,
    HIGH,
    LOW,
    MIDDLE,
    START,
    Break,
    Streamer,
    check_branches,
    composed,
    described,
    grow,
    padded,
    reference_logits,
    small_model,
)
from ops.test_law import sigmas
from support.tiny import EOS, PAD, shared
from transformers import LogitsProcessor

import proxytune
from proxytune import FusedDecoding, ops
from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, InputError, NumericalError, UnsupportedModeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.frontier import RowDraws
from proxytune.methods.trees.repulsion import MOST_FOLLOWERS, SiblingFrontier
from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.methods.trees.tree import ForkTree
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

Text = tuple[int, ...]


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1)


# --- the reference --------------------------------------------------------------------------------------------------


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


def log_weights_of(
    model: Any, prompt: torch.Tensor, texts: Sequence[Text], how: How
) -> tuple[list[float], list[list[int]]]:
    """Σ (log p − log q) of each sibling, and where it was repelled."""
    out, forks = [], []
    for i, text in enumerate(texts):
        total, at = 0.0, []
        for t, token in enumerate(text):
            logits = reference_logits(model, torch.cat([prompt, torch.tensor(text[:t], dtype=torch.long)]))
            p, entropy = distribution(logits.double().numpy(), how)
            assert p[token] > 0
            penalty = penalty_of(texts, i, t, how, len(p))
            if entropy > how.threshold and penalty.any():
                total += math.log(p[token]) - math.log(repelled(p, penalty)[token])
                at.append(t)
        out.append(total)
        forks.append(at)
    return out, forks


def texts_of(tree: ForkTree) -> list[Text]:
    return [tuple(branch.along("tokens")) for branch in tree]


# --- the law --------------------------------------------------------------------------------------------------------


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


# --- the records, by hand -------------------------------------------------------------------------------------------

HOWS: dict[str, How] = {
    "siblings": How(repulsion=0.5),
    "forks": How(threshold=MIDDLE, repulsion=1.0, ngram=2),
    "bigrams": How(repulsion=0.5, ngram=2, ngram_repulsion=1.0, temperature=0.6, top_k=20, top_p=0.9),
    "trigrams": How(repulsion=0.0, ngram=3, ngram_repulsion=2.0, temperature=0.4),
    "fork-temperature": How(threshold=MIDDLE, ngram=2, temperature=0.5, fork_temperature=1.2, top_p=0.8),
}


@pytest.mark.smoke
@pytest.mark.parametrize("which", HOWS)
def test_every_record_equals_a_recomputation(model: Any, which: str) -> None:
    ids, mask = padded()
    how = HOWS[which]
    out = grow(model, how.loop(siblings=5, seed=4), ids, mask, **how.draw)
    check_branches(model, out, ids, mask)
    moved = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        assert len(tree) == 5
        assert [b.number for b in tree] == list(range(5))
        assert [b.parent for b in tree] == [None, *[tree.branches[0]] * 4]
        assert [b.start for b in tree] == [0] * 5
        want, forks = log_weights_of(model, prompt[kept], texts_of(tree), how)
        assert [b.log_weight + math.log(5) for b in tree] == pytest.approx(want, abs=1e-3)
        assert [b.forks for b in tree] == forks
        moved += sum(map(len, forks))
    assert moved > 3
    assert out.log_weights.tolist() == [b.log_weight for tree in out.trees for b in tree]
    assert out.weights.tolist() == [w for tree in out.trees for w in tree.weights()]
    assert out.prompts.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert out.ledgers is None


class Fixed(LogitsProcessor):
    """The same logits everywhere."""

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.values.expand(scores.shape[0], -1)


@pytest.mark.parametrize("repulsion", [12.0, 40.0])
def test_weights_where_almost_everything_is_repelled(repulsion: float) -> None:
    """The first token has all but e^-18: taken from 1, what is left of p would have no digit in float32."""
    values = [0.0, -18.0, -19.0, -20.0, -30.0, -31.0]
    how = How(repulsion=repulsion)
    out = grow(
        small_model(),
        how.loop(siblings=3, seed=2),
        torch.tensor([START]).repeat(20, 1),
        max_new_tokens=1,
        eos_token_id=None,
        logits_processor=[Fixed(*values)],
    )
    p, _ = distribution(np.array(values), how)
    second = Counter()
    for tree in out.trees:
        texts = texts_of(tree)
        for i, branch in enumerate(tree):
            q = repelled(p, penalty_of(texts, i, 0, how, 6))
            want = math.log(p[texts[i][0]]) - math.log(q[texts[i][0]])
            assert branch.log_weight + math.log(3) == pytest.approx(want, abs=2e-5)
        second[texts[1][0]] += 1
    assert (second[0] == 20) == (repulsion < 18)


# --- neutral settings -----------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, prompt: torch.Tensor, row: int, branch: int, seed: int, temperature: float, top_k: int) -> Text:
    """One sample, without a cache, from the keyed noise of a sibling."""
    text: Text = ()
    while len(text) < 10 and EOS not in text:
        logits = reference_logits(model, torch.cat([prompt, torch.tensor(text, dtype=torch.long)]))[None]
        step = ops.step(
            [logits],
            sampling=SamplingParams.of(1, temperature=temperature, top_k=top_k),
            noise=Noise.of(1, seed=seed, row=torch.tensor([row]), position=len(prompt) + len(text), branch=branch),
        )
        text += (int(step.tokens),)
    return text


@pytest.mark.parametrize(
    "neutral",
    [{"repulsion": 0}, {"repulsion": 0.0, "ngram": 2, "ngram_repulsion": 0}, {"threshold": HIGH, "ngram": 2}],
    ids=str,
)
def test_without_repulsion_they_are_independent_samples(model: Any, neutral: dict[str, Any]) -> None:
    ids, mask = padded()
    draw = {"temperature": 1.3, "top_k": 20}
    out = grow(model, SiblingDecoding(siblings=3, seed=5, **neutral), ids, mask, **draw)
    assert out.log_weights.tolist() == [-math.log(3)] * 9
    assert out.weights.tolist() == pytest.approx([1 / 3] * 9, abs=1e-15)
    assert not any(b.forks for tree in out.trees for b in tree)
    first = grow(model, FusedDecoding(seed=5), ids, mask, **draw).sequences
    for tree, prompt, kept, fused in zip(out.trees, ids, mask.bool(), first, strict=True):
        texts = texts_of(tree)
        assert texts == [by_hand(model, prompt[kept], tree.prompt, i, 5, 1.3, 20) for i in range(3)]
        assert fused[12 : 12 + len(texts[0])].tolist() == list(texts[0])


def test_only_forks_are_touched() -> None:
    """Up to the first place above the threshold that two siblings share, they are what they are without repulsion."""
    model = shared("llama", 1)
    ids, mask = padded()
    draw = {"temperature": 0.5}  # so that some say the same
    free = grow(model, SiblingDecoding(siblings=6, seed=3, repulsion=0), ids, mask, **draw)
    out = grow(model, SiblingDecoding(siblings=6, seed=3, repulsion=5.0, threshold=MIDDLE), ids, mask, **draw)
    changed = 0
    for a, b in zip(free.trees, out.trees, strict=True):
        for before, after in zip(a, b, strict=True):
            first = min(after.forks, default=NEW_TOKENS)
            assert before.tokens[:first] == after.tokens[:first]
            assert all(after.entropies[at] > MIDDLE for at in after.forks)
            changed += before.tokens != after.tokens
    assert changed > 2


NEW_TOKENS = 10


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


# --- the same whatever is around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["siblings", "forks", "bigrams"])
def test_siblings_do_not_depend_on_the_batch_around_them(which: str) -> None:
    model = composed(dtype=torch.float64)
    ids, mask = padded()
    how = HOWS[which]
    seeded = functools.partial(how.loop, siblings=4, seed=3, max_total_tokens=48)
    together = grow(model, seeded(), ids, mask, **how.draw)
    assert [len(tree) for tree in together.trees] == [3, 4, 4]
    for row in range(3):
        alone = grow(model, seeded(stream_ids=[row]), ids[row : row + 1, 12 - int(mask[row].sum()) :], **how.draw)
        assert described(alone.trees[0]) == described(together.trees[row])
        assert alone.ledgers[0].spent == together.ledgers[row].spent
        assert alone.trees[0].weights() == pytest.approx(together.trees[row].weights(), rel=1e-4)
    order = [2, 0, 1]
    wider = [torch.nn.functional.pad(x[order], (4, 0), value=fill) for x, fill in ((ids, PAD), (mask, 0))]
    mixed = grow(model, seeded(stream_ids=order), *wider, **how.draw)
    assert [described(mixed.trees[order.index(row)]) for row in range(3)] == list(map(described, together.trees))


def test_seeds(model: Any) -> None:
    ids, mask = padded()
    trees = [grow(model, SiblingDecoding(threshold=MIDDLE, seed=seed), ids, mask).trees for seed in (1, 2, 1)]
    assert described(trees[0][0]) == described(trees[2][0]) != described(trees[1][0])
    two = grow(model, SiblingDecoding(threshold=MIDDLE, seed=1), ids[:1], mask[:1], num_return_sequences=2)
    assert described(two.trees[0]) == described(trees[0][0]) != described(two.trees[1])


@pytest.mark.parametrize("kinds", [("mistral", "llama", "gemma3"), ("qwen3", "llama", "llama")], ids="-".join)
def test_members_with_sliding_windows(kinds: tuple[str, ...]) -> None:
    ids, mask = padded()
    model = composed(*kinds)
    out = grow(model, SiblingDecoding(threshold=LOW, siblings=3, seed=1), ids, mask, max_new_tokens=14)
    check_branches(model, out, ids, mask)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "mistral", "gpt2"])
def test_plain_models_with_other_states(kind: str) -> None:
    ids = padded()[0][:1]
    model = shared(kind, 1)
    out = grow(model, SiblingDecoding(threshold=LOW, siblings=3, seed=1), ids)
    check_branches(model, out, ids, torch.ones_like(ids))


def test_as_many_prompts_as_tokens_and_no_cache(model: Any) -> None:
    """Tensors of the batch are told by their number of rows: three prompts of three tokens must not confuse it."""
    ids = padded()[0][:, 9:].contiguous()
    loop = SiblingDecoding(threshold=MIDDLE, siblings=3, seed=3)
    out = grow(model, loop, ids)
    check_branches(model, out, ids, torch.ones_like(ids))
    without = grow(model, loop, ids, use_cache=False)
    assert list(map(described, out.trees)) == list(map(described, without.trees))
    assert torch.equal(grow(model, loop, ids, return_dict_in_generate=False), out.sequences)


# --- costs and budgets ----------------------------------------------------------------------------------------------


def test_a_prompt_is_forwarded_once() -> None:
    model = composed()
    ids, mask = padded()
    before = dict(model.token_forwards)
    ends = list(range(3, 60))
    out = grow(model, SiblingDecoding(threshold=MIDDLE, siblings=6, seed=3), ids, mask, eos_token_id=ends)
    assert len({len(b) for tree in out.trees for b in tree}) > 2, "rows end at different steps"
    generated = sum(tree.tokens for tree in out.trees)
    for role, count in model.token_forwards.items():
        # Padding is forwarded too; the last token of a sibling never is.
        assert count - before[role] == ids.numel() + generated - 18


def test_a_plain_model_forwards_its_prompt_once() -> None:
    model = copy.deepcopy(shared("llama", 1))
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(tuple(args[0].shape)))
    ids, mask = padded()
    grow(model, SiblingDecoding(siblings=4, repulsion=0, seed=3), ids, mask, eos_token_id=None)
    assert seen == [(3, 12), *[(12, 1)] * 9]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    siblings=st.integers(1, 6),
    repulsion=st.sampled_from([0.0, 0.5, 9.0]),
    ngram=st.sampled_from([None, 2, 3]),
    budget=st.none() | st.integers(6, 40),
    length=st.integers(1, 8),
    top_k=st.sampled_from([0, 1, 2, 4]),
)
def test_budgets_hold(
    seed: int, siblings: int, repulsion: float, ngram: int | None, budget: int | None, length: int, top_k: int
) -> None:
    ids = torch.tensor([[3, 4, 5, 1, 4], [PAD, PAD, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    how = How(repulsion=repulsion, ngram=ngram, temperature=1.5, top_k=top_k)
    loop = how.loop(siblings=siblings, seed=seed, max_total_tokens=budget)
    out = grow(small_model(), loop, ids, mask, max_new_tokens=length, eos_token_id=EOS, **how.draw)
    for tree, prompt in zip(out.trees, (ids[0], ids[1, 2:]), strict=True):
        room = siblings if budget is None else max(1, min(siblings, (budget - len(prompt)) // length))
        assert len(tree) == room
        if budget is not None:
            ledger = out.ledgers[tree.prompt]
            assert ledger.spent == len(prompt) + tree.tokens <= budget
            assert ledger.held == 0
            assert ledger.by == {"prompt": len(prompt), "generated": tree.tokens}
        for branch in tree:
            assert branch.finished == (branch.tokens[-1] == EOS)
            assert EOS not in branch.tokens[:-1]
            short = budget is not None and len(branch) == budget - len(prompt)
            assert branch.finished or len(branch) == length or (short and room == 1)
        want, _ = log_weights_of(small_model(), prompt, texts_of(tree), how)
        assert [b.log_weight + math.log(room) for b in tree] == pytest.approx(want, abs=1e-3)


def test_a_budget_without_a_token_after_the_prompt_is_refused(model: Any) -> None:
    ids, mask = padded()
    with pytest.raises(BudgetError, match="at least 13: prompt 0 has 12 tokens.*got 12. Raise"):
        grow(model, SiblingDecoding(repulsion=0, max_total_tokens=12), ids, mask)


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


# --- refusals -------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold: expected a finite number of nats; got None. `proxytune calibrate`"),
        ({"repulsion": 0, "ngram": 2}, "threshold: expected a finite number of nats; got None"),
        ({"repulsion": 0, "fork_temperature": 1.0}, "threshold: expected a finite number of nats; got None"),
        ({"where": "start"}, "where: expected 'forks' or 'random'; got 'start'"),
        ({"threshold": NAN}, "threshold: expected a finite number of nats; got nan"),
        ({"threshold": ForkThreshold.streaming()}, "threshold: expected a fixed or calibrated one"),
        ({"threshold": 1, "siblings": 0}, "siblings: expected a whole number, at least 1; got 0. Pass e.g. Sibling"),
        ({"threshold": 1, "siblings": 2.5}, "siblings: expected a whole number, at least 1; got 2.5"),
        ({"threshold": 1, "siblings": True}, "siblings: expected a whole number, at least 1; got True"),
        (
            {"threshold": 1, "repulsion": -0.5},
            r"repulsion: expected a number of nats in \[0, 1000\]; got -0.5. Pass 0",
        ),
        ({"threshold": 1, "repulsion": NAN}, r"repulsion: expected a number of nats in \[0, 1000\]; got nan"),
        ({"threshold": 1, "repulsion": INF}, r"repulsion: expected a number of nats in \[0, 1000\]; got inf"),
        ({"threshold": 1, "repulsion": "1"}, r"repulsion: expected a number of nats in \[0, 1000\]; got '1'"),
        ({"threshold": 1, "repulsion": True}, r"repulsion: expected a number of nats in \[0, 1000\]; got True"),
        ({"threshold": 1, "ngram_repulsion": -1}, r"ngram_repulsion: expected a number of nats in \[0, 1000\]; got -1"),
        ({"threshold": 1, "ngram": 1}, "ngram: expected a whole number, at least 2; got 1"),
        ({"threshold": 1, "ngram": 2.0}, "ngram: expected a whole number, at least 2; got 2.0"),
        ({"where": "random", "share": 1.0}, "share: expected a number in \\(0, 1\\); got 1.0"),
        ({"threshold": 1, "fork_temperature": 0}, "fork_temperature: expected a finite number > 0; got 0"),
        ({"threshold": 1, "max_total_tokens": 0}, "max_total_tokens: expected a whole number of tokens, at least 1"),
        ({"threshold": 1, "seed": 1 << 63}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "impl": "cuda"}, "impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SiblingDecoding(**options)


def test_calls_that_cannot_be_followed_are_refused(model: Any) -> None:
    ids, mask = padded()
    loop = SiblingDecoding(threshold=1.0)
    message = (
        "SiblingDecoding without sampling: expected do_sample=True; got greedy decoding. Greedy siblings would all"
    )
    with pytest.raises(UnsupportedModeError, match=message):
        grow(model, loop, ids, mask, do_sample=False)
    with pytest.raises(UnsupportedModeError, match="SiblingDecoding: expected greedy decoding or sampling"):
        grow(model, loop, ids, mask, num_beams=2)
    with pytest.raises(UnsupportedModeError, match="output_scores: expected none with SiblingDecoding"):
        grow(model, loop, ids, mask, output_scores=True)
    with pytest.raises(InputError, match="row"):
        grow(model, SiblingDecoding(threshold=1.0, stream_ids=[0, 1]), ids, mask)
    if hasattr(model, "members"):
        with pytest.raises(UnsupportedModeError, match="streamer: expected none with SiblingDecoding"):
            grow(model, loop, ids, mask, streamer=Streamer())
        other = SiblingDecoding(threshold=ForkThreshold(MIDDLE, alpha=2.0))
        with pytest.raises(InputError, match=f"threshold: expected one calibrated at α = {ALPHA}; got at α = 2.0"):
            grow(model, other, ids, mask)


@pytest.mark.parametrize(("value", "said"), [(NAN, "NaN or"), (-INF, "−inf for every token")])
def test_a_row_without_a_distribution_is_named(model: Any, value: float, said: str) -> None:
    ids, mask = padded()
    spoil = Break(value, 14, int(ids[1, 11]))
    with pytest.raises(NumericalError, match=f"prompt 1, branch 0: row 3 of 9, step 2 .*{said}"):
        grow(
            model,
            SiblingDecoding(threshold=LOW, siblings=3, seed=1),
            ids,
            mask,
            logits_processor=[spoil],
            eos_token_id=None,
        )


# --- the host's side alone ------------------------------------------------------------------------------------------


def found(*tokens: int, keys: Sequence[float] = (), wants: bool = True) -> RowDraws:
    keys = keys or [2.0 - i for i in range(len(tokens))]
    return RowDraws(tokens, [-1.0] * len(tokens), keys, [-1.5] * len(tokens), 1.5, 0.75, wants)


def plot(prompts: int = 1, **more: Any) -> SiblingFrontier:
    budget = more.pop("budget", None)
    ledgers = None if budget is None else [TokenLedger(budget) for _ in range(prompts)]
    defaults = {"siblings": 3, "repulsion": 0.5, "ngram": None, "ngram_repulsion": 0.5, "length": 9}
    return SiblingFrontier(prompts, **defaults | {"ledgers": ledgers} | more)


def test_siblings_decide_in_turn() -> None:
    one = plot(2)
    assert one.rows == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert one.most_draws() == 3
    near = [1.0, 0.7, 0.4]
    first = [found(7, 8, 9, keys=near) for _ in range(3)]
    other = [found(7, 8, 9, keys=near, wants=i > 0) for i in range(3)]
    parents, tokens = one.grow([*first, *other])
    # 7; then 8, as 7 has lost half a nat; then 7, as both have. In the other tree the first row says: no fork.
    assert (parents, tokens) == ([0, 1, 2, 3, 4, 5], [7, 8, 7, 7, 7, 7])
    assert one.penalties == [{}, {7: 0.5}, {7: 0.5, 8: 0.5}, {}, {}, {}]
    assert [b.forks for b in one.trees[0]] == [[], [0], [0]]
    assert one.prune([False] * 6) == list(range(6))
    # The first and the third have said the same so far; the second is alone.
    assert one.most_draws() == 3
    assert one.grow([found(1, 2)] * 6)[1] == [1, 1, 1, 1, 1, 1]
    assert one.penalties[:3] == [{}, {}, {1: 0.5}]
    assert one.penalties[3:] == [{}, {1: 0.5}, {1: 1.0}]
    assert one.prune([True, False, True, True, True, True]) == [1]
    assert one.most_draws() == 1
    assert one.grow([found(4)]) == ([0], [4])
    assert one.penalties == [{}]


def test_tokens_that_there_are_none_of_are_never_chosen() -> None:
    one = plot(siblings=2, repulsion=9.0)
    none = -math.inf
    assert one.grow([found(5, -1, keys=[1.0, none]), found(5, -1, keys=[1.0, none])])[1] == [5, 5]


def test_ngrams_of_other_siblings() -> None:
    one = plot(siblings=2, repulsion=0.0, ngram=2, ngram_repulsion=0.25)
    assert one.most_draws() == 1
    for pair, known in (((1, 1), [{}, {}]), ((2, 3), [{}, {}]), ((1, 1), [{}, {}]), ((2, 9), [{3: 0.25}, {2: 0.25}])):
        assert one.grow([found(t, 50, 51, 52) for t in pair])[1] == list(pair)
        assert one.penalties == known
        one.prune([False, False])
    # The first has said 1 2 1 2, the second 1 3 1 9.
    one.grow([found(1, 50), found(1, 50)])
    assert one.penalties == [{}, {}]
    assert one.prune([False, True]) == [0]
    assert one.most_draws() == 3
    one.grow([found(4, 50, 51)])
    # The second is finished, and still repels.
    assert one.penalties == [{3: 0.25, 9: 0.25}]


def test_of_many_followers_the_most_frequent_repel() -> None:
    many = MOST_FOLLOWERS + 5
    one = plot(siblings=2, repulsion=0.0, ngram=2, length=999)
    script = list(itertools.chain.from_iterable((0, 100 + i) for i in (*range(many), many - 1, many - 2)))
    for token in script:
        one.grow([found(7), found(token)])
        one.prune([False, False])
    one.grow([found(0), found(8)])
    one.prune([False, False])
    assert one.most_draws() == 1 + MOST_FOLLOWERS
    one.grow([found(1), found(9)])
    kept = [100 + many - 2, 100 + many - 1, *range(100, 100 + MOST_FOLLOWERS - 2)]
    assert one.penalties[0] == {token: 1.0 if token >= 100 + many - 2 else 0.5 for token in kept}


def test_the_public_name() -> None:
    assert proxytune.SiblingDecoding is SiblingDecoding
