"""Countdown: two temperatures against one, and trees against independent samples, at equal tokens.

On the directly tuned model and its twin, narrowed by a policy gradient. Settings are chosen on validation problems and
tested on test problems; intervals are paired over problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from _forks.common import Subject, grow, independent, mean_interval, record
from proxytune import ForkDecoding, ForkSamplingLogitsProcessor, SiblingDecoding
from proxytune.demo.holdout import HeldOut
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import Problem, problems
from proxytune.demo.verifiers import grade
from proxytune.demo.world import build_world
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.tree import ForkTree
from proxytune.stats.coverage import pass_at_k

MAX_NEW_TOKENS = 40
PLAIN = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
EXEC = (0.1, 0.4, 0.7, 1.0)
FORK = (0.3, 0.5, 0.7, 1.0, 1.3)
Setting = tuple[float, float]
"""T_exec and T_fork; a plain temperature if they are equal."""
SETTINGS: tuple[Setting, ...] = (*((t, t) for t in PLAIN), *((e, f) for e in EXEC for f in FORK if e != f))
SHARE = 0.2


@dataclass(frozen=True)
class Answers:
    """The answers to one problem.

    Attributes:
        right: How often each distinct right solution was written.
        tokens: Generated tokens, shared ones counted once.
    """

    samples: int
    right: dict[str, int]
    tokens: int

    @classmethod
    def of(cls, problem: Problem, texts: Sequence[str], tokens: int) -> Answers:
        """Grade texts, strictly."""
        right: dict[str, int] = {}
        for text in texts:
            if grade(problem, text).strict:
                right[text] = right.get(text, 0) + 1
        return cls(len(texts), right, tokens)

    def coverage(self, k: float) -> float:
        """pass@k, linear between whole numbers."""
        return _between(k, lambda n: pass_at_k(sum(self.right.values()), self.samples, n))

    def solutions(self, k: float) -> float:
        """The expected number of distinct solutions among k samples, linear between whole numbers."""
        return _between(k, lambda n: sum(pass_at_k(count, self.samples, n) for count in self.right.values()))


def _between(k: float, of: Callable[[int], float]) -> float:
    """A function of whole numbers, interpolated linearly; 0 for 0 samples."""
    low = int(k)
    value = of(low) if low else 0.0
    return value if k == low else value + (k - low) * (of(low + 1) - value)


def threshold(subject: Subject, *, count: int = 60, samples: int = 8) -> float:
    """The entropy above which a fifth of the model's own Countdown tokens lie, at temperature 1, in nats."""
    asked = problems("countdown", "validation", count, build_world())
    loop = SiblingDecoding(siblings=samples, repulsion=0.0, seed=10_000 + subject.seed)
    trees = _grow(subject, asked, loop)
    return ForkThreshold.calibrated([h for tree in trees for branch in tree for h in branch.entropies], SHARE).nats


def temperatures(
    subject: Subject, nats: float, *, seed: int, chosen_on: int, judged_on: int, few: int, many: int
) -> dict[str, Any]:
    """The grid T_exec × T_fork against a sweep of plain temperatures.

    Every setting gets `few` samples on `chosen_on` validation problems, the best of either kind `many` on `judged_on`
    test problems.

    Returns:
        pass@k of all settings on validation, of the chosen ones on test, and the paired differences.
    """
    counts = [k for k in (1, 4, 16, 64) if k <= few]
    tried = {s: _sampled(subject, "validation", chosen_on, few, s, nats, seed) for s in SETTINGS}
    rates = {s: {k: float(np.mean([a.coverage(k) for a in found])) for k in counts} for s, found in tried.items()}
    best = {
        k: {
            "plain": max((s for s in SETTINGS if s[0] == s[1]), key=lambda s: rates[s][k]),
            "fork": max((s for s in SETTINGS if s[0] != s[1]), key=lambda s: rates[s][k]),
        }
        for k in counts
    }
    needed = {(1.0, 1.0)} | {setting for pair in best.values() for setting in pair.values()}
    # Test draws have another seed than validation draws.
    judged = {s: _sampled(subject, "test", judged_on, many, s, nats, seed + 500) for s in sorted(needed)}
    mean_tokens = {s: sum(a.tokens for a in found) / (judged_on * many) for s, found in judged.items()}
    out: dict[str, Any] = {
        "validation": [
            {"exec": s[0], "fork": s[1], **{f"pass@{k}": round(rates[s][k], 4) for k in counts}} for s in SETTINGS
        ],
        "test": {},
    }
    for k in counts:
        plain, fork = best[k]["plain"], best[k]["fork"]
        # Equal tokens: k samples at the plain temperature, and as many as cost the same at the two.
        same = k * mean_tokens[plain] / mean_tokens[fork]
        first = [a.coverage(k) for a in judged[plain]]
        second = [a.coverage(same) for a in judged[fork]]
        at_one = [a.coverage(k) for a in judged[1.0, 1.0]]
        out["test"][f"k={k}"] = {
            "plain": {"temperature": plain[0], "pass": record(mean_interval(first))},
            "fork": {
                "exec": fork[0],
                "fork": fork[1],
                "samples": round(same, 3),
                "pass": record(mean_interval(second)),
            },
            "temperature 1": record(mean_interval(at_one)),
            "fork − plain": record(mean_interval(np.subtract(second, first))),
            "differences": [round(d, 4) for d in np.subtract(second, first)],
        }
    return out


def spreads(
    subject: Subject, nats: float, *, seed: int, count: int, samples: int, best_temperature: float
) -> dict[str, Any]:
    """Coverage and distinct solutions of trees and siblings against independent samples for the same number of tokens.

    `samples` independent samples of each of `count` test problems estimate the curve. The methods are at temperature 1;
    `best_temperature` is the plain one with the best pass@16 on validation.

    Returns:
        pass@k of independent samples at temperature 1; for every method and size, coverage, distinct solutions and
        tokens, compared with independent samples for the same tokens, at temperature 1 and at the best one.
    """
    asked = problems("countdown", "test", count, build_world())
    plain = _sampled(subject, "test", count, samples, (1.0, 1.0), nats, seed)
    mean_tokens = sum(a.tokens for a in plain) / (count * samples)
    best = _sampled(subject, "test", count, samples, (best_temperature, best_temperature), nats, seed)
    best_tokens = sum(a.tokens for a in best) / (count * samples)
    curve = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    out: dict[str, Any] = {
        "tokens of a sample": round(mean_tokens, 2),
        "best temperature": best_temperature,
        "independent": {
            f"k={k}": {
                "coverage": record(mean_interval([a.coverage(k) for a in plain])),
                "different solutions": record(mean_interval([a.solutions(k) for a in plain])),
            }
            for k in curve
        },
        "methods": {},
    }
    for size in (8, 16):
        loops: dict[str, Any] = {
            "fork tree": ForkDecoding(threshold=nats, branches=size, seed=seed),
            "random tree": ForkDecoding(where="random", share=SHARE, branches=size, seed=seed),
            "start": ForkDecoding(where="start", branches=size, seed=seed),
            "siblings, repulsion 0.5": SiblingDecoding(threshold=nats, siblings=size, repulsion=0.5, seed=seed),
            "siblings, repulsion 2": SiblingDecoding(threshold=nats, siblings=size, repulsion=2.0, seed=seed),
        }
        for name, loop in loops.items():
            trees = _grow(subject, asked, loop)
            found = [
                Answers.of(p, [subject.read(b.along("tokens")) for b in tree], tree.tokens)
                for p, tree in zip(asked, trees, strict=True)
            ]
            as_many = sum(a.tokens for a in found) / count / mean_tokens
            covered = np.array([float(bool(a.right)) for a in found])
            different = np.array([float(len(a.right)) for a in found])
            more = covered - [a.coverage(as_many) for a in plain]
            further = different - [a.solutions(as_many) for a in plain]
            as_hot = as_many * mean_tokens / best_tokens
            over_best = covered - [a.coverage(as_hot) for a in best]
            further_best = different - [a.solutions(as_hot) for a in best]
            out["methods"][f"{name}, {size}"] = {
                "tokens": round(as_many * mean_tokens, 1),
                "independent samples for as many tokens": round(as_many, 3),
                "coverage": record(mean_interval(covered)),
                "coverage − independent": record(mean_interval(more)),
                "different solutions": record(mean_interval(different)),
                "different solutions − independent": record(mean_interval(further)),
                "coverage − best temperature": record(mean_interval(over_best)),
                "different solutions − best temperature": record(mean_interval(further_best)),
                "differences": {
                    "coverage": [round(x, 4) for x in more],
                    "solutions": [round(x, 4) for x in further],
                    "coverage, best temperature": [round(x, 4) for x in over_best],
                    "solutions, best temperature": [round(x, 4) for x in further_best],
                },
            }
    return out


def _sampled(
    subject: Subject, split: HeldOut, count: int, samples: int, setting: Setting, nats: float, seed: int
) -> list[Answers]:
    asked = problems("countdown", split, count, build_world())
    exec_, fork = setting
    with ExitStack() as attached:
        if exec_ != fork:
            processor = ForkSamplingLogitsProcessor(nats, fork_temperature=fork, exec_temperature=exec_)
            attached.enter_context(processor.attach(subject.model))
        drawn = independent(
            subject,
            [prompt_of(problem.question) for problem in asked],
            samples,
            seed=seed,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=exec_ if exec_ == fork else 1.0,
        )
    return [
        Answers.of(problem, [subject.read(ids) for ids in some], sum(map(len, some)))
        for problem, some in zip(asked, drawn, strict=True)
    ]


def _grow(subject: Subject, asked: Sequence[Problem], loop: ForkDecoding | SiblingDecoding) -> list[ForkTree]:
    return grow(subject, [prompt_of(problem.question) for problem in asked], loop, max_new_tokens=MAX_NEW_TOKENS)
