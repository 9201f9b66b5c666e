"""Constraints that hold in every loop: an engine's matcher for each prefix, not for each row.

Engines for grammars and schemas (xgrammar, llguidance, outlines) have a matcher that moves on with its text. Beams
change places, drafts are rejected, branches come and go; so a matcher belongs to the tokens that it has read, and is
found again by them, whatever row has them and in whatever order texts are asked for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from transformers import LogitsProcessor

from proxytune.errors import InputError, NumericalError
from proxytune.generation.constraint_engines import Matcher, MatcherOfEngine, matcher_of
from proxytune.generation.prompt_rows import expand_to_rows
from proxytune.validation import shown, whole

__all__ = ["ConstraintLogitsProcessor"]

_KEPT = 64
"""How many prefixes are kept at least."""


@dataclass(eq=False)
class _Prefix:
    """What is known of one prefix: its matcher, unless a longer one has taken it, and what may follow it."""

    matcher: MatcherOfEngine | None
    allowed: torch.Tensor  # [V], bool
    ended: bool


class ConstraintLogitsProcessor(LogitsProcessor):
    """Constrains every text by a matcher of its own, in any loop: beams, drafts, trees, several sequences, a batch.

    `ConstraintLogitsProcessor(lambda: xgrammar.GrammarMatcher(compiled))`. What the function makes follows one text
    from its beginning:

    - `xgrammar.GrammarMatcher`, `llguidance.LLMatcher`, `outlines_core.Guide`;
    - a logits processor that masks ids, such as those of outlines and `xgrammar.contrib.hf.LogitsProcessor`. One with
      `reset()`, as those of outlines, may be given itself;
    - a `proxytune.generation.constraint_engines.Matcher` of your own: `allowed()` and `advance(token)`.

    The constraint begins with the first generated token. Matchers are kept by the tokens they have read, made anew for
    a prefix that is not at hand, and so may be used in any order, and in any number of `generate()` calls. Ids that the
    engine does not know are masked. Once a text has ended, or holds a token that the constraint does not allow (a
    draft that will be rejected, or one that a later processor forced), its scores are left alone.

    Put it last among the processors: what another one has masked or forced before is then an error where it
    contradicts the constraint.

    With a composed or an attached model, and in this package's loops, each `generate()` says that it begins. With
    transformers' own loops on a plain model, the prompt is told from the texts: one that goes on from the last call's
    text is taken for that text. Call `reset()` before it, or pass `prompt_length`.

    Attributes:
        prompt_length: Where the constraint begins, in ids, padding included; None for the end of each call's prompt.
    """

    supports_continuous_batching = False

    def __init__(
        self, make: Callable[..., Any] | Sequence[Callable[..., Any]], *, prompt_length: int | None = None
    ) -> None:
        """Keep how matchers are made; none is made yet.

        Args:
            make: Called without arguments: a new matcher or processor for one text. Or several of them, one for each
                prompt.
            prompt_length: `input_ids.shape[1]` of the prompts; less, to have the constraint cover the prompts' end.

        Raises:
            InputError: If there is nothing to make matchers with.
        """
        given = list(make) if isinstance(make, Iterable) and not callable(make) else [make]
        if not given or not all(map(callable, given)):
            raise InputError.of(
                "make",
                expected="a function without arguments that makes a matcher, or one for each prompt",
                got=shown(make, 80),
                remedy="Pass e.g. ConstraintLogitsProcessor(lambda: xgrammar.GrammarMatcher(compiled_grammar)).",
            )
        self._make = given
        self.prompt_length = None if prompt_length is None else whole("prompt_length", prompt_length)
        self._beams = False
        self._generated, self._ends = 0, frozenset[int]()
        self._lock = Lock()
        self._prefixes: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()
        self.reset()

    def reset(self) -> None:
        """Take the next call for the first one of a `generate()`."""
        self._start: int | None = None
        self._seen: set[int] = set()

    def for_prompts(
        self, prompt_length: int | None, *, ends: Iterable[int] = (), beams: bool = False
    ) -> ConstraintLogitsProcessor:
        """The processor of one `generate()` after prompts of so many ids; it shares the matchers.

        Args:
            prompt_length: `input_ids.shape[1]`; None to find out.
            ends: The ids that end a text.
            beams: Whether rows are beams, of which one may have no token left.
        """
        one = copy.copy(self)
        one.reset()
        one.prompt_length = prompt_length if self.prompt_length is None else self.prompt_length
        one._generated, one._ends = prompt_length or 0, frozenset(ends)
        one._beams = beams
        return one

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask what may not come next.

        Args:
            input_ids: The whole prefixes, `[B, T]`, int64.
            scores: `[B, V]`, float; in beam search log-probabilities.

        Returns:
            `[B, V]`: a new tensor, −inf for ids that are not allowed.

        Raises:
            InputError: If the number of prompts does not fit, or an engine does not fit the model.
            NumericalError: If a row has no token left.
        """
        rows: list[list[int]] = input_ids.tolist()
        start = self._start_of(rows)
        prompts = expand_to_rows(torch.arange(len(self._make)), len(rows)) if len(self._make) > 1 else None
        if prompts is None and len(self._make) > 1:
            raise InputError.of(
                "make",
                expected=f"one function, or one for each prompt of {len(rows)} rows (beams included)",
                got=f"{len(self._make)} functions",
                remedy="Make a processor for each batch.",
            )
        numbers = [0] * len(rows) if prompts is None else prompts.tolist()
        with self._lock:
            found = [self._prefix(n, row, start, scores.shape[-1]) for n, row in zip(numbers, rows, strict=True)]
            while len(self._prefixes) > max(_KEPT, 8 * len(rows)):
                self._prefixes.popitem(last=False)
        allowed = torch.stack([prefix.allowed for prefix in found]).to(scores.device)
        out = scores.masked_fill(~allowed, -torch.inf)
        self._refuse_nothing_left(found, out)
        return out

    def _refuse_nothing_left(self, found: Sequence[_Prefix], out: torch.Tensor) -> None:
        if self._beams:  # one without a continuation is dropped
            return
        left = (out > -torch.inf).any(-1).tolist()
        for row, (prefix, some) in enumerate(zip(found, left, strict=True)):
            if not some and not prefix.ended:
                raise NumericalError.of(
                    f"row {row}",
                    expected="a token that the constraint allows",
                    got=f"−inf for all {int(prefix.allowed.sum())} of them",
                    remedy="See what masks them: min_new_tokens, bad_words_ids, or another processor before it; an "
                    "engine has to allow the end of a text where it is whole.",
                )

    def _start_of(self, rows: Sequence[Sequence[int]]) -> int:
        """Where the generated tokens begin in these rows."""
        length = len(rows[0])
        if self.prompt_length is not None:
            if length < self.prompt_length:
                raise InputError.of(
                    "prompt_length",
                    expected=f"at most the {length} ids of the prefix",
                    got=f"{self.prompt_length}",
                    remedy="Pass input_ids.shape[1] of these prompts, padding included, or leave it out.",
                )
            return self.prompt_length
        # Every loop asks for a prefix before one that is longer by a token.
        known = all(hash(tuple(row)) in self._seen or hash(tuple(row[:-1])) in self._seen for row in rows)
        if self._start is None or not known:
            self._start, self._seen = length, set()
        self._seen.update(hash(tuple(row)) for row in rows)
        return self._start

    def _prefix(self, number: int, row: Sequence[int], start: int, width: int) -> _Prefix:
        """What may follow a row, of prompt or engine `number`."""
        key = (number, width, start, *row)
        known = self._prefixes.get(key)
        if known is not None:
            self._prefixes.move_to_end(key)
            return known
        free = torch.ones(width, dtype=torch.bool)
        if not self._ends.isdisjoint(row[self._generated :]):
            return _Prefix(None, free, ended=True)
        matcher = self._matcher(key, number, row, start, width)
        # Where nobody said what ends a text, one that nothing can follow has ended.
        ended = matcher.ended or not (self._ends or bool(matcher.allowed().any()))
        self._prefixes[key] = prefix = _Prefix(matcher, free if ended else matcher.allowed(), ended)
        return prefix

    def _matcher(
        self, key: tuple[int, ...], number: int, row: Sequence[int], start: int, width: int
    ) -> MatcherOfEngine:
        """A matcher that has read a row: that of the row one token shorter, moved on, or a new one."""
        parent = self._prefixes.get(key[:-1]) if len(row) > start else None
        if parent is not None and parent.matcher is not None:
            matcher = parent.matcher.copy()
            if matcher is None:
                matcher, parent.matcher = parent.matcher, None
            matcher.advance(row[-1])
            return matcher
        make: Any = self._make[number]
        matcher = matcher_of(_made(make), width, row[:start])
        for token in row[start:]:
            matcher.advance(token)
        return matcher


def _made(make: Any) -> Matcher | Callable[..., torch.Tensor]:
    """What a function makes; a copy of a processor that can be reset."""
    if callable(getattr(make, "reset", None)):
        made = copy.copy(make)
        made.reset()
        return made
    return make()
