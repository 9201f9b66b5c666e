"""The decisions of one `generate()`, kept on their devices until the call has ended.

A loop adds each decision (`add`). In transformers' own loops the model shows its members' rows (`watch`), and the
stopping criteria the token that was taken (`chosen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import StoppingCriteriaList

from proxytune.generation.measured import Measured, measured
from proxytune.generation.sampler import MembersAndWeights
from proxytune.trace import FIELDS, SIGNALS, UNKNOWN

__all__ = ["Arrays", "CallLog", "ShownTokens", "log_now", "log_on", "logged"]

_NOW: ContextVar[CallLog | None] = ContextVar("proxytune_call_log", default=None)

Arrays = dict[str, NDArray[Any]]


def log_now() -> CallLog | None:
    """The log of the recorded `generate()` that runs in this thread."""
    return _NOW.get()


def log_on(model: Any) -> CallLog | None:
    """The same, if it is this model's."""
    log = _NOW.get()
    return log if log is not None and log.model is model else None


@contextmanager
def logged(log: CallLog | None) -> Iterator[CallLog | None]:
    """Make a log the one of this thread; None for none."""
    before = _NOW.set(log)
    try:
        yield log
    finally:
        _NOW.reset(before)


@dataclass(frozen=True, eq=False)
class _Entry:
    """N decisions: whose they are, and what was measured."""

    found: Measured
    tokens: torch.Tensor  # [N]
    row: torch.Tensor  # [N]: the row of the batch; −1 for a decision that came to nothing
    at: torch.Tensor  # [N]: the position among the row's new tokens
    signals: Mapping[str, torch.Tensor]  # [N], bool


class CallLog:
    """What one `generate()` decided.

    Attributes:
        model: The model whose `generate()` runs.
        top: How many likeliest tokens of each source are kept.
        roles: The members' roles, the base's first.
        by_loop: Whether a loop adds its decisions itself.
        unreadable: Why the text's ids cannot be read again; None if they can.
        origins: The row of the prompts that each returned text goes on from; None for as many texts of each, in order.
        facts: What each returned text has to say of itself (`TracedText.facts`); None for nothing.
        prefilling: Whether the prompt is being read: then the last rows shown count, not the first.
        missed: Whether a token was taken whose rows were not shown, as after a compiled step.
    """

    def __init__(self, model: Any, top: int, roles: Sequence[str]) -> None:
        self.model, self.top, self.roles = model, top, tuple(roles)
        self.by_loop = self.prefilling = self.missed = False
        self.unreadable: str | None = None
        self.origins: list[int] | None = None
        self.facts: list[dict[str, Any]] | None = None
        self._entries: list[_Entry] = []
        self._shown: tuple[MembersAndWeights, list[torch.Tensor | None], int, torch.Tensor | None] | None = None
        self._step = 0
        self._ended: torch.Tensor | None = None
        self._said: dict[str, torch.Tensor] = {}
        self._marks: dict[str, torch.Tensor] = {}

    def say(self, **signals: torch.Tensor) -> None:
        """Take signals `[B]`, bool, of the decision that is being made, from a logits processor."""
        self._said |= signals

    def said(self, name: str) -> torch.Tensor | None:
        """A signal of the decision that has been made; each is given once."""
        return self._said.pop(name, None)

    def mark(self, **signals: torch.Tensor) -> None:
        """Take signals `[B, N]`, bool, of all N new tokens of each returned row."""
        self._marks |= signals

    def watch(
        self,
        rows: Sequence[torch.Tensor | None],
        weigh: Callable[[], MembersAndWeights],
        *,
        usable: int,
        opened: torch.Tensor | None = None,
        roles: Sequence[str] | None = None,
    ) -> None:
        """Take the rows from which the next token will be drawn, unless they are those of another pass.

        After a token, the first rows shown are those of the next one: a logits processor may run the model once more.

        Args:
            rows: Raw logits `[B, V_i]` of all members, the base's first; None for one that did not run.
            weigh: Gives the rows of those that ran, and their weights.
            usable: How many ids can be drawn.
            opened: `[B]`, bool: where the gate is open.
            roles: Those of the rows, if they are not the model's own members.
        """
        more = roles is not None and self._shown is not None and len(rows) > len(self._shown[1])
        if self.by_loop or (self._shown is not None and not self.prefilling and not more):
            return
        if roles is not None:
            self.roles = tuple(roles)
        self._shown = (weigh(), list(rows), usable, opened)

    def chosen(self, input_ids: torch.Tensor, done: torch.Tensor) -> None:
        """Measure the rows shown by the token that was taken, the last of ids `[B, T]`; `done` is `[B]`, bool."""
        if self.by_loop:
            return
        if self._shown is None:
            self.missed = True
            return
        drawn_from, rows, usable, opened = self._shown
        self._shown, ended = None, self._ended
        self._ended = done if ended is None else ended | done
        if rows[0] is None or len(rows[0]) != len(input_ids):  # candidates, or rows of another kind
            self.missed = True
            return
        fork = self.said("fork")
        if fork is not None and len(fork) != len(input_ids):
            fork = None
        alive = None if ended is None else ~ended
        self.add(drawn_from, rows, input_ids[:, -1], self._step, usable=usable, alive=alive, gate=opened, fork=fork)
        self._step += 1

    def add(
        self,
        drawn_from: MembersAndWeights,
        rows: Sequence[torch.Tensor | None],
        tokens: torch.Tensor,
        at: int | torch.Tensor,
        *,
        usable: int,
        row: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
        **signals: torch.Tensor | None,
    ) -> None:
        """Add N decisions.

        Args:
            drawn_from: The rows `[N, V_i]` of the members that ran and their weights, before logits processors.
            rows: Raw logits `[N, V_i]` of all members; None for one that did not run.
            tokens: `[N]`, int64.
            at: The position among the row's new tokens, from 0; `[N]`, int64, if they differ.
            usable: How many ids can be drawn.
            row: `[N]`, int64: the row of each decision [0, 1, 2, …].
            alive: `[N]`, bool: which of them count [all].
            **signals: `[N]`, bool, by name (`proxytune.trace.SIGNALS`); None for what is not known.
        """
        found = measured(drawn_from, rows, tokens, usable=usable, top=self.top)
        place = found.rank.device
        row = torch.arange(len(tokens), device=place) if row is None else row.to(place)
        if alive is not None:
            row = torch.where(alive.to(place), row, -1)
        at = torch.full_like(row, at) if isinstance(at, int) else at.to(place)
        told = {name: value.to(place) for name, value in signals.items() if value is not None}
        self._entries.append(_Entry(found, tokens.to(place), row, at, told))

    def covers(self, steps: int) -> bool:
        """Whether all tokens of a call were logged, in which each row got `steps`."""
        return self._step == steps and not self.missed

    def rows(self) -> list[Arrays]:
        """The arrays of each row, as `TracedText` has them, without gaps; waits for the device.

        A row that has a gap ends before it.
        """
        if not self._entries:
            return []
        row, at, tokens, rank, floats, ids, logprobs = (
            torch.cat(parts).cpu().numpy()
            for parts in zip(
                *(
                    (e.row, e.at, e.tokens, e.found.rank, e.found.of_token, e.found.top_ids, e.found.top_logprobs)
                    for e in self._entries
                ),
                strict=True,
            )
        )
        flat: Arrays = {"tokens": tokens, "base_rank": rank, "top_ids": ids, "top_logprobs": logprobs}
        flat |= {name: floats[:, i] for i, name in enumerate(("logprobs", "entropy", "kl", "shift"))}
        for name in SIGNALS:
            flat[name] = np.concatenate(
                [
                    e.signals[name].cpu().numpy().astype(np.int8)
                    if name in e.signals
                    else np.full(len(e.row), UNKNOWN, np.int8)
                    for e in self._entries
                ]
            )
        out = []
        for number in range(int(row.max()) + 1):
            mine = np.flatnonzero(row == number)
            mine = mine[np.argsort(at[mine], kind="stable")]
            whole = mine[at[mine] == np.arange(len(mine))]
            out.append({name: np.ascontiguousarray(flat[name][whole].astype(FIELDS[name][0])) for name in FIELDS})
        return out

    def marked(self, rows: list[Arrays]) -> list[Arrays]:
        """The arrays of all returned texts, with the signals that were marked for all of their tokens."""
        for name, values in self._marks.items():
            for arrays, of_row in zip(rows, values.cpu().numpy().astype(np.int8), strict=False):
                count = min(len(arrays[name]), len(of_row))
                arrays[name][:count] = of_row[:count]
        return rows


class ShownTokens(StoppingCriteriaList):
    """The criteria of a call, which tell its log what was taken and which rows have ended."""

    def __init__(self, criteria: StoppingCriteriaList, log: CallLog) -> None:
        super().__init__(criteria)
        self._log = log

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """As `StoppingCriteriaList`."""
        done = super().__call__(input_ids, scores, **kwargs)
        if isinstance(done, torch.Tensor):
            self._log.chosen(input_ids, done)
        return done
