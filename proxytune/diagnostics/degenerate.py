"""Degenerate texts, found before they vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from proxytune.diagnostics.prompts import Finding, Resamples, as_trace, counts, figure, prompts_of, said, weights_of
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace, TracedText
from proxytune.validation import proper_share

__all__ = ["Degenerate", "Fault", "copied_share", "degenerate", "faults_of", "looped_share"]

Fault = Literal["repeating", "copying", "skipping"]
"""What may be wrong with a text."""

LONGEST_BLOCK = 64
LEAST_COPIES = 3
LEAST_LOOPED = 12
RUN = 8
SIBLINGS = 3


@dataclass(frozen=True, kw_only=True)
class Degenerate(Finding):
    """Which texts of a run are degenerate.

    Attributes:
        share: The share of texts with any fault.
        shares: Fault → the share of texts that have it; without "skipping" where no text has an answer.
        faults: Of each text of the trace, in its order; none for empty texts and texts from elsewhere.
        sound: The numbers of the texts that the model wrote and that have no fault: those that should vote.
    """

    share: Interval
    shares: Mapping[Fault, Interval]
    faults: tuple[tuple[Fault, ...], ...]
    sound: tuple[int, ...]


def degenerate(
    trace: Trace,
    *,
    repeated: float = 0.3,
    copied: float = 0.5,
    shortest: float = 0.25,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Degenerate:
    """Find degenerate texts, and how many there are; leaves of a tree count by their weights.

    By token ids alone, so that a trace without a tokenizer will do. A text is

    - **repeating** if a block of at most 64 tokens comes at least three times in a row, and such a run holds 12 tokens
      or more and at least 30 % of the text (`repeated`)
    - **copying** if at least half of its tokens (`copied`) lie in runs of eight or more that its prompt has as well
    - **skipping** the computation if it has an answer after less than a quarter (`shortest`) of the median length of
      the prompt's other texts with an answer, of which there have to be three: it says less than its siblings needed.
      Where all texts of a prompt skip it, none is told apart

    Args:
        trace: The run.
        repeated: The share of a text in a loop from which on it is repeating.
        copied: The share copied from the prompt from which on it is copying.
        shortest: The share of its siblings' median length below which it is skipping.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.

    Raises:
        InputError: If a threshold is not in (0, 1), or there are fewer than five prompts; `faults_of` makes no
            interval, and takes any number.
    """
    what = "degenerate"
    faults = faults_of(trace, repeated=repeated, copied=copied, shortest=shortest)
    prompts = prompts_of(trace, what)
    by_id = {id(text): found for text, found in zip(trace.texts, faults, strict=True)}
    weights = weights_of(prompts, what)
    resamples = Resamples(len(prompts), what, level=level, draws=draws, seed=seed)
    sizes = [row.sum() for row in weights]

    def share(fault: Fault | None) -> Interval:
        has = [
            sum(
                weight
                for text, weight in zip(texts, row, strict=True)
                if (fault in by_id[id(text)] if fault else by_id[id(text)])
            )
            for texts, row in zip(prompts, weights, strict=True)
        ]
        return resamples.bounded(has, sizes)

    answered = any(text.answer is not None for texts in prompts for text in texts)
    shares = {fault: share(fault) for fault in get_args(Fault) if fault != "skipping" or answered}
    total = share(None)
    parts = ", ".join(f"{figure(100 * one.value)} % {fault}" for fault, one in shares.items())
    advice = "; leave them out of a vote" if total.value > 0 else ""
    return Degenerate(
        says=f"{said(total, percent=True)} of the texts are degenerate ({parts}){advice}.",
        **counts(prompts),
        share=total,
        shares=shares,
        faults=faults,
        sound=tuple(
            i
            for i, (text, found) in enumerate(zip(trace.texts, faults, strict=True))
            if len(text) and not text.given and not found
        ),
    )


def faults_of(
    trace: Trace, *, repeated: float = 0.3, copied: float = 0.5, shortest: float = 0.25
) -> tuple[tuple[Fault, ...], ...]:
    """The faults of each text of a trace, in its order; arguments and errors as `degenerate`."""
    repeated, copied, shortest = map(proper_share, (repeated, copied, shortest))
    skipping = {
        id(text)
        for texts in as_trace(trace).groups().values()
        for text in _skipping([text for text in texts if len(text) and not text.given], shortest)
    }
    found: list[tuple[Fault, ...]] = []
    for text in trace:
        faults: list[Fault] = []
        if len(text) and not text.given:
            if looped_share(text.tokens) >= repeated:
                faults.append("repeating")
            if copied_share(text.tokens, text.prompt_ids) >= copied:
                faults.append("copying")
            if id(text) in skipping:
                faults.append("skipping")
        found.append(tuple(faults))
    return tuple(found)


def looped_share(tokens: NDArray[np.integer[Any]]) -> float:
    """The share of a text in the longest run of a block of at most 64 tokens that comes three times or more in a row.

    0 if that run has fewer than 12 tokens. `tokens` is `[T]`.
    """
    longest = 0
    for period in range(1, min(LONGEST_BLOCK, len(tokens) // LEAST_COPIES) + 1):
        same = tokens[period:] == tokens[:-period]
        breaks = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
        run = int(np.diff(breaks).max()) - 1 + period  # tokens that repeat, and the first block
        if run >= LEAST_COPIES * period:
            longest = max(longest, run)
    return longest / len(tokens) if longest >= LEAST_LOOPED else 0.0


def copied_share(tokens: NDArray[np.integer[Any]], prompt: NDArray[np.integer[Any]]) -> float:
    """The share of a text's tokens in runs of eight or more that the prompt has as well; both are ids, `[T]`, `[P]`."""
    if len(tokens) < RUN or len(prompt) < RUN:
        return 0.0
    runs = {tuple(run) for run in np.lib.stride_tricks.sliding_window_view(prompt, RUN).tolist()}
    copied = np.zeros(len(tokens), bool)
    for start, run in enumerate(np.lib.stride_tricks.sliding_window_view(tokens, RUN).tolist()):
        if tuple(run) in runs:
            copied[start : start + RUN] = True
    return float(copied.mean())


def _skipping(texts: Sequence[TracedText], shortest: float) -> list[TracedText]:
    answered = [text for text in texts if text.answer is not None]
    if len(answered) <= SIBLINGS:
        return []
    lengths = np.array([len(text) for text in answered])
    return [text for i, text in enumerate(answered) if len(text) < shortest * float(np.median(np.delete(lengths, i)))]
