"""Decode steps under a gate over static caches, as graphs: the base's, and where some row asks, the companions'.

The base's graph ends in the gate's decision, and in what the step would be if no row asked. The host reads one number.
If a row asks, a second graph lets the companions read what they have missed, at once with the new token, and ends in
the sum or the draw.

Graphs have fixed shapes. So the companions read the last 1, 4, 16 or 64 tokens, the least number that covers what they
missed: what they had read they read again, and write the same to the same columns. After 64 tokens without them they
read these, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from proxytune.formulas.gates import Gate
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.compiled_step import with_own_code
from proxytune.models.members.composite_cache import at_home, idle_in, room_of, stored, view
from proxytune.models.members.forward import Text
from proxytune.models.members.joint_step import OnDevice, Tail, hindrance_of_step, pass_of, same_in_each_step
from proxytune.models.members.member import Member
from proxytune.models.members.ragged_static import RaggedLayer, rows_of
from proxytune.models.members.self_test_passes import prepared_inputs

__all__ = ["GatedStep", "Stepped"]

_LENGTHS = (1, 4, 16, 64)
_MOST = _LENGTHS[-1]
_WAITS = "_proxytune_waits"
Opens = Callable[[bool, torch.Tensor, torch.Tensor], torch.Tensor]
"""Which of the base's rows `[B, V]` open a gate, given whether it goes by the largest probability, and its limit."""


class Stepped(NamedTuple):
    """What a gated step gives.

    Attributes:
        logits: Raw logits `[B, 1, V_i]` of each member; None for one that did not run.
        opened: `[B, 1]`, bool: the rows that asked.
        found: What the tail made of them; None without one.
    """

    logits: list[torch.Tensor | None]
    opened: torch.Tensor
    found: torch.Tensor | None


class _Late:
    """One cache whose companions may be behind: what they have to read, and where."""

    def __init__(self, members: Sequence[Member], spans: Sequence[tuple[int, int]], cache: Cache, text: Text) -> None:
        idle = idle_in(cache)
        self.running = [i for i in range(len(members)) if i not in idle]
        self.views = {i: view(cache, *spans[i]) for i in self.running}
        self.layers = list(cache.layers)
        self.idle = idle
        self.behind, self.device = 0, members[0].device
        ids, positions = text.input_ids, text.position_ids
        assert positions is not None
        rows, self.held = len(ids), min(ids.shape[1], _MOST)
        # The last tokens `[B, 64]` and their positions; and how many there are in all.
        self.ids, self.positions = (
            at_home(cache, name, torch.nn.functional.pad(x.expand(rows, -1)[:, -_MOST:], (_MOST - self.held, 0)))
            for name, x in (("ids", ids.to(self.device)), ("positions", positions.to(self.device)))
        )
        self.mask: torch.Tensor | None = text.attention_mask
        first = next(x for x in stored(self.views[self.running[1]]))
        self.length = at_home(cache, "length", first.cumulative_length)


class GatedStep:
    """The gated steps of one composed model, compiled at their first use; a copy compiles anew.

    Attributes:
        config: The settings, as for transformers' `generate(compile_config=…)`.
        hindrance: Why the companions ran along in the last gated generation over a static cache; None if they waited.
    """

    def __init__(self, config: CompileConfig) -> None:
        self.config = config
        self.hindrance: str | None = None
        self._calls: dict[Any, Callable[..., Any]] = {}
        self._weights, self._limit = OnDevice(), OnDevice()
        self._late: WeakKeyDictionary[Cache, _Late] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def allow(
        self, members: Sequence[Member], spans: Sequence[tuple[int, int]], cache: Cache, other: str | None
    ) -> None:
        """Let companions wait on an empty static cache of a `generate()`, unless `other` says in words why not."""
        setattr(cache, _WAITS, False)
        self.hindrance = other or self._hindrance(members, spans, cache)
        setattr(cache, _WAITS, self.hindrance is None)

    def _hindrance(self, members: Sequence[Member], spans: Sequence[tuple[int, int]], cache: Cache) -> str | None:
        if type(cache) is not StaticCache or getattr(cache, "offloading", False):
            return f"a {type(cache).__name__}, not a static cache on the device"
        room = room_of(cache)
        if room is None:
            return "a static cache of sliding layers only"
        if (why := members[0].stands_alone) is not None:
            return f"the base, {why}"
        for i in range(1, len(members)):
            for n in range(*spans[i]):  # they go back, so they keep all tokens
                if getattr(cache.layers[n], "is_sliding", False) and cache.layers[n].get_seq_length() == 0:
                    cache.layers[n] = RaggedLayer(max_cache_len=room)
            why = members[i].stands_alone or members[i].ragged_hindrance(view(cache, *spans[i]))
            if why is not None:
                return f"the {members[i].role}, {why}"
        return "members on several devices" if len({member.device for member in members}) > 1 else None

    def read(
        self, members: Sequence[Member], spans: Sequence[tuple[int, int]], cache: Cache | None, text: Text
    ) -> None:
        """Note that all members have read `text`, a prompt or its last part, into a cache."""
        if cache is None or not getattr(cache, _WAITS, False) or text.position_ids is None:
            return
        self._late[cache] = _Late(members, spans, cache, text)

    def waits(self, cache: Cache | None) -> bool:
        """Whether a cache's companions may be behind."""
        return type(cache) is StaticCache and not torch.compiler.is_compiling() and cache in self._late

    def __call__(
        self,
        members: Sequence[Member],
        text: Text,
        cache: Cache,
        *,
        gate: Gate,
        opens: Opens,
        numbers: Sequence[float],
        tail: Tail | None,
    ) -> Stepped | None:
        """One step, in one graph or two; None if it has to be made in another way.

        Args:
            members: All members.
            text: The tokens `[B, 1]`, with the mask `[B, past + 1]` and positions as in `Member.forward`.
            cache: The composite cache, which is extended in place.
            gate: The formula's gate.
            opens: Says which rows open it.
            numbers: Each member's weight.
            tail: What to make of the logits.
        """
        late = self._late[cache]
        base = members[0]
        if not self._serves(late, members, text, cache):
            return None
        late.mask = text.attention_mask
        shared = same_in_each_step(text, room_of(cache), late.device)
        base.token_forwards += len(text.input_ids)
        base.passes += 1
        weights = self._weights([numbers[i] for i in late.running], len(text.input_ids), late.device)
        limit = gate.entropy if gate.top1 is None else gate.top1
        assert limit is not None
        torch.compiler.cudagraph_mark_step_begin()
        step = self._compiled(_base_step, type(tail))
        z, opened, asks, found = step(
            base.model, _told(base, shared, late.views[0]), late.ids, late.positions, late.length,
            opens, gate.top1 is not None, self._limit([limit], 1, late.device)[0], tail, weights,
        )  # fmt: skip
        late.held, late.behind = min(late.held + 1, _MOST), late.behind + 1
        logits: list[torch.Tensor | None] = [None] * len(members)
        if not bool(asks):  # the one place where the host waits for the device
            logits[0] = z.clone()
            if late.behind == _MOST:
                self._catch_up(members, late, 0)
            return Stepped(logits, opened[:, None].clone(), None if found is None else found.clone())
        many = next((n for n in _LENGTHS if late.behind <= n <= late.held), None)
        if many is None:
            self._catch_up(members, late, 1)
            many = 1
        companions = [members[i] for i in late.running[1:]]
        for member in companions:
            member.token_forwards += many * len(text.input_ids)
            member.passes += 1
        step = self._compiled(_companions_step, type(tail), many)
        told = {k: x for k, x in shared.items() if k == "attention_mask"}
        others, found = step(
            [m.model for m in companions],
            [told | {CACHE: late.views[i]} for i in late.running[1:]],
            [m.takes_logits_to_keep for m in companions],
            late.ids, late.positions, late.length, many, z, opened, tail, weights,
        )  # fmt: skip
        late.behind = 0
        for i, x in zip(late.running, (z, *others), strict=True):
            logits[i] = x.clone()
        return Stepped(logits, opened[:, None].clone(), None if found is None else found.clone())

    def end(self, members: Sequence[Member], cache: Cache | None, *, failed: bool = False) -> None:
        """Let companions wait no longer, after a `generate()` that returns a cache or was given it.

        After one that `failed` the cache is emptied: how far it was read is not known.
        """
        if cache is None or not hasattr(cache, _WAITS):
            return
        delattr(cache, _WAITS)
        if failed and self._late.pop(cache, None) is not None:
            cache.reset()
        self.settle(members, cache)

    def forget(self, cache: Cache) -> None:
        """A cache was emptied: there is nothing to read any more."""
        self._late.pop(cache, None)

    def settle(self, members: Sequence[Member], cache: Cache) -> None:
        """Let companions read what they have missed of a cache, for whoever goes on with it in another way."""
        late = self._late.pop(cache, None) if self.waits(cache) else None
        if late is not None:
            self._catch_up(members, late, 0)

    def _serves(self, late: _Late, members: Sequence[Member], text: Text, cache: Cache) -> bool:
        mask, room = text.attention_mask, room_of(cache)
        running = [members[i] for i in late.running]
        return (
            text.input_ids.shape[1] == 1
            and text.position_ids is not None
            and mask is not None
            and room is not None
            and mask.shape[1] <= room
            and cache.layers == late.layers
            and rows_of(cache) is None
            and hindrance_of_step(running, text, cache) is None
        )

    def _compiled(self, function: Any, *key: Any) -> Callable[..., Any]:
        """A function's graph for each kind of tail and number of tokens: torch limits the graphs of each code."""
        if (function, *key) not in self._calls:
            self._calls[function, *key] = torch.compile(with_own_code(function), **self.config.to_dict())
        return self._calls[function, *key]

    @torch.no_grad()
    def _catch_up(self, members: Sequence[Member], late: _Late, but: int) -> None:
        """Let companions read all they missed but the last `but` tokens, uncompiled."""
        new, stop = late.behind - but, _MOST - but
        if not new:
            return
        assert late.mask is not None
        seen = late.mask[:, : late.mask.shape[1] - but]
        for i in late.running[1:]:
            member, part = members[i], late.views[i]
            here = slice(stop - new, stop)
            given = {
                "input_ids": late.ids[:, here],
                "position_ids": late.positions[:, here],
                "attention_mask": seen.to(late.device),
                "use_cache": True,
                CACHE: part,
            }
            last = {"logits_to_keep": 1} if member.takes_logits_to_keep else {}
            member.model(**prepared_inputs(member.model, given, part), **last, return_dict=True)
            member.token_forwards += new * len(late.ids)
            member.passes += 1
        late.behind = but


def _told(member: Member, shared: dict[str, torch.Tensor], part: Cache) -> dict[str, Any]:
    told = {k: x for k, x in shared.items() if k != "position_ids" or member.takes_positions}
    return {**told, CACHE: part}


def _base_step(
    model: Any,
    given: dict[str, Any],
    ids: torch.Tensor,
    positions: torch.Tensor,
    length: torch.Tensor,
    opens: Opens,
    by_top1: bool,
    limit: torch.Tensor,
    tail: Tail | None,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    for held, new in ((ids, given["input_ids"]), (positions, given["position_ids"])):
        held.copy_(torch.cat([held[:, 1:], new.expand(len(held), -1)], 1))
    length.add_(1)
    z = pass_of(model, given)  # [B, 1, V]
    opened = opens(by_top1, limit, z[:, -1])  # [B]
    found = None if tail is None else tail([z], torch.ones_like(weights[:, :1]))
    return z, opened, opened.any(), found


def _companions_step(
    models: list[Any],
    given: list[dict[str, Any]],
    keeping: list[bool],
    ids: torch.Tensor,
    positions: torch.Tensor,
    length: torch.Tensor,
    many: int,
    base: torch.Tensor,
    opened: torch.Tensor,
    tail: Tail | None,
    weights: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    found = []
    for model, told, keeps in zip(models, given, keeping, strict=True):
        for layer in told[CACHE].layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.copy_(length - many)
        last = {"logits_to_keep": 1} if keeps else {}
        text = {"input_ids": ids[:, -many:], "position_ids": positions[:, -many:]}
        found.append(pass_of(model, {**told, **text, **last})[:, -1:])
    if tail is None:
        return found, None
    tail.back()
    alone = torch.zeros_like(weights)
    alone[:, 0] = 1.0
    return found, tail([base, *found], torch.where(opened[:, None], weights, alone))
