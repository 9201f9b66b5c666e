"""Answers that change with their length: budgets, confidence filters and the allocator on the pondering model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lab.studies.pondering import CONTINUATION, END_OF_THINKING, KINDS, Kind, Ponder, ponders
from numpy.typing import NDArray
from transformers import LogitsProcessor

from _forks.common import ROWS, Subject, grow, mean_interval, record
from proxytune import SiblingDecoding
from proxytune.budget.ledger import TokenLedger
from proxytune.demo.holdout import HeldOut
from proxytune.demo.instructions import prompt_of
from proxytune.errors import BudgetError
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor
from proxytune.methods.trees.tree import ForkTree
from proxytune.search.allocate import allocate
from proxytune.search.calibration_run import CalibrationRun, Trial
from proxytune.search.plan import Plan, plan
from proxytune.search.policies import Parallel, Sequential
from proxytune.stats.bootstrap import interval
from proxytune.stats.calibration import auroc, brier, ece
from proxytune.voting.choice import choose_vote
from proxytune.voting.stopping import OnlineFilter, consensus, settled
from proxytune.voting.vote import Sample, Tally, sample_scores, vote

MAX_NEW_TOKENS = 200
EXTRA = (0, 1, 2, 3, 4, 5)
CAPS = (10, 20, 40, 80)
SAMPLES = (1, 2, 4, 8, 16)
BUDGETS = (200, 300, 500, 800, 1400)
WINDOW = 8
"""Tokens per confidence group: about one equation."""
SCORES = ("mean", "lowest_group", "bottom_groups", "tail")


@dataclass(frozen=True)
class Drawn:
    """Samples of one problem.

    Attributes:
        prompt: Tokens of its prompt.
        samples: With answers and confidences.
        tokens: Generated tokens of each sample.
        logprobs: Mean log-probability of each sample's tokens, nats.
    """

    problem: Ponder
    prompt: int
    samples: list[Sample]
    tokens: list[int]
    logprobs: list[float]

    def right(self, tally: Tally) -> bool:
        """Whether a vote is right."""
        return tally.winner == self.problem.gold

    def spent(self, count: int) -> int:
        """Tokens of the prompt and the first `count` samples."""
        return self.prompt + sum(self.tokens[:count])


def lengths(subject: Subject, *, problems: int, samples: int) -> dict[str, Any]:
    """Accuracy and spread of the answers by the number of extensions, and by a cap on thinking.

    Returns:
        For each kind and length setting: accuracy of a sample, share of samples that differ from the most common
            answer, tokens.
    """
    out: dict[str, Any] = {}
    for kind in KINDS:
        asked = ponders(kind, "test", problems)
        ways: dict[str, dict[str, Any]] = {"as it comes": {}}
        ways |= {f"at least {n} more": {"extra": n} for n in EXTRA[1:]}
        ways |= {f"at most {cap} tokens": {"max_thinking_tokens": cap} for cap in CAPS}
        out[kind] = {way: _length(subject, asked, samples, **settings) for way, settings in ways.items()}
    return out


def _length(subject: Subject, asked: Sequence[Ponder], samples: int, **settings: int) -> dict[str, Any]:
    right, apart, tokens, unanswered = [], [], [], []
    for problem, texts in zip(asked, _thought(subject, asked, samples, **settings), strict=True):
        answers = [problem.read(subject.read(ids)) for ids in texts]
        right.append(float(np.mean([answer == problem.gold for answer in answers])))
        apart.append(1.0 - Counter(answers).most_common(1)[0][1] / len(answers))
        tokens.append(float(np.mean([len(ids) for ids in texts])))
        unanswered.append(float(np.mean([answer is None for answer in answers])))
    return {
        "accuracy": record(mean_interval(right)),
        "samples apart from the commonest answer": record(mean_interval(apart)),
        "no answer": round(float(np.mean(unanswered)), 4),
        "tokens": round(float(np.mean(tokens)), 1),
    }


def _thought(subject: Subject, asked: Sequence[Ponder], samples: int, **settings: int) -> list[list[list[int]]]:
    """Samples under a thinking budget; all batches have one width, since thinking starts at one column."""
    end, continuation = (
        subject.tokenizer.encode(word, add_special_tokens=False) for word in (END_OF_THINKING, CONTINUATION)
    )
    width = subject.encode([prompt_of(problem.question) for problem in asked])["input_ids"].shape[1]
    processors = []
    if settings:
        processors = [
            ThinkingBudgetLogitsProcessor(
                end,
                continuation_ids=continuation,
                prompt_length=width,
                eos_token_id=subject.tokenizer.eos_token_id,
                tokenizer=subject.tokenizer,
                **settings,
            )
        ]
    trees = _trees(subject, asked, samples, subject.seed, width, processors)
    return [[branch.along("tokens") for branch in tree] for tree, _ in trees]


def _trees(
    subject: Subject,
    asked: Sequence[Ponder],
    samples: int,
    seed: int,
    width: int | None = None,
    processors: Sequence[LogitsProcessor] = (),
) -> list[tuple[ForkTree, int]]:
    """Independent samples of each problem, and its prompt's tokens. Finished rows leave the batch."""
    out: list[tuple[ForkTree, int]] = []
    each = max(1, ROWS // samples)
    for first in range(0, len(asked), each):
        prompts = [prompt_of(problem.question) for problem in asked[first : first + each]]
        rows = list(range(first, first + len(prompts)))
        loop = SiblingDecoding(siblings=samples, repulsion=0.0, seed=seed, stream_ids=rows)
        trees = grow(subject, prompts, loop, max_new_tokens=MAX_NEW_TOKENS, processors=processors, width=width)
        out += zip(trees, subject.encode(prompts)["attention_mask"].sum(1).tolist(), strict=True)
    return out


def draw(subject: Subject, kind: Kind, split: HeldOut, problems: int, samples: int) -> list[Drawn]:
    """Independent samples of each problem, with confidences, at temperature 1."""
    asked = ponders(kind, split, problems)
    return [
        Drawn(
            problem,
            length,
            [Sample(problem.read(subject.read(b.along("tokens"))), np.array(b.along("confidences"))) for b in tree],
            [len(b) for b in tree],
            [float(np.mean(b.along("logprobs"))) for b in tree],
        )
        for problem, (tree, length) in zip(asked, _trees(subject, asked, samples, 100 + subject.seed), strict=True)
    ]


def confidence(drawn: dict[Kind, list[Drawn]], calibration: dict[Kind, list[Drawn]]) -> dict[str, Any]:
    """Do confidences tell right from wrong, and do votes that use them gain? The vote is chosen on `calibration`.

    Returns:
        AUROC of each score, pooled and within problems; accuracy, Brier score and ECE of each vote; the chosen vote;
        early stopping.
    """
    out: dict[str, Any] = {}
    for kind, found in drawn.items():
        flat = [(i, s, logprob) for i, d in enumerate(found) for s, logprob in zip(d.samples, d.logprobs, strict=True)]
        answered = [(i, s, logprob) for i, s, logprob in flat if s.answer is not None]
        of = np.array([i for i, _, _ in answered])
        right = np.array([s.answer == found[i].problem.gold for i, s, _ in answered])
        scores: dict[str, NDArray[np.float64]] = {
            name: np.asarray(sample_scores([s for _, s, _ in answered], name, window=WINDOW))  # type: ignore[arg-type]
            for name in SCORES
        }
        scores["mean log-probability"] = np.array([logprob for _, _, logprob in answered])
        scores["brevity"] = -np.array([len(s.confidences) for _, s, _ in answered if s.confidences is not None], float)
        probability = np.exp(scores["mean log-probability"])
        votes = {
            f"{name}, {count}": _votes(found, count, **settings)
            for count in (4, 8, 16)
            for name, settings in {
                "majority": {"how": "majority"},
                "confidence": {"how": "confidence", "score": "lowest_group"},
                "deepconf 90": {"how": "deepconf", "score": "lowest_group", "eta": 90.0},
                "deepconf 50": {"how": "deepconf", "score": "lowest_group", "eta": 50.0},
                "deepconf 10": {"how": "deepconf", "score": "lowest_group", "eta": 10.0},
            }.items()
        }
        chosen = choose_vote(
            [d.samples for d in calibration[kind]],
            [d.problem.gold for d in calibration[kind]],
            score="lowest_group",
            window=WINDOW,
        )
        out[kind] = {
            "samples": len(answered),
            "no answer": len(flat) - len(answered),
            "accuracy of a sample": record(mean_interval([float(np.mean(right[of == i])) for i in np.unique(of)])),
            "auroc": {
                name: {
                    "within problems": record(interval(auroc, values, right, of, draws=200)),
                    "pooled": round(auroc(values, right), 4),
                }
                for name, values in scores.items()
            },
            "mean token probability as a confidence": {
                "brier": round(brier(probability, right), 4),
                "ece": round(ece(probability, right), 4),
            },
            "votes": votes,
            "chosen on validation": {"how": chosen.how, "why": chosen.why},
            "adaptive consistency": _stopped(found, _settled),
            "deepconf online 90": _stopped(found, lambda d: _online(d, 90.0)),
            "deepconf online 10": _stopped(found, lambda d: _online(d, 10.0)),
        }
    return out


def _votes(found: Sequence[Drawn], count: int, **settings: Any) -> dict[str, Any]:
    groups = [d.samples[first : first + count] for d in found for first in range(0, len(d.samples) - count + 1, count)]
    of = [d for d in found for _ in range(0, len(d.samples) - count + 1, count)]
    tallies = [vote(group, window=WINDOW, **settings) for group in groups]
    plain = [vote(group) for group in groups]
    right = np.array([d.right(tally) for d, tally in zip(of, tallies, strict=True)], float)
    base = np.array([d.right(tally) for d, tally in zip(of, plain, strict=True)], float)
    per = len(groups) // len(found)
    shares = np.array([tally.share for tally in tallies])
    return {
        "accuracy": record(mean_interval(right.reshape(-1, per).mean(1))),
        "− majority": record(mean_interval((right - base).reshape(-1, per).mean(1))),
        "brier of the winner's share": round(brier(shares, right), 4),
        "ece of the winner's share": round(ece(shares, right), 4),
    }


def _stopped(found: Sequence[Drawn], early: Callable[[Drawn], tuple[Tally, int]]) -> dict[str, Any]:
    """An early-stopping rule (winner and tokens) against the majority of all samples."""
    used, same, right, base = [], [], [], []
    for d in found:
        tally, tokens = early(d)
        whole = vote(d.samples)
        used.append(tokens / sum(d.tokens))
        same.append(float(tally.winner == whole.winner))
        right.append(float(d.right(tally)))
        base.append(float(d.right(whole)))
    return {
        "share of the tokens": record(mean_interval(used)),
        "same winner": record(mean_interval(same)),
        "accuracy": record(mean_interval(right)),
        "− all samples": record(mean_interval(np.subtract(right, base))),
    }


def _settled(d: Drawn) -> tuple[Tally, int]:
    """Samples one after the other until the leader is settled."""
    count = next((n for n in range(1, len(d.samples)) if settled(vote(d.samples[:n]).counts, 0.95)), len(d.samples))
    return vote(d.samples[:count]), sum(d.tokens[:count])


def _online(d: Drawn, eta: float) -> tuple[Tally, int]:
    """DeepConf online: half of the samples set the threshold, the others stop below it; all stop at a consensus."""
    warmup = len(d.samples) // 2
    filters = OnlineFilter(eta, window=WINDOW, warmup=warmup)
    for sample in d.samples[:warmup]:
        filters.update(sample.scores(WINDOW))
    taken, tokens = list(d.samples[:warmup]), sum(d.tokens[:warmup])
    for sample in d.samples[warmup:]:
        tally = vote(taken, "deepconf", window=WINDOW, threshold=filters.threshold)
        if consensus(tally, 0.95):
            break
        assert sample.confidences is not None
        tracker, length = filters.track(), 0
        for confidence in sample.confidences:
            tracker.push(float(confidence))
            length += 1
            if not filters.keep_going(tracker):
                break
        tokens += length
        taken.append(sample if length == len(sample.confidences) else replace(sample, stopped=True))
    return vote(taken, "deepconf", window=WINDOW, threshold=filters.threshold), tokens


def allocation(
    subject: Subject, drawn: dict[Kind, list[Drawn]], calibration: dict[Kind, list[Drawn]], *, attempts: int
) -> dict[str, Any]:
    """The allocator against every fixed policy, at each budget.

    Calibrated on validation problems, tested on test problems. A policy that would have exceeded the budget on a
    problem counts as wrong there. `allocate` itself runs on `attempts` test problems of each kind.
    """
    learnt, judged = _run(subject, calibration), _run(subject, drawn)
    assert judged.kinds is not None
    out: dict[str, Any] = {"budgets": {}}
    for budget in BUDGETS:
        within = {
            t.name: (t.right & (t.tokens <= budget)).astype(float) for t in judged.trials if (t.tokens <= budget).any()
        }
        try:
            by_kind: dict[str, Plan] = {kind: plan(learnt, budget, kind) for kind in KINDS}
            pooled = plan(learnt, budget)
        except BudgetError as nothing_fits:
            out["budgets"][str(budget)] = {"refused": str(nothing_fits)}
            continue
        with_kinds = np.array([within[by_kind[kind].chosen.name][i] for i, kind in enumerate(judged.kinds)])
        without = within[pooled.chosen.name]
        best = max(within, key=lambda name: float(within[name].mean()))  # in hindsight, on the test problems themselves
        best_of_kind = {
            kind: max(within, key=lambda name, k=kind: float(within[name][judged.of_kind(k)].mean())) for kind in KINDS
        }
        hindsight = np.array([within[best_of_kind[kind]][i] for i, kind in enumerate(judged.kinds)])
        forms = {
            form: max(
                (t.name for t in judged.trials if t.form == form and t.name in within),
                key=lambda n: within[n].mean(),
                default=None,
            )
            for form in ("parallel", "sequential")
        }
        out["budgets"][str(budget)] = {
            "chosen": {kind: by_kind[kind].chosen.name for kind in KINDS} | {"without kinds": pooled.chosen.name},
            "accuracy": record(mean_interval(with_kinds)),
            "accuracy without kinds": record(mean_interval(without)),
            "best fixed policy in hindsight": {"name": best, "accuracy": record(mean_interval(within[best]))},
            "− best fixed policy": record(mean_interval(with_kinds - within[best])),
            "without kinds − best fixed policy": record(mean_interval(without - within[best])),
            "− best policy of each kind in hindsight": record(mean_interval(with_kinds - hindsight)),
            "best of each form in hindsight": {
                form: None if name is None else {"name": name, "accuracy": record(mean_interval(within[name]))}
                for form, name in forms.items()
            },
        }
    out["attempts"] = _attempts(subject, learnt, attempts)
    return out


def _run(subject: Subject, found: dict[Kind, list[Drawn]]) -> CalibrationRun:
    """The result of every level: votes over the first samples, and single extended texts."""
    every = [d for kind in KINDS for d in found[kind]]
    trials = [
        Trial(
            f"parallel {count}",
            "parallel",
            count,
            np.array([d.right(vote(d.samples[:count])) for d in every]),
            np.array([d.spent(count) for d in every]),
        )
        for count in SAMPLES
    ]
    for extra in EXTRA[1:]:
        texts = [
            some[0] for kind in KINDS for some in _thought(subject, [d.problem for d in found[kind]], 1, extra=extra)
        ]
        trials.append(
            Trial(
                f"sequential {extra}",
                "sequential",
                extra,
                np.array(
                    [d.problem.read(subject.read(ids)) == d.problem.gold for d, ids in zip(every, texts, strict=True)]
                ),
                np.array([d.prompt + len(ids) for d, ids in zip(every, texts, strict=True)]),
            )
        )
    return CalibrationRun(tuple(trials), tuple(d.problem.kind for d in every))


def _attempts(subject: Subject, run: CalibrationRun, count: int, budget: int = 300) -> dict[str, Any]:
    """`allocate` itself, on the model, under a ledger for each problem."""
    words = {
        name: subject.tokenizer.encode(word, add_special_tokens=False)
        for name, word in (("end_ids", END_OF_THINKING), ("continuation_ids", CONTINUATION))
    }
    common = {"max_new_tokens": MAX_NEW_TOKENS, "seed": subject.seed, "temperature": 1.0, "top_k": 0}
    policies = [
        *(
            Parallel(subject.model, subject.tokenizer, Ponder.read, samples=n, name=f"parallel {n}", **common)
            for n in SAMPLES
        ),
        *(
            Sequential(
                subject.model,
                subject.tokenizer,
                Ponder.read,
                extra=n,
                name=f"sequential {n}",
                do_sample=True,
                **words,
                **common,
            )
            for n in EXTRA[1:]
        ),
    ]
    right, spent, forms = [], [], Counter[str]()
    for kind in KINDS:
        for problem in ponders(kind, "test", count):
            ledger = TokenLedger(budget)
            done = allocate(prompt_of(problem.question), policies, run, ledger, kind=kind)
            assert ledger.spent <= budget
            right.append(float(done.tally.winner == problem.gold))
            spent.append(done.spent)
            forms[f"{kind}: {done.plan.chosen.name}"] += 1
    return {
        "budget": budget,
        "chosen": dict(forms),
        "accuracy": record(mean_interval(right)),
        "most tokens spent": max(spent),
        "mean tokens spent": round(math.fsum(spent) / len(spent), 1),
    }
