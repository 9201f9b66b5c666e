"""One decode step of all members as one compiled graph over their static caches, and with it what comes after.

Members compiled one by one (`proxytune.models.members.compiled_step`) cost the host a mask, a launch and the guards of
a graph each, and the sum or the draw comes on top. Here one graph runs every member over one token per row, makes the
masks (their shapes are those of the cache, which do not change), and ends in a *tail*: the members' sum, or the
decision of a loop, with its noise advanced in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticCache

from proxytune import ops
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.compiled_step import with_own_code
from proxytune.models.members.composite_cache import room_of, view
from proxytune.models.members.forward import Text
from proxytune.models.members.member import Member
from proxytune.models.members.ragged_static import ragged_pass, rows_of
from proxytune.ops.combination import Combination

__all__ = ["Joined", "JointStep", "OnDevice", "Sum", "Tail", "hindrance_of_step", "pass_of", "same_in_each_step"]


class Tail(Protocol):
    """What a graph computes of the members' logits; its tensors and numbers are read at each call."""

    def __call__(self, logits: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """From raw logits `[B, 1, V_i]` and weights `[B, M]`, float32, to one tensor."""

    def back(self) -> None:
        """Undo what the last call changed: it is followed by another one of the same step."""


@dataclass(frozen=True, eq=False)
class Sum:
    """The combined logits `[B, 1, V]`, float32; −inf for ids from `usable` on, which some member cannot embed."""

    usable: int

    def __call__(self, logits: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """As `Tail`."""
        combined = ops.combine([z.flatten(0, 1) for z in logits], Combination(weights))
        combined[:, self.usable :] = -torch.inf
        return combined[:, None]

    def back(self) -> None:
        """Nothing was changed."""


class Joined(NamedTuple):
    """What a joint step gives.

    Attributes:
        logits: Raw logits `[B, 1, V_i]` of each member; None for one that is idle. With a tail, the next step may
            overwrite them.
        found: What the tail made of them; None without one.
    """

    logits: list[torch.Tensor | None]
    found: torch.Tensor | None


class _Prepared:
    """What stays the same from step to step on one cache; a copy of the cache has none."""

    def __init__(
        self,
        members: Sequence[Member],
        spans: Sequence[tuple[int, int]],
        cache: Cache,
        running: list[int],
        idle: Collection[int],
    ) -> None:
        self.running, self.idle = running, frozenset(idle)
        self.views = [view(cache, *spans[i]) for i in running]
        self.device, self.room = members[running[0]].device, room_of(cache)
        self._layers = list(cache.layers)

    def serves(self, cache: Cache, text: Text, idle: Collection[int]) -> bool:
        """Whether a pass over `text` is a further step on its cache, as that was."""
        mask = text.attention_mask
        return (
            text.input_ids.shape[1] == 1
            and (mask is None or (self.room is not None and mask.shape[1] <= self.room))
            and cache.layers == self._layers
            and rows_of(cache) is None
            and self.idle == frozenset(idle)
            and not torch.is_grad_enabled()
        )


class JointStep:
    """The members' passes over one token per row, compiled at their first use; a copy compiles anew.

    Attributes:
        config: The settings, as for transformers' `generate(compile_config=…)`.
        hindrance: Why the last pass that came to be asked was not made in one graph; None if it was.
    """

    def __init__(self, config: CompileConfig) -> None:
        self.config = config
        self.hindrance: str | None = None
        self._calls: dict[type, Callable[..., Any]] = {}  # by kind of tail: torch limits the graphs of each
        self._weights = OnDevice()
        self._prepared: WeakKeyDictionary[Cache, _Prepared] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(
        self,
        members: Sequence[Member],
        spans: Sequence[tuple[int, int]],
        text: Text,
        cache: Cache | None,
        *,
        numbers: Sequence[float],
        idle: Collection[int] = (),
        tail: Tail | None = None,
        other: str | None = None,
    ) -> Joined | None:
        """Run the members, or say in `hindrance` why not; nothing has changed then.

        Args:
            members: All members.
            spans: Each member's first layer in the cache, and one past its last.
            text: The tokens `[B, 1]`, with the mask `[B, past + 1]` and positions as in `Member.forward`.
            cache: The composite cache, which is extended in place.
            numbers: Each member's weight.
            idle: The members that do not run.
            tail: What to make of the logits.
            other: What else is asked of the pass that a graph cannot do, in words.
        """
        prepared = self._on(cache)
        if other or cache is None or prepared is None or not prepared.serves(cache, text, idle):
            running = [i for i in range(len(members)) if i not in idle]
            # Rows of different lengths have masks of their own, made of where they are.
            text = text._replace(attention_mask=None) if rows_of(cache) is not None else text
            self.hindrance = other or hindrance_of_step([members[i] for i in running], text, cache)
            if self.hindrance is not None:
                return None
            assert cache is not None
            prepared = _Prepared(members, spans, cache, running, idle)
            self._prepared[cache] = prepared
        self.hindrance = None
        rows, device, running = len(text.input_ids), prepared.device, prepared.running
        shared = same_in_each_step(text, prepared.room, device)
        untold = {k: x for k, x in shared.items() if k != "position_ids"}
        given = []
        for i, part in zip(running, prepared.views, strict=True):
            member = members[i]
            member.token_forwards += shared["input_ids"].numel()
            member.passes += 1
            given.append({**(shared if member.takes_positions else untold), CACHE: part})
        weights = self._weights([numbers[i] for i in running], rows, device)
        torch.compiler.cudagraph_mark_step_begin()
        kind = type(tail)
        if kind not in self._calls:
            self._calls[kind] = torch.compile(with_own_code(_step), **self.config.to_dict())
        logits, found = self._calls[kind]([members[i].model for i in running], given, tail, weights)
        # Copies, which the next replay does not overwrite.
        if tail is None:
            logits = [z.clone() for z in logits]
        else:
            found = found.clone()
        by_member = dict(zip(running, logits, strict=True))
        return Joined([by_member.get(i) for i in range(len(members))], found)

    def follows(self, cache: Cache, text: Text, idle: Collection[int]) -> bool:
        """Whether a pass is one more like the last one on this cache, and nothing has to be looked at before it."""
        prepared = self._on(cache)
        return prepared is not None and prepared.serves(cache, text, idle)

    def _on(self, cache: Cache | None) -> _Prepared | None:
        # Not kept by the cache, which may be handed to another model.
        known = type(cache) is StaticCache and not torch.compiler.is_compiling()
        return self._prepared.get(cache) if known else None


class OnDevice:
    """Numbers as a tensor at one place in memory: others are no other graph, nor another recording of one."""

    def __init__(self) -> None:
        self._held: tuple[Any, tuple[float, ...], torch.Tensor] | None = None

    def __call__(self, numbers: Sequence[float], rows: int, device: torch.device) -> torch.Tensor:
        """`[rows, len(numbers)]`, float32; good until the next call."""
        key, told = (len(numbers), rows, device), tuple(numbers)
        if self._held is None or self._held[:2] != (key, told):
            new = torch.tensor([told], dtype=torch.float32, device=device).repeat(rows, 1)
            if self._held is not None and self._held[0] == key:
                new = self._held[2].copy_(new)
            else:
                torch._dynamo.mark_static_address(new)
            self._held = key, told, new
        return self._held[2]


def _step(
    models: list[Any], given: list[dict[str, Any]], tail: Tail | None, weights: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    logits = [pass_of(model, inputs) for model, inputs in zip(models, given, strict=True)]
    return logits, None if tail is None else tail(logits, weights)


def pass_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A model's raw logits inside a graph, from its inputs with a view of a static cache."""
    cache = inputs[CACHE]
    if (rows := rows_of(cache)) is not None:
        return ragged_pass(model, {k: x for k, x in inputs.items() if k in ("input_ids", "position_ids")}, cache, rows)
    logits: torch.Tensor = model(**inputs, use_cache=True, return_dict=True).logits
    return logits


def hindrance_of_step(members: Sequence[Member], text: Text, cache: Cache | None) -> str | None:
    """Why these members cannot take one token each in one graph."""
    one = text.input_ids.shape[1] == 1 or rows_of(cache) is not None
    if cache is None or not (one and members and cache.is_compileable and cache.is_initialized):
        return "no decode step over a static cache"
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "a pass with derivatives, or inside another graph"
    for member in members:
        if (why := member.stands_alone) is not None:
            return f"the {member.role}, {why}"
    if len({member.device for member in members}) > 1:
        return "members on several devices"
    room = room_of(cache)
    if room is None or (text.attention_mask is not None and text.attention_mask.shape[1] > room):
        return "a static cache of sliding layers only that was not made for a text of this length"
    return None


def same_in_each_step(text: Text, room: int | None, device: torch.device) -> dict[str, torch.Tensor]:
    """A step's inputs, with the sizes and strides that they have in every step."""
    given = {"input_ids": text.input_ids, "attention_mask": text.attention_mask, "position_ids": text.position_ids}
    same = {
        name: x.to(device, copy=True, memory_format=torch.contiguous_format)
        for name, x in given.items()
        if x is not None
    }
    if (mask := same.get("attention_mask")) is not None:
        assert room is not None
        # Columns after the token are hidden by the causal mask.
        same["attention_mask"] = torch.nn.functional.pad(mask, (0, room - mask.shape[1]), value=1)
    return same
