"""A small model that follows any prefix, in as few token-forwards as possible.

`generate()` reorders beams and rolls back drafts without telling a logits processor, which gets only the whole prefix.
So the companion compares the prefix with the rows in its cache, keeps what they share, and forwards only the rest. It
holds one batch at a time; threads take turns, each on the cache the other has left. The comparison makes the host wait
for the device once per step (the composed model has no such wait). On a GPU a companion may be called on any stream: it
waits for the stream on which its cache was used last.

A cache lives for one generation, as that of `generate()` does, so that a model changed between two of them is read
anew. A caller that knows where one begins says so (`begin_generation`). For one that does not (`told=False`), a prefix
that does not go on from the last text begins one. A prefix that does may still be another generation's, which continues
that text: there the model's fingerprint is compared in every step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from proxytune.errors import InputError
from proxytune.models.members.adapter_state import AdapterState
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.cuda_streams import StreamOrder, tensors_of
from proxytune.models.members.fingerprint import Fingerprint
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.member import Member, check_ids, refuse_no_numbers
from proxytune.models.members.rewind import rewindable_layers

__all__ = ["PrefixCachedMember"]

_PADDING = -1  # no token id: a padded position equals padded positions only


class PrefixCachedMember:
    """A causal LM and a KV cache that follows any prefix.

    Attributes:
        member: The model, with its role and the number of tokens it was run on.
        finite: Whether NaN among the logits of a prompt is an error.
        prefill_chunk_size: Tokens per forward pass over a long text; None for all at once. Changes rounding only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: str = "companion",
        *,
        adapter: AdapterState = None,
        memo: int = 32,
        self_test: bool = True,
    ) -> None:
        """Wrap a model.

        Args:
            model: A decoder-only causal LM. It is put in evaluation mode.
            role: Its name in messages.
            adapter: The state of its adapters: None as it is, False all off, or a name.
            memo: For how many of the last positions of a single row to keep logits, so that a draft's step and its
                verification cost one forward. Batches keep one position.
            self_test: Whether to test that the model is right by itself.

        Raises:
            UnsupportedModelError: If it cannot be a member, see `Member`; or if it fails the self-test.
        """
        self.member = Member(model.eval(), role, adapter=adapter)
        if self_test:
            self.member.examine()
        self._memo = memo
        self.prefill_chunk_size: int | None = None
        self.finite = True
        # Sliding-window layers drop what left the window, and recurrent ones keep one state: neither can be rolled
        # back. They are used while nothing is (sampling, beams); the first rollback that fails switches to full layers
        # and kept states.
        self._keep_all = False
        self._turn = threading.RLock()
        self._turns = StreamOrder()
        self._asked_by: int | None = None  # the thread
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without a prefix; a lock cannot be copied.
        return {k: v for k, v in self.__dict__.items() if k != "_turn"} | {
            "_cache": None,
            "_ids": None,
            "_logits": [],
            "_filled_by": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turn = threading.RLock()

    def reset(self) -> None:
        """Forget the cached prefix; the next call starts with a prefill."""
        self._cache: DynamicCache | None = None
        self._ids: torch.Tensor | None = None  # [B, L]: what the cache holds, padding as _PADDING
        self._logits: list[torch.Tensor] = []  # [B, V] each: after the last cached positions, in order
        self._beyond = False  # whether a long-rope model filled the cache by its frequencies beyond the switch
        self._first = 0  # the length of the generation's first prefix
        self._filled_by: Fingerprint | None = None
        self._begun: bool | None = None  # whether a generation was announced, and then whether its cache was handed on

    def begin_generation(self, *, handed_on: bool) -> None:
        """Announce a generation, before its first `logits_for`.

        Args:
            handed_on: Whether it goes on from the cache of an earlier one. Then this cache is kept as well, if the
                model is unchanged.
        """
        with self._turn:
            self._begun = handed_on

    @torch.no_grad()
    def logits_for(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        last: int = 1,
        told: bool = True,
    ) -> torch.Tensor:
        """The model's raw logits after a prefix, and after the `last − 1` prefixes before it.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            attention_mask: `[B, ≤ T]`, 1 for tokens and 0 for padding; positions beyond it count as tokens. None if
                nothing is padded.
            last: How many of the last positions to return.
            told: Whether the caller announces generations.

        Returns:
            `[B, last, V]`, in the model's dtype and on its device; do not write to it.

        Raises:
            InputError: If the prefix is shorter than `last`, longer than the model's context, or has ids that the model
                cannot embed.
            UnsupportedModeError: If the prefix is left-padded, and the model is wrong there.
        """
        n = input_ids.shape[1]
        if n < last or last < 1:
            raise InputError.of(
                "input_ids",
                expected=f"a prefix of at least {max(last, 1)} tokens",
                got=f"{n} tokens",
                remedy="A companion needs the whole prefix, not only the new ids.",
            )
        ids = input_ids.to(self.member.device)
        mask = _full_mask(ids, attention_mask)  # [B, T] or None
        self.member.refuse_padding(mask)
        key = ids if mask is None else ids.masked_fill(mask == 0, _PADDING)
        with self._turn, self._turns.on(self.member.device, self._held()):
            self._asked_by = threading.get_ident()
            return self._advance(ids, mask, key, last, told)

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Run the next token of a text ahead of its `logits_for`, which then finds the logits cached.

        Nothing is done if the cache holds another number of rows or tokens, or another thread has used it since: then
        more than one token is to run, and perhaps in vain.
        """
        rows, length = input_ids.shape
        with self._turn:
            follows = self._ids is not None and self._ids.shape == (rows, length - 1)
            if follows and self._begun is None and self._asked_by == threading.get_ident():
                self.logits_for(input_ids, attention_mask)

    def _held(self) -> Iterator[torch.Tensor | None]:
        """All tensors that outlive a step."""
        return chain(tensors_of(self._cache), [self._ids], self._logits)

    def _advance(
        self, ids: torch.Tensor, mask: torch.Tensor | None, key: torch.Tensor, last: int, told: bool
    ) -> torch.Tensor:
        """Bring the cache to the prefixes `key` and return their last logits; see `logits_for`."""
        n = ids.shape[1]
        if self._begun is not None and not (self._begun and self._is_current()):
            self.reset()
        self._begun = None
        keep = self._match(key)
        if keep and not told and not (self._first < n <= keep + 1 and self._is_current()):
            self.reset()
            keep = 0
        beyond = is_beyond(self.member.switch, n, mask)
        if keep and beyond != self._beyond:
            self.reset()  # other frequencies for all positions
            keep = 0
        if keep == 0:
            self._first = n
        if keep > n - last and self._remembered(keep) < keep - (n - last):
            keep = n - last  # the cache holds these positions, but not their logits
        if keep == n:
            known = self._remembered(n)
            return _stacked(self._logits[known - last : known])
        keep = self._rollback(keep)
        if self._cache is None or n - keep > 1:
            check_ids(ids[:, keep:], [self.member])
            self.member.refuse_gaps(mask)
        if self._cache is None:
            self._cache = self._new_cache()
        # An interrupted forward leaves some layers longer than others. Without its ids the cache is not used again.
        self._ids = None
        new = min(last, n - keep)
        memo = max(last, self._memo if ids.shape[0] == 1 else 1)
        # Logits are kept without gaps; those that go are freed before new ones are made.
        self._logits = self._logits[-(memo - new) :] if n - keep <= last and memo > new else []
        position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)  # [B, T]
        chunk = n if beyond else self.prefill_chunk_size or n
        # The last chunk holds all positions whose logits are needed.
        for start, end in pairwise([keep, *range(keep + chunk, n - new + 1, chunk), n]):
            logits = self.member.forward(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if position_ids is None else position_ids[:, start:end],
                cache=self._cache,
                logits_to_keep=new if end == n else 1,
            )  # [B, K, V]
        if keep == 0 and self.finite:  # the host has waited for the ids
            refuse_no_numbers(logits[:, -1], f"the {self.member.role}'s logits")
        # Only now: a model may set itself up in its first pass.
        if self._filled_by is None:
            self._filled_by = Fingerprint(self.member.model)
        self._ids, self._beyond = key, beyond
        self._logits += logits.unbind(1)
        return _stacked(self._logits[-last:])

    def _new_cache(self) -> DynamicCache:
        cache = empty_cache(self.member.config, windows=not self._keep_all)
        if self._keep_all:
            for layer in rewindable_layers(cache):
                layer.activate_past_recording()
        return cache

    def _is_current(self) -> bool:
        """Whether the model is the one that filled the cache."""
        return self._filled_by is not None and self._filled_by.holds(self.member.model)

    def _remembered(self, length: int) -> int:
        """How many positions up to `length`, which the cache covers, have cached logits."""
        return 0 if self._ids is None else len(self._logits) - (self._ids.shape[1] - length)

    def _match(self, key: torch.Tensor) -> int:
        """Reorder the cached rows to share as much as possible with the prefixes; return the length they share."""
        if self._ids is None or self._cache is None:
            self.reset()
            return 0
        length = min(key.shape[1], self._ids.shape[1])
        if key.shape[0] == self._ids.shape[0] and torch.equal(key[:, :length], self._ids[:, :length]):
            return length
        # Row by row: all pairs at once would take B² copies of the text.
        shared = torch.stack([_shared_length(self._ids[:, :length], row) for row in key[:, :length]])  # [B, cached B]
        # On a tie the row stays where it is, which avoids a reordering.
        stay = torch.eye(key.shape[0], self._ids.shape[0], device=key.device, dtype=torch.long)
        rows = (2 * shared + stay).argmax(1)  # [B]
        keep = int(shared.gather(1, rows[:, None]).min())
        if keep == 0:
            self.reset()
            return 0
        self._cache.reorder_cache(rows)
        self._ids = self._ids[rows]
        self._logits = [z[rows] for z in self._logits]
        return keep

    def _rollback(self, keep: int) -> int:
        """Shorten the cache to `keep` positions; return its length now (0 after starting over)."""
        if self._ids is None or self._cache is None:
            return 0
        surplus = self._ids.shape[1] - keep
        if surplus == 0:
            return keep
        if keep == 0:
            self.reset()
            return 0
        try:
            self._cache.crop(-surplus)
        except RuntimeError:  # from a sliding or recurrent layer, if the positions have left its window or states
            self._keep_all = True
            first = self._first
            self.reset()
            self._first = first
            return 0
        self._ids = self._ids[:, :keep]
        self._logits = self._logits[:-surplus]
        return keep


def _stacked(logits: list[torch.Tensor]) -> torch.Tensor:
    """`[B, V]` each → `[B, n, V]`; a single one is not copied."""
    return logits[0][:, None] if len(logits) == 1 else torch.stack(logits, 1)


def _shared_length(cached: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """How many leading positions `[L]` of a row each cached row `[C, L]` shares with it: `[C]`."""
    differs = cached != row
    return torch.where(differs.any(-1), differs.byte().argmax(-1), row.shape[0])


def _full_mask(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask over the whole prefix, or None if nothing is padded."""
    if attention_mask is None:
        return None
    mask = attention_mask.to(ids.device, torch.long)
    missing = ids.shape[1] - mask.shape[1]
    if mask.shape[0] != ids.shape[0] or missing < 0:
        raise InputError.of(
            "attention_mask",
            expected=f"{ids.shape[0]} rows of at most {ids.shape[1]} positions, as input_ids",
            got=f"shape {list(mask.shape)}",
            remedy="Pass the mask of this prompt.",
        )
    if bool((mask == 1).all()):
        return None
    return torch.nn.functional.pad(mask, (0, missing), value=1)
