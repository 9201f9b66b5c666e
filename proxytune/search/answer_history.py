"""Exploration across rounds: continue from the candidates whose answers came least often.

The UCB bonus of "Outcome-based Exploration for LLM Reasoning" (arXiv 2509.06941), applied at decoding time. A store
counts each answer per prompt; candidates (branches of a tree, islands of a search) are drawn without replacement in
proportion to `prior · 1/√(1 + N(answer))`, by Gumbel-top-k. Importance weights (Kool et al. 2019, arXiv 1903.06059)
correct for the draw. `proxytune.search.restart` has an example.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.search.answer_history_file import read_counts, write_counts
from proxytune.search.keyed_noise import PromptKey, keyed_uniforms, prompt_key, round_key
from proxytune.stats.importance import kool_log_weights
from proxytune.validation import Ids, numbers, whole
from proxytune.voting.vote import check_answer

__all__ = ["AnswerHistory", "Selection"]


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected candidates and their importance weights.

    Over the drawn candidates, `Σ exp(log_weight) · f` is an unbiased estimate of E[f] under the weight's distribution;
    `proxytune.stats.importance.weighted_mean` takes either weight.

    Attributes:
        indices: `[k]`, candidate indices in the order of the draw.
        log_p: `[k]`, nats: log-probabilities under the distribution drawn from (prior × bonus).
        kappa: κ, the largest perturbed log-probability that was not drawn; −inf if all were.
        log_weights: `[k]`, nats: for expectations under the distribution drawn from.
        log_prior_weights: `[k]`, nats: for expectations under the prior.
    """

    indices: list[int]
    log_p: NDArray[np.float64]
    kappa: float
    log_weights: NDArray[np.float64]
    log_prior_weights: NDArray[np.float64]


class AnswerHistory:
    """How often each answer came for each prompt. Thread-safe.

    None (no answer) is counted like any answer. Answers that are equal in Python (1 and 1.0) are one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[PromptKey, Counter[Hashable | None]] = {}

    def record(self, prompt: str | Ids, answers: Sequence[Hashable | None]) -> None:
        """Count one answer per generated text (None: no answer); if one is refused, none is counted.

        Raises:
            InputError: If `answers` is not a sequence of hashable values that equal themselves (NaN does not).
        """
        key, checked = prompt_key(prompt), _answers(answers)
        with self._lock:
            self._counts.setdefault(key, Counter()).update(checked)

    def counts(self, prompt: str | Ids) -> dict[Hashable | None, int]:
        """A copy of a prompt's counts, answer → N; `InputError` if the prompt is neither a text nor token ids."""
        with self._lock:
            return dict(self._counts.get(prompt_key(prompt), {}))

    def count(self, prompt: str | Ids, answer: Hashable | None) -> int:
        """How often an answer (None: no answer) came for a prompt; `InputError` as in `record`."""
        return self.counts(prompt).get(check_answer(answer), 0)

    def bonus(self, prompt: str | Ids, answer: Hashable | None) -> float:
        """`1/√(1 + N)` of an answer, in (0, 1]; `InputError` as in `record`."""
        return float((1 + self.count(prompt, answer)) ** -0.5)

    def log_law(
        self, prompt: str | Ids, answers: Sequence[Hashable | None], prior: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """The distribution that `select` draws from, in proportion to `prior · bonus`.

        Args:
            prompt: A text or token ids; the two are different prompts.
            answers: `[n]`, the candidates' current answers.
            prior: `[n]`, at least 0, not all 0, of any scale, e.g. `ForkTree.weights()`; None for uniform.

        Returns:
            `[n]`, float64: log-probabilities in nats; −inf where the prior is 0.

        Raises:
            InputError: If there are no candidates, or the prior does not fit them.
        """
        return _log_law(self.counts(prompt), _answers(answers), prior)[0]

    def select(
        self,
        prompt: str | Ids,
        answers: Sequence[Hashable | None],
        count: int,
        *,
        round: int,
        seed: int = 0,
        prior: ArrayLike | None = None,
    ) -> Selection:
        """Draw the candidates that go on, without replacement.

        The noise is keyed by seed, prompt, round and candidate index, not by the order of calls. The counts are those
        at the time of the call: record this round's answers first.

        Args:
            prompt: As in `log_law`.
            answers: As in `log_law`; None for no answer.
            count: How many to draw, from 1 to the number of candidates with a prior above 0.
            round: Number of the round, at least 0.
            seed: The same seed draws the same.
            prior: As in `log_law`.

        Raises:
            InputError: If the prior does not fit the candidates, `count` is too large, or a setting is out of range.
        """
        checked = _answers(answers)
        log_p, log_prior = _log_law(self.counts(prompt), checked, prior)
        count, possible = whole("count", count, "of candidates", least=1), int(np.isfinite(log_p).sum())
        if count > possible:
            raise InputError.of(
                "count",
                expected=f"at most {possible}, the candidates that can be drawn",
                got=f"{count}",
                remedy="Draw fewer, or give more candidates a prior above 0.",
            )
        uniforms = keyed_uniforms(round_key("steer", prompt, round, seed), len(checked))
        keys = log_p - np.log(-np.log(uniforms))
        order = np.argsort(-keys, kind="stable")
        drawn = order[:count]
        kappa = float(keys[order[count]]) if count < len(order) else -np.inf
        log_weights = kool_log_weights(log_p[drawn], kappa)
        return Selection(
            drawn.tolist(), log_p[drawn], kappa, log_weights, log_weights + log_prior[drawn] - log_p[drawn]
        )

    def merge(self, other: AnswerHistory) -> AnswerHistory:
        """A new store with the counts of both added up, e.g. those of two machines."""
        out = AnswerHistory()
        for store in (self, other):
            with store._lock:
                for prompt, counts in store._counts.items():
                    out._counts.setdefault(prompt, Counter()).update(counts)
        return out

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the store to a JSON file, atomically, and return its path.

        Raises:
            InputError: If it cannot be written, or an answer is not a text, a finite number, None or a tuple of those.
        """
        with self._lock:
            counts = {prompt: dict(answers) for prompt, answers in self._counts.items()}
        return write_counts(Path(path), counts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnswerHistory:
        """Read a store that `save` wrote.

        Raises:
            InputError: If it cannot be read, its format is newer, keys are missing or unknown, a prompt or an answer
                occurs twice, or a count is not a whole number of at least 1.
        """
        out = cls()
        for prompt, counts in read_counts(Path(path)).items():
            out._counts[prompt] = Counter(counts)
        return out


def _answers(answers: Any) -> list[Hashable | None]:
    if isinstance(answers, str | bytes) or not isinstance(answers, Sequence):
        raise InputError.of(
            "answers",
            expected="a sequence with one answer for each text",
            got=repr(answers)[:80],
            remedy="Pass a list, also of one.",
        )
    return [check_answer(answer) for answer in answers]


def _log_law(
    counts: dict[Hashable | None, int], answers: list[Hashable | None], prior: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distribution drawn from and the prior: `[n]` each, normalised, in nats."""
    if not answers:
        raise InputError.of("answers", expected="at least one candidate", got="none", remedy="Pass their answers.")
    weights = np.ones(len(answers)) if prior is None else numbers("prior", prior)
    if weights.shape != (len(answers),) or (weights < 0).any() or not weights.any():
        raise InputError.of(
            "prior",
            expected=f"{len(answers)} numbers, one for each candidate, at least 0 and not all 0",
            got=repr(prior)[:80],
            remedy="Pass e.g. ForkTree.weights().",
        )
    with np.errstate(divide="ignore"):
        log_prior = np.log(weights / weights.max())
    bonuses = np.array([-0.5 * np.log1p(counts.get(answer, 0)) for answer in answers])
    return _normalised(log_prior + bonuses), _normalised(log_prior)


def _normalised(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logs - logs.max()
    return shifted - np.log(np.exp(shifted).sum())
