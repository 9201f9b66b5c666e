"""Decode steps of one `generate()`: the members' passes over one token per row, with what stays the same prepared once.

From step to step only the ids, the mask, the positions and the lengths of the caches change. Everything else is found
out after the first pass: views of the cache, devices, arguments, and that nothing has to be refused, read again or
switched. Whatever could have changed behind the step's back is looked at before each one (`follows`); in doubt the step
goes through `run_members`, which looks at everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from proxytune.models.members import cuda_streams
from proxytune.models.members.adapter_state import is_switched
from proxytune.models.members.composite_cache import is_lazy, stored, view
from proxytune.models.members.cpu_threads import SideThread
from proxytune.models.members.forward import Work, run_works
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import length_of
from proxytune.models.members.text_layer import TextLayer, text_layer_of
from proxytune.models.members.traceless import is_traceless

__all__ = ["DecodeStep", "Steps", "traceless_at"]

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, TextLayer)
"""Layers that a pass extends by new tensors, never in place."""


class _Pass:
    """One member's pass over one token per row."""

    def __init__(self, member: Member, cache: Cache, traceless: int | None) -> None:
        self.member, self.cache = member, cache
        self.device = member.device
        self._model, self._inner = member.model, innermost(member.model)
        self._given: dict[str, Any] = {"use_cache": True, "return_dict": True, member.cache_name: cache}
        self._hooks = RemovableHandle.next_id if traceless is None else traceless
        self._traceless = traceless is not None or is_traceless(member.model)

    @property
    def as_before(self) -> bool:
        """Whether no other composition has begun to switch the model's adapters."""
        return not is_switched(self._inner)

    def __call__(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Raw logits `[B, 1, V]`."""
        member, given = self.member, self._given
        member.token_forwards += len(input_ids)
        member.passes += 1
        told = {"input_ids": self._here(input_ids)}
        if mask is not None:
            told["attention_mask"] = self._here(mask)
        if positions is not None and member.takes_positions:
            told["position_ids"] = self._here(positions)
        if self._hooks != RemovableHandle.next_id:  # there is a new hook somewhere
            self._hooks, self._traceless = RemovableHandle.next_id, is_traceless(self._model)
        logits: torch.Tensor
        if self._traceless:
            with torch.inference_mode():
                logits = self._model(**told, **given).logits
        else:
            logits = self._model(**told, **given).logits
        return logits

    def _here(self, x: torch.Tensor) -> torch.Tensor:
        # A non-blocking copy is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
        return x if x.device == self.device else x.to(self.device, non_blocking=self.device.type != "cpu")


class DecodeStep:
    """The members' passes of a decode step on one composite cache.

    Attributes:
        length: How many tokens the cache holds; None while a pass runs, and after one that was interrupted.
        idle: The members that do not run.
        lazy: Whether those read the cache's text where a gate opens (`proxytune.models.lazy`).
    """

    def __init__(
        self,
        members: Sequence[Member],
        spans: Sequence[tuple[int, int]],
        cache: Cache,
        idle: Collection[int],
        traceless: int | None = None,
    ) -> None:
        self.idle, self.lazy = frozenset(idle), is_lazy(cache)
        self._layers = list(cache.layers)
        self._passes = [
            None if i in self.idle else _Pass(member, view(cache, *span), traceless)
            for i, (member, span) in enumerate(zip(members, spans, strict=True))
        ]
        self._running = [one for one in self._passes if one is not None]
        contexts = [one.member.context for one in self._running if one.member.context is not None]
        self._room = min(contexts, default=None)
        self._beside = {one.device for one in self._running[1:]}
        self.length: int | None = length_of(cache)

    def follows(self, cache: Cache, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether ids `[B, 1]`, with a mask `[B, past + 1]`, are the next step on a cache that nobody has changed."""
        length = self.length
        return (
            length is not None
            and input_ids.shape[1] == 1
            and (mask is None or mask.shape[1] == length + 1)
            and (self._room is None or length < self._room)
            and cache.layers == self._layers
            and length_of(cache) == length
            and all(one.as_before for one in self._running)
        )

    def __call__(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        *,
        sides: cuda_streams.CompanionStreams | None = None,
        thread: SideThread | None = None,
    ) -> list[torch.Tensor | None]:
        """Run the members over one token per row, as `run_members` does.

        Args:
            input_ids: `[B, 1]`, int64.
            mask: `[B, past + 1]`; None if there is no padding.
            positions: `[B, 1]` or `[1, 1]`; None for the members' default.
            sides: Side streams for companions on a GPU.
            thread: A side thread for companions on a CPU.

        Returns:
            Raw logits of each member, `[B, 1, V_i]`; None for one that is idle.
        """
        length, self.length = self.length, None
        assert length is not None
        # Each member would look. transformers before 5.20 passes a mask of ones in every step; a GPU is not waited for.
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        if thread is None and not any(map(cuda_streams.may_overlap, self._beside)):
            found = [None if one is None else one(input_ids, mask, positions) for one in self._passes]
        else:
            works = [
                Work(
                    one.member.role,
                    one.device,
                    partial(_listed, one, input_ids, mask, positions),
                    chain((input_ids, mask, positions), cuda_streams.tensors_of(one.cache)),
                )
                for one in self._running
            ]
            computed = iter(run_works(works, list(self._beside), sides, thread))
            found = [None if one is None else next(computed)[0] for one in self._passes]
        self.length = length + 1
        return found


def _listed(one: _Pass, *given: Any) -> list[torch.Tensor]:
    return [one(*given)]


class Steps:
    """The decode steps of one composed model, by the cache that they were prepared on; a copy has none.

    They are no part of the caches: those may outlive the model, or be handed to another one.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Cache, DecodeStep] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:  # for copies as well
        return Steps, ()

    def on(self, cache: Cache | None) -> DecodeStep | None:
        """The decode step that was prepared on a cache; None if there is none."""
        return self._found.get(cache) if type(cache) is DynamicCache else None

    def forget(self, cache: Cache) -> None:
        """Let the next pass on a cache look at everything: this one may be interrupted, or change what was prepared."""
        if type(cache) is DynamicCache and not torch.compiler.is_compiling():
            self._found.pop(cache, None)

    def prepare(
        self,
        cache: Cache,
        members: Sequence[Member],
        spans: Sequence[tuple[int, int]],
        idle: Collection[int],
        traceless: int | None = None,
    ) -> None:
        """Prepare decode steps on a cache that a pass has just filled, if there is nothing to look at in each.

        `traceless` is what `traceless_at` said before the pass.
        """
        if are_plain(members, cache, idle):
            self._found[cache] = DecodeStep(members, spans, cache, idle, traceless)


def are_plain(members: Sequence[Member], cache: Cache, idle: Collection[int]) -> bool:
    """Whether there is nothing to look at in the passes of those members on a cache that run."""
    running = [member for i, member in enumerate(members) if i not in idle]
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in _LAYERS for layer in stored(cache))
        and is_lazy(cache) == (text_layer_of(cache) is not None)
        and all(member.steps_plainly for member in running)
        and len({id(innermost(member.model)) for member in running}) == len(running)
    )


def traceless_at(members: Sequence[Member], cache: Cache | None, idle: Collection[int]) -> int | None:
    """Up to which hook of the process a pass of a `generate()` may run under `torch.inference_mode()`; None if not.

    It may where each member that runs is traceless, and its keys and values are new tensors.
    """
    if cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not are_plain(members, cache, idle):
        return None
    running = [member for i, member in enumerate(members) if i not in idle]
    return RemovableHandle.next_id if all(is_traceless(member.model) for member in running) else None
