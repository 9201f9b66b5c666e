"""Models that follow any prefix, in as few token-forwards as possible: a processor's companions, and those of a gate.

`generate()` reorders beams and rolls back drafts without telling a logits processor, which gets only the whole prefix.
So the companions compare the prefix with the rows in their cache, keep what they share, and forward only the rest: one
token in each step, or, where a gate was shut meanwhile, all that they missed in one pass. They share one comparison and
one cache. They hold one batch at a time; threads take turns, each on the cache the other has left. The comparison makes
the host wait for the device (the composed model without a gate has no such wait). On a GPU companions may be called on
any stream: they wait for the stream on which their cache was used last.

A cache lives for one generation, as that of `generate()` does, so that a model changed between two of them is read
anew. A caller that knows where one begins says so (`begin_generation`). For one that does not (`told=False`), a prefix
that does not go on from the last text begins one. A prefix that does may still be another generation's, which continues
that text: there the models' fingerprints are compared in every step.

All rows catch up over the same columns, also those whose gate is shut. A pass reads the weights once whatever it
computes, and every column is read once in the end, so leaving rows out would save no reading of weights; it would only
move a row's columns to a later pass, and leave rows of different lengths in one cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from proxytune.errors import InputError
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.cuda_streams import CompanionStreams, StreamOrder, tensors_of
from proxytune.models.members.fingerprint import Fingerprint
from proxytune.models.members.forward import Text, run_members
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import rewindable_layers
from proxytune.models.members.text_checks import check_ids, refuse_no_numbers

__all__ = ["PrefixCached"]

_PADDING = -1  # no token id: a padded position equals padded positions only


class PrefixCached:
    """Causal LMs that read one text, and a KV cache of them all that follows any prefix.

    Attributes:
        members: The models, with their roles and the numbers of tokens they were run on.
        finite: Whether NaN among the logits of a prompt is an error.
        prefill_chunk_size: Tokens per forward pass over a long text; None for all at once. Changes rounding only.
    """

    def __init__(self, members: Sequence[Member], *, memo: int = 32) -> None:
        """Wrap members, at least one.

        Args:
            members: The members, examined.
            memo: For how many of the last positions of a single row to keep logits, so that a draft's step and its
                verification cost one forward. Batches keep one position.
        """
        self.members = list(members)
        self._memo = memo
        self.prefill_chunk_size: int | None = None
        self.finite = True
        # Sliding-window layers drop what left the window, and recurrent ones keep one state: neither can be rolled
        # back. They are used while nothing is (sampling, beams); the first rollback that fails switches to full layers
        # and kept states.
        self._keep_all = False
        self._turn = threading.RLock()
        self._turns = {device: StreamOrder() for device in self._devices}
        self._asked_by: int | None = None  # the thread
        self.reset()

    @property
    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(m.device for m in self.members))

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without a prefix; a lock cannot be copied.
        return {k: v for k, v in self.__dict__.items() if k != "_turn"} | {
            "_cache": None,
            "_key": None,
            "_logits": [],
            "_filled_by": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turn = threading.RLock()

    def reset(self) -> None:
        """Forget the cached prefix; the next call starts with a prefill."""
        self._cache: DynamicCache | None = None
        self._spans: list[tuple[int, int]] = []  # of each member's layers in the cache
        self._key: torch.Tensor | None = None  # [B, L, texts]: what the cache holds, padding as _PADDING
        self._logits: list[tuple[torch.Tensor, ...]] = []  # per position, each member's [B, V_i], in order
        self._beyond: tuple[
            bool, ...
        ] = ()  # whether long-rope members filled it by their frequencies beyond the switch
        self._first = 0  # the length of the generation's first prefix
        self._filled_by: list[Fingerprint] | None = None
        self._begun: bool | None = None  # whether a generation was announced, and then whether its cache was handed on

    def begin_generation(self, *, handed_on: bool) -> None:
        """Announce a generation, before its first `logits_for`.

        Args:
            handed_on: Whether it goes on from the cache of an earlier one. Then this cache is kept as well, if the
                models are unchanged.
        """
        with self._turn:
            self._begun = handed_on

    @torch.no_grad()
    def logits_for(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        own: Mapping[str, Text] | None = None,
        last: int = 1,
        told: bool = True,
        sides: CompanionStreams | None = None,
    ) -> list[torch.Tensor]:
        """Each model's raw logits after a prefix, and after the `last − 1` prefixes before it.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            attention_mask: `[B, ≤ T]`, 1 for tokens and 0 for padding; positions beyond it count as tokens. None if
                nothing is padded.
            position_ids: `[B, T]`; None to count by the mask.
            own: Role → the whole text of a member that reads another, `[B, T]` each.
            last: How many of the last positions to return.
            told: Whether the caller announces generations.
            sides: Side streams for members on a GPU.

        Returns:
            `[B, last, V_i]` of each, in the model's dtype and on its device; do not write to them.

        Raises:
            InputError: If the prefix is shorter than `last`, longer than a model's context, or has ids that a model
                cannot embed.
            UnsupportedModeError: If the prefix is left-padded, and a model is wrong there.
        """
        n = input_ids.shape[1]
        if n < last or last < 1:
            raise InputError.of(
                "input_ids",
                expected=f"a prefix of at least {max(last, 1)} tokens",
                got=f"{n} tokens",
                remedy="A companion needs the whole prefix, not only the new ids.",
            )
        place = self.members[0].device
        ids = input_ids.to(place)
        mask = _full_mask(ids, attention_mask)  # [B, T] or None
        positions = None if position_ids is None else position_ids.to(place)
        keys = [_key_of(ids, mask)]
        if positions is None:
            positions = None if mask is None else positions_of(mask)
        else:
            keys.append(positions if mask is None else positions.masked_fill(mask == 0, _PADDING))
        texts = {role: _on(place, text) for role, text in (own or {}).items()}
        keys += [_key_of(text.input_ids, text.attention_mask) for text in texts.values()]
        shared = Text(ids, mask, positions)
        for member in self.members:
            member.refuse_padding(texts.get(member.role, shared).attention_mask)
        with self._turn, ExitStack() as turns:
            for device, order in self._turns.items():
                turns.enter_context(order.on(device, self._held()))
            self._asked_by = threading.get_ident()
            found = self._advance(shared, texts, torch.stack(keys, -1), last, told, sides)
            return [_stacked([at[i] for at in found]) for i in range(len(self.members))]

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Run the next token of a text ahead of its `logits_for`, which then finds the logits cached.

        Nothing is done if the cache holds another number of rows or tokens, or another thread has used it since: then
        more than one token is to run, and perhaps in vain.
        """
        rows, length = input_ids.shape
        with self._turn:
            follows = self._key is not None and self._key.shape[:2] == (rows, length - 1)
            if follows and self._begun is None and self._asked_by == threading.get_ident():
                self.logits_for(input_ids, attention_mask)

    def forget_all_but_last(self) -> None:
        """Free the logits of all positions but the last."""
        if len(self._logits) > 1:
            self._logits = [tuple(z.clone() for z in self._logits[-1])]

    def _held(self) -> Iterator[torch.Tensor | None]:
        """All tensors that outlive a step."""
        return chain(tensors_of(self._cache), [self._key], chain.from_iterable(self._logits))

    def _advance(
        self,
        text: Text,
        own: Mapping[str, Text],
        key: torch.Tensor,
        last: int,
        told: bool,
        sides: CompanionStreams | None,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Bring the cache to the prefixes `key` and return the logits at their last positions; see `logits_for`."""
        n = key.shape[1]
        if self._begun is not None and not (self._begun and self._is_current()):
            self.reset()
        self._begun = None
        keep = self._match(key)
        if keep and not told and not (self._first < n <= keep + 1 and self._is_current()):
            self.reset()
            keep = 0
        beyond = tuple(is_beyond(m.switch, n, own.get(m.role, text).attention_mask) for m in self.members)
        if keep and beyond != self._beyond:
            self.reset()  # other frequencies for all positions
            keep = 0
        if keep == 0:
            self._first = n
        if keep > n - last and self._remembered(keep) < keep - (n - last):
            keep = n - last  # the cache holds these positions, but not their logits
        if keep == n:
            known = self._remembered(n)
            return self._logits[known - last : known]
        keep = self._rollback(keep)
        if self._cache is None or n - keep > 1:
            for member in self.members:
                read = own.get(member.role, text)
                check_ids(read.input_ids[:, keep:], [member])
                member.refuse_gaps(read.attention_mask)
        if self._cache is None:
            self._cache = self._new_cache()
        # An interrupted forward leaves some layers longer than others. Without its key the cache is not used again.
        self._key = None
        new = min(last, n - keep)
        memo = max(last, self._memo if key.shape[0] == 1 else 1)
        # Logits are kept without gaps; those that go are freed before new ones are made.
        self._logits = self._logits[-(memo - new) :] if n - keep <= last and memo > new else []
        chunk = n if any(beyond) else self.prefill_chunk_size or n
        # The last chunk holds all positions whose logits are needed.
        for start, end in pairwise([keep, *range(keep + chunk, n - new + 1, chunk), n]):
            logits = run_members(
                self.members,
                self._spans,
                **_part(text, start, end)._asdict(),
                cache=self._cache,
                logits_to_keep=new if end == n else 1,
                latent=[None] * len(self.members),
                precomputed={},
                texts={role: _part(one, start, end) for role, one in own.items()},
                sides=sides,
            )  # [B, K, V_i] each
        ran = [z for z in logits if z is not None]
        if keep == 0 and self.finite:  # the host has waited for the ids
            for member, z in zip(self.members, ran, strict=True):
                refuse_no_numbers(z[:, -1], f"the {member.role}'s logits")
        # Only now: a model may set itself up in its first pass.
        if self._filled_by is None:
            self._filled_by = [Fingerprint(m.model) for m in self.members]
        self._key, self._beyond = key, beyond
        self._logits += list(zip(*(z.unbind(1) for z in ran), strict=True))
        return self._logits[-last:]

    def _new_cache(self) -> DynamicCache:
        parts = [empty_cache(m.config, windows=not self._keep_all) for m in self.members]
        cache, self._spans = parts[0], [(0, len(parts[0].layers))]
        for part in parts[1:]:
            self._spans.append((len(cache.layers), len(cache.layers) + len(part.layers)))
            cache.layers = [*cache.layers, *part.layers]
        if self._keep_all:
            for layer in rewindable_layers(cache):
                layer.activate_past_recording()
        return cache

    def _is_current(self) -> bool:
        """Whether the models are those that filled the cache."""
        return self._filled_by is not None and all(
            mark.holds(m.model) for mark, m in zip(self._filled_by, self.members, strict=True)
        )

    def _remembered(self, length: int) -> int:
        """How many positions up to `length`, which the cache covers, have cached logits."""
        return 0 if self._key is None else len(self._logits) - (self._key.shape[1] - length)

    def _match(self, key: torch.Tensor) -> int:
        """Reorder the cached rows to share as much as possible with the prefixes; return the length they share."""
        if self._key is None or self._cache is None or self._key.shape[2] != key.shape[2]:
            self.reset()
            return 0
        length = min(key.shape[1], self._key.shape[1])
        if key.shape[0] == self._key.shape[0] and torch.equal(key[:, :length], self._key[:, :length]):
            return length
        # Row by row: all pairs at once would take B² copies of the text.
        shared = torch.stack([_shared_length(self._key[:, :length], row) for row in key[:, :length]])  # [B, cached B]
        # On a tie the row stays where it is, which avoids a reordering.
        stay = torch.eye(key.shape[0], self._key.shape[0], device=key.device, dtype=torch.long)
        rows = (2 * shared + stay).argmax(1)  # [B]
        keep = int(shared.gather(1, rows[:, None]).min())
        if keep == 0:
            self.reset()
            return 0
        self._cache.reorder_cache(rows)
        self._key = self._key[rows]
        self._logits = [tuple(z[rows.to(z.device)] for z in at) for at in self._logits]
        return keep

    def _rollback(self, keep: int) -> int:
        """Shorten the cache to `keep` positions; return its length now (0 after starting over)."""
        if self._key is None or self._cache is None:
            return 0
        surplus = self._key.shape[1] - keep
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
        self._key = self._key[:, :keep]
        self._logits = self._logits[:-surplus]
        return keep


def _key_of(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return ids if mask is None else ids.masked_fill(mask == 0, _PADDING)


def _on(place: torch.device, text: Text) -> Text:
    mask, positions = (None if x is None else x.to(place) for x in text[1:])
    return Text(text.input_ids.to(place), mask, positions)


def _part(text: Text, start: int, end: int) -> Text:
    """The columns `start` to `end` of a whole text, with the mask up to there."""
    return Text(
        text.input_ids[:, start:end],
        None if text.attention_mask is None else text.attention_mask[:, :end],
        None if text.position_ids is None else text.position_ids[:, start:end],
    )


def _stacked(logits: list[torch.Tensor]) -> torch.Tensor:
    """`[B, V]` each → `[B, n, V]`; a single one is not copied."""
    return logits[0][:, None] if len(logits) == 1 else torch.stack(logits, 1)


def _shared_length(cached: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """How many leading positions of a row `[L, texts]` each cached row `[C, L, texts]` shares with it: `[C]`."""
    differs = (cached != row).any(-1)
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
