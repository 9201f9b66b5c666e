"""Collapse: how many different answers and formats a policy still gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from proxytune.diagnostics.coverage_curves import chance, checked_ks
from proxytune.diagnostics.prompts import (
    Finding,
    Resamples,
    counts,
    is_weighted,
    prompts_of,
    refuse_single,
    refuse_weighted,
    said,
    weights_of,
)
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace

__all__ = ["DistinctAnswers", "Formats", "distinct_answers", "format_of", "formats"]


@dataclass(frozen=True, kw_only=True)
class DistinctAnswers(Finding):
    """How many different answers k samples of a prompt give, mean over prompts.

    Attributes:
        curve: k → that number.
        unanswered: The share of texts without an answer, which count as samples and not as answers.
    """

    curve: Mapping[int, Interval]
    unanswered: Interval


def distinct_answers(
    trace: Trace, ks: Sequence[int] | None = None, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> DistinctAnswers:
    """The distinct-answer curve of the texts that the model wrote.

    Independent samples: the expectation over k of the n samples, without bias. Leaves of a tree, with
    `facts["weight"]`: that of k independent samples whose answers have the weights as probabilities.

    Args:
        trace: The run, with answers (`proxytune.trace.graded` writes them): several samples of each prompt.
        ks: Numbers of samples, from 1 to the fewest that a prompt has. None: powers of two, and the largest.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If no text has an answer, a prompt has one text only, there are fewer than five prompts, a k is out
            of range, or the texts are a tree's without weights.
    """
    what = "distinct_answers"
    prompts = prompts_of(trace, what)
    if all(text.answer is None for texts in prompts for text in texts):
        raise InputError.of(
            what,
            expected="answers",
            got=f"{sum(map(len, prompts))} texts without one",
            remedy="Write them to the texts: dataclasses.replace(text, answer=…).",
        )
    weighted = [is_weighted(texts, what) for texts in prompts]
    if not any(weighted):
        refuse_weighted(trace, prompts, what, "Write the tree's weights() to facts['weight'].")
    refuse_single(prompts, what)
    ks = checked_ks(ks, prompts)
    masses = weights_of(prompts, what)
    table = np.zeros((len(prompts), len(ks)))
    for i, texts in enumerate(prompts):
        answers = np.array([text.answer or "" for text in texts])
        has = np.array([text.answer is not None for text in texts])
        for answer in {text.answer for text in texts} - {None}:
            hits = has & (answers == answer)
            table[i] += [chance(hits, masses[i] if weighted[i] else None, k) for k in ks]
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    curve = {k: resamples.share(table[:, j], most=k) for j, k in enumerate(ks)}
    missing = [
        float(mass @ [text.answer is None for text in texts]) for texts, mass in zip(prompts, masses, strict=True)
    ]
    unanswered = resamples.bounded(missing, [mass.sum() for mass in masses])
    without = f"; {said(unanswered, percent=True)} of the texts have none" if unanswered.value > 0 else ""
    return DistinctAnswers(
        says=f"{ks[-1]} samples of a prompt give {said(curve[ks[-1]])} different answers{without}.",
        **counts(prompts),
        curve=curve,
        unanswered=unanswered,
    )


@dataclass(frozen=True, kw_only=True)
class Formats(Finding):
    """The formats of a policy's texts, as `formats` finds them.

    Attributes:
        histogram: Format → its share of the texts, the largest first.
        top: The most frequent format.
        top_share: Its share.
    """

    histogram: Mapping[str, float]
    top: str
    top_share: Interval


def formats(trace: Trace, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Formats:
    """The histogram of formats of the texts that the model wrote; leaves of a tree count by their weights.

    A text's *format* is its layout, not its wording. Its lines are cut into sentences, and each is one of a few kinds:
    heading, bullet, numbered, table, tag (`<think>`), code (between fences), equation (`=` with a digit on a side),
    number (digits without letters), sentence, marks. The format names the kinds that occur, in the order in which they
    first do: neither words nor the number of steps change it.

    Args:
        trace: The run, recorded with a tokenizer.
        level: Confidence level of the interval.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If a text was recorded without a tokenizer, or there are fewer than five prompts.
    """
    what = "formats"
    prompts = prompts_of(trace, what)
    unknown = sum(text.text is None for texts in prompts for text in texts)
    if unknown:
        raise InputError.of(
            what,
            expected="the words of each text",
            got=f"{unknown} of {sum(map(len, prompts))} with token ids alone",
            remedy="Record with tokenizer=, or write pieces to the texts.",
        )
    found = [[format_of(text.text or "") for text in texts] for texts in prompts]
    names = sorted({name for row in found for name in row})
    shares = np.zeros((len(prompts), len(names)))
    for i, (row, mass) in enumerate(zip(found, weights_of(prompts, what), strict=True)):
        np.add.at(shares[i], [names.index(name) for name in row], mass)
    sizes = np.array([len(row) for row in found], float)
    total = shares.sum(0) / sizes.sum()
    order = sorted(range(len(names)), key=lambda j: (-round(total[j], 12), names[j]))
    top_share = Resamples(len(prompts), what, level=level, draws=draws, seed=seed).bounded(shares[:, order[0]], sizes)
    return Formats(
        says=f"{said(top_share, percent=True)} of the texts have one format, of {len(names)} that occur.",
        **counts(prompts),
        histogram={names[j]: float(total[j]) for j in order},
        top=names[order[0]],
        top_share=top_share,
    )


_MARKERS = (
    ("heading", re.compile(r"#{1,6} ")),
    ("bullet", re.compile(r"[-*•+] ")),
    ("numbered", re.compile(r"\(?(?:\d{1,3}|[a-zA-Z])[.)] ")),
    ("table", re.compile(r"\|")),
    ("tag", re.compile(r"</?[a-zA-Z][\w-]*>")),
)
_EQUATION = re.compile(r"\d\s*=|=\s*[-−+$(]*\s*\d")
_AFTER = re.compile(r"(?:<\|[^|<>]*\|>|</?s>|<(?:eos|pad|end_of_turn)>|\s)+\Z")
_ENDS = re.compile(r"(?<=[.!?])\s+")


def format_of(text: str) -> str:
    """The format of a text: its kinds of lines and sentences in the order of their first occurrence.

    Kinds are joined by " > "; a blank text is "empty". End and padding tokens at its end are not read.
    """
    kinds: dict[str, None] = {}
    fenced = False
    for line in map(str.strip, _AFTER.sub("", text).splitlines()):
        if line.startswith("```"):
            fenced = not fenced
            kinds["code"] = None
            continue
        if fenced or not line:
            continue
        rest = line
        for kind, marker in _MARKERS:
            if opening := marker.match(rest):
                kinds[kind] = None
                rest = "" if kind == "table" else rest[opening.end() :]
                break
        for sentence in filter(None, _ENDS.split(rest)):
            kinds[_kind(sentence)] = None
    return " > ".join(kinds) or "empty"


def _kind(sentence: str) -> str:
    if _EQUATION.search(sentence):
        return "equation"
    if any(map(str.isalpha, sentence)):
        return "sentence"
    return "number" if any(map(str.isdigit, sentence)) else "marks"
