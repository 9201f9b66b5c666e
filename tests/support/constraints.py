"""A constraint that everyone can follow by hand, in the three ways in which engines are written, and all loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.speculation import near
from transformers import LogitsProcessor

import proxytune
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft

A, B, C, EOS, PAD = 20, 21, 22, 2, 0
PATTERN = "(AB|BA){1,3}C"


class Pairs:
    """The matcher of one text: one to three pairs of A and B, C, the end."""

    def __init__(self, text: Sequence[int] = ()) -> None:
        self.text = list(text)

    def allowed(self) -> list[int]:
        last, n = (self.text or [B])[-1], len(self.text)
        if last not in (A, B):
            return [EOS]
        if n % 2:
            return [A if last == B else B]
        return [A, B] * (n < 6) + [C] * (n > 0)

    def advance(self, token: int) -> None:
        self.text.append(token)


class CopiedPairs(Pairs):
    def copy(self) -> CopiedPairs:
        return CopiedPairs(self.text)


def masked(scores: torch.Tensor, allowed: Sequence[Sequence[int]]) -> torch.Tensor:
    out = torch.full_like(scores, -torch.inf)
    for row, ids in enumerate(allowed):
        out[row, list(ids)] = scores[row, list(ids)]
    return out


class RowMatchers(LogitsProcessor):
    """As engines write it: a matcher for each row of the batch, fed the last token of each call."""

    def __init__(self) -> None:
        self.matchers: list[Pairs] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.matchers is None:
            self.matchers = [Pairs() for _ in input_ids]
        else:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                matcher.advance(token)
        return masked(scores, [matcher.allowed() for matcher in self.matchers])


class Resettable(RowMatchers):
    def reset(self) -> None:
        self.matchers = None


class OfIds(LogitsProcessor):
    """The same as a function of the ids after the prompts."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return masked(scores, [Pairs(row[self.start :]).allowed() for row in input_ids.tolist()])


def violations(sequences: torch.Tensor, start: int) -> list[list[int]]:
    """The texts that are not, and could not become, what the constraint allows."""
    bad = []
    for row in sequences[:, start:].tolist():
        text = row[: row.index(EOS)] if EOS in row else row
        while text and text[-1] == PAD:
            text.pop()
        whole = EOS not in row or (len(text) > 0 and text[-1] == C)
        if not whole or any(token not in Pairs(text[:i]).allowed() for i, token in enumerate(text)):
            bad.append(row)
    return bad


SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 3.0}
GREEDY: dict[str, Any] = {"do_sample": False}


def _loop(loop: Any, **more: Any) -> dict[str, Any]:
    return SAMPLE | {"custom_generate": loop} | more


LOOPS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": SAMPLE,
    "`num_return_sequences`": SAMPLE | {"num_return_sequences": 2},
    "beams": GREEDY | {"num_beams": 3},
    "sampled beams": SAMPLE | {"num_beams": 3, "num_return_sequences": 2},
    "`assistant_model`": SAMPLE | {"assistant_model": "near"},
    "`prompt_lookup_num_tokens`": SAMPLE | {"prompt_lookup_num_tokens": 3},
    "`FusedDecoding`": _loop(proxytune.FusedDecoding(seed=1)),
    "`SpeculativeDecoding`": _loop(proxytune.SpeculativeDecoding(seed=1, draft_tokens=3)),
    "`SpeculativeDecoding`, prompt lookup": _loop(
        proxytune.SpeculativeDecoding(seed=1, draft=PromptLookupDraft(shortest=1), draft_tokens=3)
    ),
    "`ForkDecoding`": _loop(proxytune.ForkDecoding(threshold=-1.0, branches=5, min_gap=2, seed=1)),
    "`SiblingDecoding`": _loop(proxytune.SiblingDecoding(threshold=-1.0, siblings=4, seed=1)),
    "`LatentDecoding`": _loop(proxytune.LatentDecoding("gumbel", seed=1)),
    "`LatentDecoding`, beams": GREEDY | {"num_beams": 3, "custom_generate": proxytune.LatentDecoding("gumbel", seed=1)},
    "`RecursionDecoding`": _loop(proxytune.RecursionDecoding(sigma=0.3, trajectories=2, select=None, seed=1)),
}
"""Loop → settings of `generate()`."""


def settings_of(loop: str, *, plain: bool = False) -> dict[str, Any]:
    """The settings of a loop; on a plain model a model drafts."""
    given = dict(LOOPS[loop])
    if "assistant_model" in given:
        given["assistant_model"] = near("llama", 4, 0.1)
    if plain and loop == "`SpeculativeDecoding`":
        draft = ModelDraft(near("llama", 4, 0.1))
        given["custom_generate"] = proxytune.SpeculativeDecoding(seed=1, draft=draft, draft_tokens=3)
    return given
