"""Members that are one model, with other prompts or other adapters, as one pass over all their rows.

The weights are read once. Each member keeps its own layers in the composite cache; for the pass they are joined to
layers of all rows, and afterwards each holds its rows of the result, as a view. As long as nothing else changes them,
joining them again costs nothing, so the cache grows by one concatenation, as that of a single model does.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from proxytune.models.members.adapter_state import adapters_set, switches_of
from proxytune.models.members.innermost import innermost
from proxytune.models.members.lora_pair import NotByRowsError, Rows, mixable, mixed_rows
from proxytune.models.members.member import Member

__all__ = ["MemberPass", "run_group"]

_LONG = 256
"""From how many tokens of a member on its pass is bound by arithmetic, not by reading weights: then one at a time."""
_WITHOUT: Any = getattr(cache_utils, "DummyLayer", ())
_APART: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models in which some adapter does not see the rows of the batch."""


@dataclass(frozen=True, eq=False)
class MemberPass:
    """What one member takes in a step: arguments of `Member.forward`."""

    member: Member
    cache: Cache | None
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    latent: Any


def run_group(parts: Sequence[MemberPass], logits_to_keep: int | torch.Tensor) -> list[torch.Tensor]:
    """Run members that are one model, in one pass if they can: their raw logits, `[B, K, V]` each."""
    together = run_as_one(parts, logits_to_keep) if len(parts) > 1 else None
    if together is not None:
        return together
    return [part.member.forward(**_arguments(part), logits_to_keep=logits_to_keep) for part in parts]


def _arguments(part: MemberPass) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name != "member"}


def run_as_one(parts: Sequence[MemberPass], logits_to_keep: int | torch.Tensor) -> list[torch.Tensor] | None:
    """Run members that are one model in one pass; None, and nothing has changed, if that is not exact."""
    lead, model = parts[0].member, innermost(parts[0].member.model)
    if model in _APART or not _may_join(parts):
        return None
    layers: list[Any] = []
    joint = None
    if parts[0].cache is not None:
        found = _joined([part.cache.layers for part in parts if part.cache is not None])
        if found is None:
            return None
        layers, joint = found, copy.copy(parts[0].cache)
        joint.layers = layers
    rows, new = parts[0].input_ids.shape
    past = 0 if joint is None else int(joint.get_seq_length())
    states = [part.member.adapter for part in parts]
    with ExitStack() as stack:
        if any(state is not None for state in states):
            switches = switches_of(model)
            stack.enter_context(switches.turn)
            switches.look(model, fresh=past == 0)
            if all(state == states[0] for state in states):
                stack.enter_context(adapters_set(switches.all, states[0]))
            elif mixable(switches):
                stack.enter_context(mixed_rows(switches, states, Rows(len(states), rows, lead.device.type)))
            else:
                return None
        counted, passes = lead.token_forwards, lead.passes
        try:
            logits = lead.run(
                _rows_of([part.input_ids for part in parts]),
                attention_mask=_masks(parts, past),
                position_ids=_positions(parts, past),
                cache=joint,
                logits_to_keep=logits_to_keep,
            )  # [G·B, K, V]
        except NotByRowsError:
            _APART.add(model)
            return None
        finally:
            lead.token_forwards, lead.passes = counted, passes
    for part in parts:
        part.member.token_forwards += rows * new
        part.member.passes += 1
    for number, layer in enumerate(layers):
        _give_back(layer, [part.cache.layers[number] for part in parts if part.cache is not None])
    return list(logits.split(rows))


def _may_join(parts: Sequence[MemberPass]) -> bool:
    """Whether the members take what can be joined: rows of ids, by models that treat each row for itself."""
    first = parts[0]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or first.input_ids.numel() > _LONG:
        return False
    for part in parts:
        flat = all(x is None or x.ndim == 2 for x in (part.attention_mask, part.position_ids))
        if not (flat and part.latent is None and part.member.joins and part.input_ids.shape == first.input_ids.shape):
            return False
        # Long-rope models go by the longest row of a pass.
        if part.member.switch is not None and part.attention_mask is not first.attention_mask:
            return False
        if (part.cache is None) != (first.cache is None) or type(part.cache) not in (type(None), DynamicCache):
            return False
    return not getattr(first.cache, "offloading", False) and not first.member.model.training


def _joined(members: Sequence[Sequence[Any]]) -> list[Any] | None:
    """Layers of all rows for each member's layers; None if some are of a kind that is not joined."""
    found = [_join(layers) for layers in zip(*members, strict=True)]
    return None if any(layer is None for layer in found) else found


def _join(layers: Sequence[Any]) -> Any | None:
    first = layers[0]
    kind = type(first)
    if isinstance(first, _WITHOUT):
        return first
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    marks = [_marks(layer) for layer in layers]
    if any(type(layer) is not kind for layer in layers) or any(mark != marks[0] for mark in marks):
        return None
    joint = copy.copy(first)
    if first.is_initialized:
        joint.keys, joint.values = (_rows_of([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    return joint


def _marks(layer: Any) -> Any:
    """What layers have to have in common; a layer whose `update` was replaced has nothing in common with any."""
    shape = layer.keys.shape if layer.is_initialized else None
    past = (getattr(layer, "cumulative_length", 0), getattr(layer, "record_past", False))
    return object() if "update" in vars(layer) else (layer.is_initialized, shape, *past)


def _give_back(joint: Any, layers: Sequence[Any]) -> None:
    """Give each member's layer what the joint one has, with its own rows."""
    if joint is layers[0] or not joint.is_initialized:
        return
    keys, values = (x.split(len(x) // len(layers)) for x in (joint.keys, joint.values))
    for layer, key, value in zip(layers, keys, values, strict=True):
        vars(layer).update(vars(joint), keys=key, values=value)


def _rows_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape as one, by rows; without a copy if they stand one after the other in memory."""
    first = parts[0]
    whole = first._base
    rows, rest = len(first), first.shape[1:]
    if whole is None or whole.shape[1:] != rest or len(whole) != rows * len(parts):
        whole = None
    step, start, strides = rows * first.stride(0), first.storage_offset(), first.stride()
    for i, part in enumerate(parts):
        near = part.storage_offset() == start + i * step and part.stride() == strides
        if not near or (part._base is not whole if whole is not None else not _same_memory(part, first)):
            return torch.cat(list(parts))
    return first.as_strided((rows * len(parts), *rest), strides) if whole is None else whole


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _masks(parts: Sequence[MemberPass], past: int) -> torch.Tensor | None:
    masks = [part.attention_mask for part in parts]
    if all(mask is None for mask in masks):
        return None
    rows, new = parts[0].input_ids.shape
    return torch.cat([parts[0].input_ids.new_ones(rows, past + new) if mask is None else mask for mask in masks])


def _positions(parts: Sequence[MemberPass], past: int) -> torch.Tensor | None:
    places = [part.position_ids for part in parts]
    if all(place is None for place in places):
        return None
    rows, new = parts[0].input_ids.shape
    default = torch.arange(past, past + new, device=parts[0].input_ids.device)[None]
    return torch.cat([(default if place is None else place).expand(rows, -1) for place in places])
