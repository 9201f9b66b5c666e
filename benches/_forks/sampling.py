"""Countdown: two temperatures against one, and trees against independent samples, at equal tokens.

On the directly tuned model and its twin, narrowed by a policy gradient. Settings are chosen on validation problems and
tested on test problems; intervals are paired over problems.

The reference is plain sampling at one temperature, for as many tokens: at the temperature chosen on validation among
those of `bench_latent.py`, and at temperature 1. Both differences are recorded, problem by problem. What is reported is
the smaller of the two (`better_of_both`), so the reference is whichever is better on the test problems themselves: this
favours the reference. It is picked once per model, row and measure, after the seeds are pooled: a choice for each seed
would follow the noise of its draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from _latent.methods import TEMPERATURES

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
EXEC = (0.1, 0.4, 0.7, 1.0)
FORK = (0.3, 0.5, 0.7, 1.0, 1.3)
"""Beside these, the plain temperatures that were chosen: they may be hotter, or colder."""
Setting = tuple[float, float]
"""T_exec and T_fork; a plain temperature if they are equal."""
CHOSEN, AT_ONE = "chosen temperature", "temperature 1"
"""The two references."""
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
    """The grid T_exec × T_fork against the sweep of plain temperatures and against temperature 1.

    Every setting gets `few` samples on `chosen_on` validation problems, the best of either kind `many` on `judged_on`
    test problems. Of settings with the same pass@k the one that finds the most distinct solutions is chosen.

    Returns:
        pass@k of all settings on validation, of the chosen ones on test, whether the chosen temperature is the first or
        the last of the sweep, and the differences to both references: k samples at one temperature, and as many at two
        as cost the same.
    """
    counts = [k for k in (1, 4, 16, 64) if k <= few]
    tried: dict[Setting, list[Answers]] = {}

    def choose(settings: Sequence[Setting]) -> dict[int, Setting]:
        for setting in settings:
            tried[setting] = _sampled(subject, "validation", chosen_on, few, setting, nats, seed)
        return {k: max(settings, key=lambda s: (_coverage(tried[s], k), _solutions(tried[s], k))) for k in counts}

    plain = choose([(t, t) for t in TEMPERATURES])
    forks = dict.fromkeys((*FORK, *(one[0] for one in plain.values())))
    fork = choose([(e, f) for e in EXEC for f in forks if e != f])
    needed = {(1.0, 1.0), *plain.values(), *fork.values()}
    # Test draws have another seed than validation draws.
    judged = {s: _sampled(subject, "test", judged_on, many, s, nats, seed + 500) for s in sorted(needed)}
    mean_tokens = {s: sum(a.tokens for a in found) / (judged_on * many) for s, found in judged.items()}
    out: dict[str, Any] = {
        "validation": [
            {"exec": s[0], "fork": s[1], **{f"pass@{k}": round(_coverage(found, k), 4) for k in counts}}
            for s, found in tried.items()
        ],
        "test": {},
    }
    for k in counts:
        references = {CHOSEN: plain[k], AT_ONE: (1.0, 1.0)}
        found: dict[str, Any] = {
            name: {
                "temperature": one[0],
                "pass": record(mean_interval([a.coverage(k) for a in judged[one]])),
            }
            for name, one in references.items()
        }
        found[CHOSEN]["at the end of the sweep"] = plain[k][0] in (TEMPERATURES[0], TEMPERATURES[-1])
        found["two temperatures"] = {"exec": fork[k][0], "fork": fork[k][1]}
        found["differences"] = {}
        for name, one in references.items():
            same = k * mean_tokens[one] / mean_tokens[fork[k]]
            pairs = zip(judged[fork[k]], judged[one], strict=True)
            more = [two.coverage(same) - single.coverage(k) for two, single in pairs]
            found["two temperatures"][f"samples, {name}"] = round(same, 3)
            found[f"two temperatures − {name}"] = record(mean_interval(more))
            found["differences"][name] = [round(d, 4) for d in more]
        out["test"][f"k={k}"] = found
    return out


def _coverage(found: Sequence[Answers], k: int) -> float:
    return float(np.mean([a.coverage(k) for a in found]))


def _solutions(found: Sequence[Answers], k: int) -> float:
    return float(np.mean([a.solutions(k) for a in found]))


def better_of_both(chosen: Sequence[float], at_one: Sequence[float]) -> dict[str, Any]:
    """Differences to the two references, `[P]` each, and which of these is the better one.

    Returns:
        The interval of both, and the name of the reference to which the mean difference is smaller.
    """
    found: dict[str, Any] = {CHOSEN: record(mean_interval(chosen)), AT_ONE: record(mean_interval(at_one))}
    return {**found, "better reference": AT_ONE if np.mean(at_one) < np.mean(chosen) else CHOSEN}


def spreads(subject: Subject, nats: float, *, seed: int, count: int, samples: int, chosen: float) -> dict[str, Any]:
    """Coverage and distinct solutions of trees and siblings against independent samples for the same number of tokens.

    `samples` independent samples of each of `count` test problems estimate each reference's curve. The methods are at
    temperature 1; `chosen` is the plain temperature with the best pass@16 on validation.

    Returns:
        pass@k of both references; for every method and size, coverage, distinct solutions and tokens, compared with
        independent samples for the same tokens at both.
    """
    asked = problems("countdown", "test", count, build_world())
    drawn = {t: _sampled(subject, "test", count, samples, (t, t), nats, seed) for t in dict.fromkeys((chosen, 1.0))}
    references = {CHOSEN: drawn[chosen], AT_ONE: drawn[1.0]}
    mean_tokens = {name: sum(a.tokens for a in found) / (count * samples) for name, found in references.items()}
    curve = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    out: dict[str, Any] = {
        "chosen temperature": chosen,
        "tokens of a sample": {name: round(value, 2) for name, value in mean_tokens.items()},
        "independent": {
            name: {
                f"k={k}": {
                    "coverage": record(mean_interval([a.coverage(k) for a in found])),
                    "distinct solutions": record(mean_interval([a.solutions(k) for a in found])),
                }
                for k in curve
            }
            for name, found in references.items()
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
            tokens = sum(a.tokens for a in found) / count
            own = {
                "coverage": np.array([float(bool(a.right)) for a in found]),
                "distinct solutions": np.array([float(len(a.right)) for a in found]),
            }
            line: dict[str, Any] = {
                "tokens": round(tokens, 1),
                "independent samples for as many tokens": {},
                **{measure: record(mean_interval(values)) for measure, values in own.items()},
                "differences": {measure: {} for measure in own},
            }
            for reference, some in references.items():
                as_many = tokens / mean_tokens[reference]
                line["independent samples for as many tokens"][reference] = round(as_many, 3)
                for measure, of in {"coverage": Answers.coverage, "distinct solutions": Answers.solutions}.items():
                    more = own[measure] - [of(a, as_many) for a in some]
                    line[f"{measure} − {reference}"] = record(mean_interval(more))
                    line["differences"][measure][reference] = [round(x, 4) for x in more]
            out["methods"][f"{name}, {size}"] = line
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
