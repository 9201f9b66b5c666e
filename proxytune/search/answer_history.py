"""Historical exploration: across rounds, go on where the answers are that were seen least.

A decoding-time reading of the UCB bonus of "Outcome-based Exploration for LLM Reasoning" (arXiv 2509.06941): a store
counts how often each answer came for each prompt, and the next round's candidates (branches of a tree, islands of a
search) are drawn without replacement in proportion to `prior · 1/√(1 + N(answer))`, by Gumbel-top-k. What the draw does
to the law is known exactly: importance weights (Kool et al. 2019, arXiv 1903.06059) lead back from it.

```python
history = AnswerHistory()
history.record(prompt, answers)  # this round's, one for each candidate; None for no answer
selected = history.select(prompt, answers, 2, round=1)
steered.indices  # which two candidates go on
```
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
    """Which candidates go on, and what they weigh.

    Over the drawn ones, `Σ exp(log_weight) · f` is an unbiased estimate of the expectation of f; of which law, says the
    weight. `proxytune.stats.importance.weighted_mean` takes either.

    Attributes:
        indices: `[k]`, the candidates' numbers, in the order of the draw.
        log_p: `[k]`, nats: their log-probabilities under the steered law, the one drawn from.
        kappa: κ, the largest perturbed log-probability that was not drawn; −inf if none was left.
        log_weights: `[k]`, nats: for expectations under the steered law.
        log_prior_weights: `[k]`, nats: for expectations under the prior, as if nothing had been steered.
    """

    indices: list[int]
    log_p: NDArray[np.float64]
    kappa: float
    log_weights: NDArray[np.float64]
    log_prior_weights: NDArray[np.float64]


class AnswerHistory:
    """How often each answer came for each prompt. Any number of threads may use it.

    *No answer* (None) is counted like an answer: what keeps failing to answer is not new either. Answers that are equal
    in Python (1 and 1.0) are one.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._counts: dict[PromptKey, Counter[Hashable | None]] = {}

    def record(self, prompt: str | Ids, answers: Sequence[Hashable | None]) -> None:
        """Count the answers of a round; all of them or, if one is refused, none.

        Args:
            prompt: A text or token ids; the two are different prompts.
            answers: One for each text that was generated.

        Raises:
            InputError: If they are no sequence of hashable values that equal themselves.
        """
        key, checked = prompt_key(prompt), _answers(answers)
        with self._lock:
            self._counts.setdefault(key, Counter()).update(checked)

    def counts(self, prompt: str | Ids) -> dict[Hashable | None, int]:
        """All counts of a prompt.

        Args:
            prompt: The prompt.

        Returns:
            Answer → how often it came; a copy.

        Raises:
            InputError: If it is neither a text nor token ids.
        """
        with self._lock:
            return dict(self._counts.get(prompt_key(prompt), {}))

    def count(self, prompt: str | Ids, answer: Hashable | None) -> int:
        """How often an answer came.

        Args:
            prompt: The prompt.
            answer: The answer; None for no answer.

        Returns:
            N, at least 0.

        Raises:
            InputError: If the prompt or the answer cannot be one.
        """
        return self.counts(prompt).get(check_answer(answer), 0)

    def bonus(self, prompt: str | Ids, answer: Hashable | None) -> float:
        """The bonus of an answer.

        Args:
            prompt: The prompt.
            answer: The answer; None for no answer.

        Returns:
            `1/√(1 + N)`, in (0, 1].

        Raises:
            InputError: If the prompt or the answer cannot be one.
        """
        return float((1 + self.count(prompt, answer)) ** -0.5)

    def log_law(
        self, prompt: str | Ids, answers: Sequence[Hashable | None], prior: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """The law that candidates are drawn from, in proportion to `prior · bonus`.

        Args:
            prompt: The prompt.
            answers: `[n]`, the candidates' present answers.
            prior: `[n]`, at least 0, not all 0; in any scale, e.g. `ForkTree.weights()`. None for all the same.

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

        The noise is keyed by seed, prompt, round and the candidate's number, never by the order of calls; the counts
        are those of the moment. Record this round's answers first.

        Args:
            prompt: The prompt.
            answers: `[n]`, the candidates' present answers; None for no answer.
            count: How many go on, from 1 to the number of candidates whose prior is not 0.
            round: The number of the round, at least 0.
            seed: The same seed draws the same.
            prior: As in `log_law`.

        Returns:
            Who goes on, and their weights.

        Raises:
            InputError: If the prior does not fit the candidates, there are fewer candidates than are to go on, or a
                setting is out of its range.
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
        """Two stores in one, e.g. of two machines; counts add up.

        Args:
            other: Another store; neither is changed.

        Returns:
            A new store.
        """
        out = AnswerHistory()
        for store in (self, other):
            with store._lock:
                for prompt, counts in store._counts.items():
                    out._counts.setdefault(prompt, Counter()).update(counts)
        return out

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the store to a JSON file; all of it or nothing.

        Args:
            path: The file.

        Returns:
            The file.

        Raises:
            InputError: If it cannot be written, or an answer is neither a text, a number, None nor a tuple of those.
        """
        with self._lock:
            counts = {prompt: dict(answers) for prompt, answers in self._counts.items()}
        return write_counts(Path(path), counts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnswerHistory:
        """Read a store from a JSON file.

        Args:
            path: The file.

        Returns:
            The store.

        Raises:
            InputError: If it cannot be read, its format is newer, keys are missing or unknown, a prompt or an answer is
                there twice, or a count is not a whole number of at least 1.
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
    """The steered law and the prior, `[n]` each, normalised, in nats."""
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
