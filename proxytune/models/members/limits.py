"""What one model of the composition cannot do: padding, positions, moved rows, static caches, long texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from proxytune.errors import CacheError, InputError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.layer_kinds import kinds_of, refuse_lacking
from proxytune.models.members.masks import is_left_padded, positions_of
from proxytune.models.members.ragged_static import hindrance_of
from proxytune.models.members.self_test import static_fault
from proxytune.models.members.self_test_passes import Verdict
from proxytune.validation import shown

__all__ = ["MemberLimits"]


class MemberLimits:
    """What a member refuses, by its layers, its arguments and the self-test; the attributes are those of `Member`."""

    role: str
    model: PreTrainedModel
    config: PreTrainedConfig
    context: int | None
    stateful: bool
    takes_positions: bool
    verdict: Verdict
    whole_text: str | None
    cache_name: str
    _cannot_pad: list[str]
    _examined: bool
    _own_cache: type[Cache] | None

    def _name(self) -> str:
        return f"{type(self.model).__name__} ({getattr(self.model.config, 'model_type', '')})"

    def read_rightly(self, generation_config: Any, attention_mask: torch.Tensor | None) -> None:
        """Have a `generate()` of the model itself read a prompt at once, if it goes on wrongly in chunks.

        So do models that continue a cache wrongly with several tokens, and recurrent ones in padding `[B, T]`.
        """
        padded = self.stateful and attention_mask is not None and not bool((attention_mask != 0).all())
        lengthless = kinds_of(self.config) <= {"linear_attention", "conv"}  # generate() asks the cache for its length
        if self.verdict.several or padded or lengthless:
            generation_config.prefill_chunk_size = None

    def refuse_gaps(self, attention_mask: torch.Tensor | None) -> None:
        """Raise UnsupportedModeError for padding inside a text `[B, T]`, if the model has a state that it changes.

        Waits for the device, for such models only.
        """
        if not self.stateful or attention_mask is None:
            return
        there = attention_mask != 0
        inside = ~there & (there.long().cumsum(1) > 0) & (there.flip(1).long().cumsum(1).flip(1) > 0)
        if bool(inside.any()):
            raise UnsupportedModeError.of(
                f"padding inside a text for the {self.role}",
                expected="padding before a text: a recurrent layer forgets a little with each token, also of padding",
                got=f"a {self._name()}, and padding between tokens in row {int(inside.any(1).int().argmax())}",
                remedy="Pad the whole text at the left; if the padding token is text here, pass attention_mask.",
            )

    def refuse_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Raise UnsupportedModeError for padding before tokens, if the self-test saw that the model is wrong there."""
        # Waits for the device, for such models only.
        strange = self._cannot_pad
        if attention_mask is None or (self.verdict.padding is None and not strange):
            return
        if is_left_padded(attention_mask):
            raise UnsupportedModeError.of(
                f"left padding for the {self.role}",
                expected="a member that tells padding from text by its mask",
                got=f"a {self._name()} with {_grouping(strange) if strange else self.verdict.padding}",
                remedy="Pass prompts of the same length, or one at a time.",
            )

    def refuse_positions(self, position_ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Raise InputError for positions other than those of the mask `[B, past + N]`, if the model cannot be told any.

        Padding may have any position. Waits for the device, for such models only.
        """
        if self.takes_positions and (not self.stateful or position_ids.ndim != 2):
            return
        new = position_ids.shape[-1]
        there, given = mask[:, -new:] != 0, position_ids.to(mask.device)
        if self.takes_positions:  # from any place on, but not for another text, which would begin at the old state
            wrong = (given.diff(dim=-1) != 1) & there[:, 1:] & there[:, :-1]
        else:
            wrong = (given != positions_of(mask)[:, -new:]) & there
        if bool(wrong.any()):
            stands = "keeps one state of all tokens" if self.takes_positions else "counts positions by itself"
            raise InputError.of(
                f"position_ids for the {self.role}",
                expected=f"none, or 0, 1, 2, … without padding: a {self._name()} {stands}",
                got=shown(position_ids.tolist(), 80),
                remedy="Leave them out; give packed texts as rows; or use a member that takes positions.",
            )

    def refuse_moved_rows(self) -> None:
        """Raise UnsupportedModeError if rows of the model's cache cannot be moved, by its layers or the self-test."""
        refuse_lacking(
            [self],
            "move",
            "speculation in a batch",
            expected="members that keep something for each token, so that rows may accept different numbers of drafts",
            remedy="Pass one prompt at a time (num_return_sequences=1; --batch-size 1 on the command line), or decode "
            "without speculation.",
        )
        if self.verdict.moved is not None:
            raise UnsupportedModeError.of(
                f"speculation in a batch for the {self.role}",
                expected="a member that can be told the positions of rows that accept different numbers of tokens",
                got=f"a {self._name()} with {self.verdict.moved}",
                remedy="Pass one prompt at a time, or decode without speculation.",
            )

    def refuse_static_layers(self) -> None:
        """Raise UnsupportedModeError if the model can have no static cache."""
        expected, remedy = "layers that keep their size from the start", "Leave out cache_implementation."
        refuse_lacking([self], "static", "a static cache", expected=expected, remedy=remedy)
        if self.whole_text is not None:
            raise UnsupportedModeError.of(
                f"a static cache for the {self.role}",
                expected=expected,
                got=f"a {self._name()} that {self.whole_text}",
                remedy=remedy,
            )

    def refuse_static_cache(self, length: int) -> None:
        """Test an examined model on a static cache of `length`; UnsupportedModeError if it is wrong there."""
        if not self._examined or (fault := static_fault(self.model, self.takes_positions, length)) is None:
            return
        raise UnsupportedModeError.of(
            f"a static cache for the {self.role}",
            expected="a member that is right on a static cache",
            got=f"a {self._name()} with {fault}",
            remedy="Leave out cache_implementation, or pass no StaticCache.",
        )

    def ragged_hindrance(self, cache: Cache) -> str | None:
        """Why rows of its static cache, that is filled or empty, cannot differ in length or go back; None if they can.

        In words.
        """
        why = hindrance_of(self.model, cache)
        if self.stateful or self.whole_text is not None or self._own_cache is not None or self.cache_name != CACHE:
            why = "what it keeps is not in a static cache"
        elif not self.takes_positions:
            why = "it counts positions by itself"
        return why or static_fault(self.model, True, cache.get_max_length(), ragged=True)

    def refuse_ragged_cache(self, cache: Cache) -> None:
        """Raise CacheError if rows of its static cache, that is filled or empty, cannot differ in length."""
        if (why := self.ragged_hindrance(cache)) is not None:
            raise CacheError.of(
                CACHE,
                expected="a DynamicCache, or a static one in which rows may keep different numbers of drafts",
                got=f"a {type(cache).__name__}, and a {self._name()} as the {self.role}: {why}",
                remedy="Leave out cache_implementation.",
            )

    def refuse_length(self, length: int) -> None:
        """Raise InputError if `length` tokens exceed the model's context."""
        if self.context is not None and length > self.context:
            raise InputError.of(
                f"length for the {self.role}",
                expected=f"at most {self.context} tokens (max_position_embeddings of {type(self.model).__name__})",
                got=f"{length}",
                remedy="Shorten the prompt, lower max_new_tokens, or use a member with a longer context.",
            )


def _grouping(kinds: list[str]) -> str:
    return f"{', '.join(kinds)} layers, which group tokens by their column in the cache"
