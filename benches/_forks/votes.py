"""Routes: are detected forks the real ones, and do votes over a tree estimate the distribution of answers?

The true distribution is enumerated (`lab.studies.route_law`), so the bias is exact.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from lab.studies.route_law import RouteLaw, route_law
from lab.studies.routes import routes
from numpy.typing import NDArray

from _forks.common import Subject, grow, independent, mean_interval, record
from proxytune import ForkDecoding
from proxytune.demo.instructions import prompt_of
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.tree import ForkTree
from proxytune.stats.calibration import auroc

MAX_NEW_TOKENS = 72
SHARE = 0.2
EQUAL_TOKENS = "independent samples for as many tokens"
ESTIMATES = ("equal", "p-weighted", "exact", "exact, self-normalised", "as many independent samples", EQUAL_TOKENS)
LEAST = 0.02
"""Rarer answers are left out of the z-scores: a hundred trees may have none of them, and so no variance."""

Shares = dict[Hashable | None, float]


def detection(subject: Subject, *, problems: int, samples: int) -> dict[str, Any]:
    """Forks found by entropy against the tokens at which a route really forks.

    Thresholds are calibrated on the model's own samples for validation routes, and tested on those for test routes.

    Returns:
        Precision and recall at a target share of 20 % and at the share of real forks, and the AUROC of the entropy.
    """
    pooled = {}
    for split in ("validation", "test"):
        asked = routes(split, problems)  # type: ignore[arg-type]
        laws = [route_law(subject.model, subject.tokenizer, route) for route in asked]
        drawn = independent(
            subject, [prompt_of(r.question) for r in asked], samples, seed=subject.seed, max_new_tokens=MAX_NEW_TOKENS
        )
        paths = [
            (law, law.ids.index(tuple(ids)))
            for law, some in zip(laws, drawn, strict=True)
            for ids in some
            if law.read(ids) is not None
        ]
        pooled[split] = (
            np.concatenate([law.entropies[path] for law, path in paths]),
            np.concatenate([law.forks[path] for law, path in paths]),
        )
    entropies, real = pooled["test"]
    share = float(pooled["validation"][1].mean())
    out: dict[str, Any] = {
        "tokens": len(real),
        "share of real forks": round(float(real.mean()), 4),
        "auroc of the entropy": round(auroc(entropies, real), 6),
        "entropy at forks, nats": _quantiles(entropies[real]),
        "entropy elsewhere, nats": _quantiles(entropies[~real]),
    }
    for name, target in (("target share 20 %", SHARE), ("target share as taught", share)):
        nats = ForkThreshold.calibrated(pooled["validation"][0], target).nats
        detected = entropies > nats
        out[name] = {
            "nats": round(nats, 4),
            "realised share": round(float(detected.mean()), 4),
            "precision": round(float(real[detected].mean()), 4),
            "recall": round(float(detected[real].mean()), 4),
        }
    return out


def votes(subject: Subject, nats: float, *, problems: int, trees: int, branches: int = 8) -> dict[str, Any]:
    """Bias and spread of votes over fork trees against the enumerated distribution of answers.

    For each route, `trees` trees are compared with as many sets of independent samples, one per leaf.

    Returns:
        For each way to vote: bias, root-mean-square error and how often the winner is the likeliest answer.
    """
    errors: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ESTIMATES}  # per route [trees, answers]
    wins: dict[str, list[float]] = {name: [] for name in ESTIMATES}
    laws, tokens, independent_tokens, at_sign = [], [], [], []
    for number, route in enumerate(routes("test", problems)):
        law = route_law(subject.model, subject.tokenizer, route)
        laws.append(law)
        truth = law.answers()
        seed = 1000 * subject.seed + number
        loop = ForkDecoding(threshold=nats, branches=branches, seed=seed)
        grown = grow(subject, [prompt_of(route.question)] * trees, loop, max_new_tokens=MAX_NEW_TOKENS)
        drawn = independent(
            subject, [prompt_of(route.question)], trees * branches, seed=seed, max_new_tokens=MAX_NEW_TOKENS
        )[0]
        tokens.append(sum(tree.tokens for tree in grown) / trees)
        independent_tokens.append(sum(map(len, drawn)) / trees)
        at_sign += [sign for tree in grown for sign in _signs_at_forks(law, tree)]
        fewer = max(1, round(branches * tokens[-1] / independent_tokens[-1]))
        estimates = [
            _estimates(law, tree, [law.read(ids) for ids in drawn[index * branches : (index + 1) * branches]], fewer)
            for index, tree in enumerate(grown)
        ]
        for name in ESTIMATES:
            errors[name].append(np.array([[e[name].get(a, 0.0) - truth[a] for a in truth] for e in estimates]))
            wins[name].append(float(np.mean([_winner(e[name]) == _winner(truth) for e in estimates])))
    return {
        "routes": problems,
        "trees of each": trees,
        "leaves at most": branches,
        "tokens of a tree": round(float(np.mean(tokens)), 1),
        "tokens of as many samples": round(float(np.mean(independent_tokens)), 1),
        "total variation, model to taught law": round(float(np.mean([law.taught() for law in laws])), 4),
        "share of the trees' forks at signs": round(float(np.mean(at_sign)), 4),
        "by": {name: _summary(errors[name], laws, wins[name], trees) for name in ESTIMATES},
    }


def _estimates(law: RouteLaw, tree: ForkTree, samples: Sequence[int | None], fewer: int) -> dict[str, Shares]:
    read = [law.read(branch.along("tokens")) for branch in tree]
    logs = [sum(branch.along("logprobs")) for branch in tree]
    return {
        "equal": _shares(read, [1.0] * len(tree)),
        "p-weighted": _shares(read, [math.exp(x - max(logs)) for x in logs]),
        "exact": _sums(read, [math.exp(branch.log_weight) for branch in tree]),
        "exact, self-normalised": _shares(read, tree.weights()),
        "as many independent samples": _shares(samples, [1.0] * len(samples)),
        EQUAL_TOKENS: _shares(samples[:fewer], [1.0] * fewer),
    }


def _signs_at_forks(law: RouteLaw, tree: ForkTree) -> list[bool]:
    """For each fork on a branch that is a path: whether it is at a sign."""
    out = []
    for branch in tree:
        ids = tuple(branch.along("tokens"))
        if ids in law.ids:
            out += [bool(law.forks[law.ids.index(ids)][at]) for at in branch.forks]
    return out


def _sums(read: Sequence[int | None], weights: Sequence[float]) -> Shares:
    sums: Shares = {}
    for answer, weight in zip(read, weights, strict=True):
        sums[answer] = sums.get(answer, 0.0) + weight
    return sums


def _shares(read: Sequence[int | None], weights: Sequence[float]) -> Shares:
    total = sum(weights)
    return _sums(read, [weight / total for weight in weights])


def _winner(shares: Shares) -> Hashable | None:
    return max((a for a in shares if a is not None), key=lambda a: shares[a], default=None)


def _summary(
    errors: Sequence[NDArray[np.float64]], laws: Sequence[RouteLaw], wins: Sequence[float], trees: int
) -> dict[str, Any]:
    """Errors of one way to vote, `[trees, answers]` per route."""
    bias, scatter, z = [], [], []
    for error, law in zip(errors, laws, strict=True):
        truth = np.array(list(law.answers().values()))
        mean, noise = error.mean(0), error.std(0, ddof=1) / math.sqrt(trees)
        # The likeliest answer's share decides the vote.
        top = int(truth[:-1].argmax())
        bias.append(float(mean[top]))
        scatter.append(float(noise[top]))
        common = (truth >= LEAST) & (noise > 0)
        z += list(mean[common] / noise[common])
    noise_of_mean = math.sqrt(sum(s**2 for s in scatter)) / len(scatter)
    return {
        "bias for the likeliest answer": record(mean_interval(bias)),
        "the same in standard errors of the draws": round(float(np.mean(bias)) / noise_of_mean, 2),
        "mean z² over answers": round(float(np.mean(np.square(z))), 3),
        "largest |z| over answers": round(float(np.abs(z).max()), 2),
        "answers": len(z),
        "root-mean-square error": round(float(np.mean([math.sqrt((e**2).sum(1).mean()) for e in errors])), 4),
        "winner is the likeliest": record(mean_interval(wins)),
    }


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"{q:g}": round(float(np.quantile(values, q)), 4) for q in (0.01, 0.05, 0.5, 0.95, 0.99)}
