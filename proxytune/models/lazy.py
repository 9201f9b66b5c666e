"""Companions that run only where a gate is open: the composed model asks them, and they read what they missed.

A cache that was empty under a gate is laid out for it: it holds the base's layers and the text
(`proxytune.models.members.text_layer`), which follows whatever crops, reorders or selects its rows. The companions have
a cache of their own beside it. When a row asks, they compare its text with theirs, and read the rest in one pass
(`proxytune.models.members.prefix_cached`). Where no row asks they do not run at all; to know that, the host waits for
the base's logits in each step.

Drafts of the expert, latent steps, images and gradients need all members in every pass. There companions run along,
under the same law; so they do over static caches, unless members are compiled (`proxytune.models.members.gated_step`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from proxytune.models.members.cuda_streams import CompanionStreams
from proxytune.models.members.forward import Text
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.prefix_cached import PrefixCached
from proxytune.models.members.text_layer import text_layer_of
from proxytune.models.own_prompts import roles_with_prompts

__all__ = ["asked", "can_wait", "positions_to_keep"]

_COMPANIONS = "_proxytune_companions"


class _Companions(PrefixCached):
    """The companions of one cache; a copy of the cache has a copy of theirs, and a pickled cache none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Companions:
        twin = copy.copy(self)  # without a prefix
        for name in ("_cache", "_key", "_logits"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._filled_by = self._filled_by
        return twin

    def __copy__(self) -> _Companions:
        twin = object.__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def can_wait(cache: Cache | None) -> bool:
    """Whether companions can have a cache of their own beside this one, which is empty."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def positions_to_keep(position_ids: torch.Tensor | None, input_ids: torch.Tensor, past: int) -> torch.Tensor:
    """The positions of a pass over `[B, N]` ids after `past` columns, as the text layer keeps them: `[B, N]`."""
    if position_ids is None:
        position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    return position_ids.to(input_ids.device).expand(len(input_ids), -1)


def asked(
    members: Sequence[Member],
    needed: Sequence[bool],
    cache: Cache,
    logits_to_keep: int | torch.Tensor,
    new: int,
    sides: CompanionStreams | None,
) -> list[torch.Tensor | None]:
    """Let the companions read the text of a cache as far as they have not, and return their logits.

    Args:
        members: All members, the base first.
        needed: Which of them have a weight.
        cache: The cache, after the base's pass.
        logits_to_keep: As in `forward`.
        new: The number of tokens in that pass.
        sides: Side streams for members on a GPU.

    Returns:
        `[B, K, V_i]` of each companion; None for one without a weight.
    """
    companions = [m for m, run in zip(members[1:], needed[1:], strict=True) if run]
    held = getattr(cache, _COMPANIONS, None)
    if held is None or held.members != companions:
        held = _Companions(companions, memo=1)
        held.finite = False  # the combined logits are looked at
        setattr(cache, _COMPANIONS, held)
    layer = text_layer_of(cache)
    assert layer is not None
    assert layer.ids is not None
    assert layer.masks is not None
    ids, masks = layer.ids, layer.masks  # [texts, B, L]
    roles = roles_with_prompts(members)
    own = {role: Text(ids[i], masks[i], positions_of(masks[i])) for i, role in enumerate(roles, 1)}
    reading = {m.role for m in companions}
    places = logits_to_keep % new if isinstance(logits_to_keep, torch.Tensor) else None
    if isinstance(logits_to_keep, torch.Tensor):
        first = int((logits_to_keep % new).min())
    else:
        first = max(new - logits_to_keep, 0) if logits_to_keep else 0
    found = held.logits_for(
        ids[0],
        masks[0],
        position_ids=ids[-1],
        own={role: text for role, text in own.items() if role in reading},
        last=new - first,
        sides=sides,
    )
    held.forget_all_but_last()
    if places is not None:
        found = [z[:, (places - first).to(z.device)] for z in found]
    by_role = {m.role: z for m, z in zip(companions, found, strict=True)}
    return [by_role.get(m.role) for m in members[1:]]
