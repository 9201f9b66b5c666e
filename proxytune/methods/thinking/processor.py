"""A thinking budget per prompt (budget forcing: s1, Muennighoff et al. 2025, arXiv 2501.19393).

The first n times that the end of thinking would be sampled, a continuation ("Wait") replaces it; after a maximum number
of tokens, the end is forced. Each call decides from `input_ids` alone: beams are reordered, assisted decoding rolls
back, and rows are independent.

*Replacing the end* needs no look-ahead or extra draw. The continuation's first token gets the larger of its own score
and the end's, and the end −inf. So greedy decoding continues exactly where it would have ended; sampling draws from the
unchanged distribution without the smaller of the two masses, and reads the end as the continuation, under any later
temperature, top-k, top-p and min-p. (With p(end) = .3 and p(Wait) = .1, "Wait" weighs .3, and .1 is lost to
renormalisation.) Thinking ends with the *last* token of `end_ids` after the others, or EOS.

*Suppressed ends are counted* as occurrences of the continuation in the thinking, also a "Wait" that the model writes by
itself. After the first token of a longer continuation the others are always forced: choose a first token that starts
nothing else (not a line break).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from proxytune.errors import InputError
from proxytune.generation.prompt_rows import expand_to_rows
from proxytune.generation.token_patterns import continued, count_of, ends_of, forced
from proxytune.validation import TokenIds, token_ids, whole

__all__ = ["ThinkingBudgetLogitsProcessor"]

PerRow = int | None | Sequence[int | None]

_NEVER = torch.iinfo(torch.int64).max


class ThinkingBudgetLogitsProcessor(LogitsProcessor):
    """Suppresses the end of thinking n times, and forces it at a cap; for any `generate(logits_processor=…)`.

    With `begin_ids`, thinking starts after the first of them since the last end of thinking or EOS: earlier turns of a
    conversation do not count, and each new thinking span has its own budget. Without, it starts once, at
    `prompt_length`. With both, a span that the prompt opened is limited too, measured from `prompt_length`. It is over
    at the first whole `end_ids` or at EOS; after that scores are unchanged.

    Works with greedy decoding, sampling, beams (a changed row is returned as log-probabilities, which beam search adds
    up), assisted decoding and left padding. Continuous batching is not supported: it does not pass whole rows.

    Attributes:
        end_ids: The token ids that end thinking.
        continuation_ids: The ids that replace them; empty for none.
        begin_ids: The ids that begin it; empty for none.
        eos_token_ids: The ids that end the text.
        prompt_length: The length of the padded prompts; None if thinking is found by `begin_ids` alone.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        end_ids: TokenIds,
        *,
        extra: int | Sequence[int] = 0,
        max_thinking_tokens: PerRow = None,
        continuation_ids: TokenIds | None = None,
        begin_ids: TokenIds | None = None,
        prompt_length: int | None = None,
        eos_token_id: TokenIds | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Check the settings.

        Args:
            end_ids: What ends thinking: the id of `</think>`, or several ids.
            extra: How often to suppress the end; one number, or one for each prompt.
            max_thinking_tokens: The cap, in tokens between start and end of thinking, continuations included and
                `end_ids` not; one value for all prompts or one for each, None for no cap, 0 for no thinking.
            continuation_ids: What replaces a suppressed end, e.g. the ids of "Wait". Needed with `extra`, since
                suppressed ends are counted by it. Must not overlap with itself (`a b a`).
            begin_ids: What begins thinking, e.g. the id of `<think>`; may be in the prompt.
            prompt_length: `input_ids.shape[1]` of the prompts, left padding included.
            eos_token_id: What ends the text. While ends are suppressed, so is EOS inside thinking; later it is left
                alone before the cap, and ends thinking.
            tokenizer: The model's tokenizer, by which the continuation's ids are checked; None for no such check.

        Raises:
            InputError: If a setting is missing or out of its range; or, with a tokenizer, if the continuation begins
                with a token of white space alone, or its ids are not what the tokenizer makes of them in a text.
        """
        self.end_ids = token_ids("end_ids", end_ids, single=True, empty=False)
        self.continuation_ids = token_ids("continuation_ids", continuation_ids, single=True, optional=True, empty=False)
        self.begin_ids = token_ids("begin_ids", begin_ids, single=True, optional=True, empty=False)
        self.eos_token_ids = token_ids("eos_token_id", eos_token_id, single=True, optional=True, empty=False)
        self.prompt_length = None if prompt_length is None else whole("prompt_length", prompt_length)
        counts = extra if isinstance(extra, Sequence) else [extra]
        caps = max_thinking_tokens if isinstance(max_thinking_tokens, Sequence) else [max_thinking_tokens]
        # [1] or [prompts] each
        self._extra = torch.tensor([whole("extra", n, "of suppressed ends") for n in counts], dtype=torch.int64)
        self._caps = torch.tensor(
            [_NEVER if n is None else whole("max_thinking_tokens", n) for n in caps], dtype=torch.int64
        )
        self._check()
        if tokenizer is not None and self.continuation_ids:
            _refuse_joint(tokenizer, self.continuation_ids)

    def _check(self) -> None:
        continuation, ends = self.continuation_ids, (self.end_ids[-1], *self.eos_token_ids)
        if not len(self._extra) or not len(self._caps):
            raise InputError.of(
                "extra, max_thinking_tokens",
                expected="a number, or one for each prompt",
                got="[]",
                remedy="Pass one number for all prompts.",
            )
        if self.prompt_length is None and not self.begin_ids:
            raise InputError.of(
                "begin_ids",
                expected="begin_ids or prompt_length, to know where thinking starts",
                got="both None",
                remedy="Pass begin_ids (the id of '<think>'), or prompt_length=input_ids.shape[1].",
            )
        if bool(self._extra.any()) and not continuation:
            raise InputError.of(
                "continuation_ids",
                expected="ids that replace a suppressed end, since suppressed ends are counted by them",
                got=f"None with extra={self._extra.tolist()}",
                remedy="Pass e.g. tokenizer.encode('Wait', add_special_tokens=False).",
            )
        if any(token in ends for token in continuation):
            raise InputError.of(
                "continuation_ids",
                expected=f"none of the tokens that end thinking, {list(ends)}",
                got=f"{list(continuation)}",
                remedy="Pass the ids of a word; encode it with add_special_tokens=False.",
            )
        if any(continuation[:n] == continuation[-n:] for n in range(1, len(continuation))):
            raise InputError.of(
                "continuation_ids",
                expected="ids that do not start as they end: overlapping ones could not be counted",
                got=f"{list(continuation)}",
                remedy="Drop the last token.",
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Replace or force the end of thinking where it is due.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`: logits, or log-probabilities in beam search; not changed in place.

        Returns:
            `[B, V]`: unchanged rows as they came, others as log-probabilities; forced rows are 0 at one token, −inf
            elsewhere.

        Raises:
            InputError: If an id is not in the vocabulary, or prefix or budgets do not fit the prompts.
        """
        self._refuse_misfit(input_ids, scores)
        start, open_ = self._thinking(input_ids)  # [B], [B]
        length = input_ids.shape[1] - start  # [B]
        at_cap = open_ & (length >= _per_row(self._caps, input_ids))
        due = torch.where(at_cap, continued(input_ids, self.end_ids, torch.zeros_like(start), least=0), -1)
        if self.continuation_ids:
            missing = count_of(input_ids, self.continuation_ids, start) < _per_row(self._extra, input_ids)
            more = open_ & ~at_cap & missing
            # Complete a continuation that has begun.
            due = torch.where(more, continued(input_ids, self.continuation_ids, start, least=1), due)
            scores = self._exchanged(input_ids, scores, more & (due < 0))
        return forced(scores, due)

    def _thinking(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's thinking starts (`[B]`, int64), and whether it goes on (`[B]`, bool)."""
        position = torch.arange(ids.shape[1], device=ids.device)  # [T]
        closed = ends_of(ids, self.end_ids)  # [B, T]
        for token in self.eos_token_ids:
            closed = closed | (ids == token)
        if not self.begin_ids:
            start = torch.full((len(ids),), self.prompt_length or 0, device=ids.device)
            return start, ~(closed & (position >= start[:, None])).any(1)
        last = torch.where(closed, position, -1).amax(1)  # [B]
        begins = ends_of(ids, self.begin_ids) & (position > last[:, None])
        # The first of several counts: begin_ids inside thinking are text and must not reset the budget.
        start = begins.long().argmax(1) + 1
        return start.clamp(min=self.prompt_length or 0), begins.any(1)

    def _exchanged(self, ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The scores with the continuation's first token in place of what would end thinking, in the given rows."""
        *before, last = self.end_ids
        completes = rows & ends_of(ids, before)[:, -1] if before else rows  # [B]
        first = self.continuation_ids[0]
        out = scores.clone()
        for token, where in ((last, completes), *((eos, rows) for eos in self.eos_token_ids)):
            out[:, first] = torch.where(where, torch.maximum(out[:, first], out[:, token]), out[:, first])
            out[:, token] = torch.where(where, -torch.inf, out[:, token])
        lse = out.logsumexp(-1, keepdim=True)
        # A row of −inf has no mass to normalise by.
        out = out - torch.where(lse.isfinite(), lse, 0.0)
        return torch.where((completes | rows if self.eos_token_ids else completes)[:, None], out, scores)

    def _refuse_misfit(self, ids: torch.Tensor, scores: torch.Tensor) -> None:
        largest = max(*self.end_ids, *self.continuation_ids, *self.eos_token_ids, 0)
        if largest >= scores.shape[-1]:
            raise InputError.of(
                "end_ids, continuation_ids, eos_token_id",
                expected=f"token ids below {scores.shape[-1]}, the width of the scores",
                got=f"{largest}",
                remedy="Take them from the tokenizer of this model.",
            )
        if self.prompt_length is not None and ids.shape[1] < self.prompt_length:
            raise InputError.of(
                "prompt_length",
                expected=f"at most the {ids.shape[1]} ids of the prefix",
                got=f"{self.prompt_length}",
                remedy="Pass input_ids.shape[1] of these prompts, padding included, and their input_ids to generate().",
            )


# How thinking ends before a suppressed end: a word, a sentence, a line.
_BEFORE = ("so it is", "so it is.", "so it is.\n", "so it is.\n\n")


def _refuse_joint(tokenizer: Any, continuation: Sequence[int]) -> None:
    """Refuse a continuation that the tokenizer would not write so after any text: the model never read such ids."""
    first, ids = tokenizer.decode([continuation[0]]), list(continuation)
    example = "Pass ids of a text that goes on, e.g. tokenizer.encode('Wait', add_special_tokens=False) or of ' Wait'."
    if not first.strip():
        raise InputError.of(
            "continuation_ids",
            expected="a first token with more than white space: it stands before many words, and each time that the "
            "model writes it, the rest would be forced",
            got=f"{ids}, which begins with {first!r}",
            remedy=example,
        )
    found = []
    for text in _BEFORE:
        before = list(tokenizer.encode(text, add_special_tokens=False))
        found.append(list(tokenizer.encode(tokenizer.decode(before + ids), add_special_tokens=False)))
        if found[-1] == before + ids:
            return
    raise InputError.of(
        "continuation_ids",
        expected="ids that the tokenizer makes of their text where it follows another text",
        got=f"{ids}, {tokenizer.decode(ids)!r}, which it writes otherwise: {found[0]} after {_BEFORE[0]!r}",
        remedy=example,
    )


def _per_row(budgets: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The prompts' budgets for the rows that continue them (beams, several sequences, branches); `[B]` or `[1]`."""
    rows, prompts = len(ids), len(budgets)
    out = budgets if prompts == 1 else expand_to_rows(budgets, rows)
    if out is None:
        raise InputError.of(
            "extra, max_thinking_tokens",
            expected=f"one number, or one for each prompt of {rows} rows (beams included)",
            got=f"{prompts} numbers",
            remedy="Make a new processor for each batch.",
        )
    return out.to(ids.device)
