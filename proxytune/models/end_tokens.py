"""Where a composition stops: at the end tokens of the base, and at those with which the expert ends its turn.

A chat expert on a pretrained base writes its own end token, which the base's generation config does not know: without
it, the answer would be followed by an invented next turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch

from proxytune.errors import SteeringWarning
from proxytune.recipe import EndTokens
from proxytune.validation import choice

__all__ = ["EndWatch", "ends_of", "listed_ends", "stop_composed", "stopping_ids"]


def listed_ends(value: Any) -> list[int]:
    """The ids of an `eos_token_id`, which may be None, one id, several, or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [] if value is None else [int(i) for i in value] if isinstance(value, list | tuple) else [int(value)]


def ends_of(model: Any, named: int | None = None) -> list[int]:
    """The ids at which a model ends: those of its generation config, then that of its tokenizer, if it ends at all."""
    ends = listed_ends(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    # Fine-tunes often name the end of a turn in the tokenizer alone.
    return [*ends, named] if ends and named is not None and named not in ends else ends


def stopping_ids(
    base: Any,
    expert: Any,
    wanted: EndTokens | None,
    tokenizers: Mapping[str, Any] | None = None,
    usable: int | None = None,
) -> list[int] | None:
    """The ids at which a steered base stops; None if the expert has none that `base` lacks, so nothing has to change.

    Args:
        base: The base's `eos_token_id`.
        expert: The expert.
        wanted: Whose end tokens; None for both, with a warning.
        tokenizers: Role → tokenizer, as far as they are known.
        usable: How many ids every member can embed; higher ones are never written. None if that is not known.

    Raises:
        InputError: If `wanted` is none of `EndTokens`.

    Warns:
        SteeringWarning: With `wanted=None`, if the expert has end tokens that the base lacks; and if texts should end
            with a token that is never written.
    """
    if wanted is not None:
        choice("end_tokens", wanted, get_args(EndTokens))
    tokenizers = tokenizers or {}
    own, of_base = (getattr(tokenizers.get(role), "eos_token_id", None) for role in ("expert", "base"))
    # What both tokenizers name was not tuned into the expert.
    ours, theirs = listed_ends(base), ends_of(expert, own if "base" in tokenizers and own != of_base else None)
    meant = ours if wanted == "base" else theirs if wanted == "expert" and theirs else [*ours, *theirs]
    if usable is not None and (lost := [i for i in dict.fromkeys(meant) if i >= usable]):
        whose = "expert" if lost[0] in theirs else "base"
        warnings.warn(
            f"texts cannot end with {_named(lost, tokenizers.get(whose))}, an end token of the {whose}: not every "
            f"member can embed it ({usable:,} ids are common to all), so it is never written, and texts go on. Use "
            "members that all have it, or end texts by stop_strings or max_new_tokens.",
            SteeringWarning,
            stacklevel=3,
        )
        theirs = [i for i in theirs if i < usable]
    more = [i for i in theirs if i not in ours]
    if not more:
        return theirs if wanted == "expert" and theirs and set(theirs) != set(ours) else None
    if wanted is None:
        tokenizer = tokenizers.get("expert", tokenizers.get("base"))
        warnings.warn(
            f"the expert also ends its turn with {_named(more, tokenizer)}, at which the base, which stops at "
            f"{_named(ours, tokenizer)}, would go on: texts stop at all of these. Nothing is wrong: pass "
            "end_tokens='union' to keep that without this warning, or 'base' or 'expert' to stop at the end tokens of "
            "that one alone; eos_token_id= of generate() overrides it for a call.",
            SteeringWarning,
            stacklevel=3,
        )
    return ours if wanted == "base" else theirs if wanted == "expert" else [*ours, *more]


class EndWatch:
    """Notices, in the prefixes of a generation, that a text goes on after an end token.

    Attributes:
        ends: The ids of the end tokens.
    """

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends
        self._start = self._length = -1

    def passed(self, input_ids: torch.Tensor) -> int | None:
        """An end token that a generated text of `[B, T]` passed two tokens before its last; None if there is none."""
        length = input_ids.shape[1]
        if length != self._length + 1:
            self._start = length
        self._length = length
        if not self.ends or length < self._start + 3:  # the prompt may hold earlier turns
            return None
        text = input_ids[:, self._start :]
        ended = torch.isin(text, torch.tensor(self.ends, device=text.device)).cumsum(-1)[:, :-2] > 0  # [B, N - 2]
        # Padding repeats one token, and not in all rows: of one at least, the next token is asked for.
        on = ended & (text[:, 1:-1] != text[:, 2:])
        passed = ended[:, -1] if bool(ended[:, -1].all()) else on.any(-1)
        rows = text[passed].flatten().tolist()
        return next((token for token in rows if token in self.ends), None)


def stop_composed(model: Any, wanted: EndTokens | None, tokenizers: Mapping[str, Any] | None = None) -> None:
    """Make a new composed model stop where `stopping_ids` says, in its generation config and config, and note it.

    Raises:
        InputError: If `wanted` is none of `EndTokens`.

    Warns:
        SteeringWarning: With `wanted=None`, if the expert has end tokens that the base lacks.
    """
    ids, now = None, model.generation_config.eos_token_id
    for tuned in _tuned(model):
        found = stopping_ids(now, tuned, wanted, tokenizers, model.usable_ids)
        ids, now = (ids, now) if found is None else (found, found)
        if wanted == "expert":
            break
    if ids is not None:
        model.generation_config.eos_token_id = model.config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        if model.config.recipe is not None:
            # Said in the recipe, so that its generation_config.json is known to hold the choice.
            model.config.recipe = replace(model.config.recipe, end_tokens=wanted or "union")


def _tuned(model: Any) -> list[Any]:
    """The companions whose weight is positive, other than the base itself: what texts move towards."""
    weights = dict(zip(model.formula.roles, model.formula.weights(), strict=True))
    roles = ["expert"] if "expert" in weights else [role for role, weight in weights.items() if weight > 0]
    found = [getattr(model, role) for role in roles]
    return [companion for companion in found if companion is not model.base or roles == ["expert"]]


def _named(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return "no token"
    tokens = [None] * len(ids) if tokenizer is None else tokenizer.convert_ids_to_tokens(ids)
    pairs = zip(ids, tokens, strict=True)
    return ", ".join(f"id {i}" if token is None else f"{token!r} (id {i})" for i, token in pairs)
