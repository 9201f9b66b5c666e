"""Tells whether a model is still the one that filled a cache.

A cache holds what a model made of a text. If the model changes, by training, by another adapter, by a hook, the cache
still looks right, and every later token is computed from two models.

It costs, on one CPU core, for a Llama of 135M parameters (274 tensors, 397 modules; a decode step takes 60 ms): 1.3 ms
to take, .4 ms to compare, 1.1 ms with the values. For a Llama of two small layers (23 tensors; .8 ms a step): .11, .03
and .09 ms. The composed model and an attached processor compare once per `generate()`; a processor that is handed over,
in each step, for both companions.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import nn

from proxytune.models.members.adapter_state import is_adapter_layer, running_as

__all__ = ["Fingerprint", "only_looks", "sets_frequencies"]

_SAMPLES = 4  # of each tensor


class Fingerprint:
    """What a cache of a model depends on, as it was when this was made; it keeps none of it alive.

    It sees other modules, parameters and buffers (by identity, and by the address of their data), edits in place,
    forward hooks, methods replaced on an instance, and adapters of PEFT that were switched, merged or scaled. Edits
    through `.data` leave none of these traces; they are seen in four values of each tensor. What cannot be seen: an
    edit through `.data` of a few values, and a hook whose own settings change. Weights on the `meta` device (offloaded)
    and frequencies that a model sets itself, by the length of the text, are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the fingerprint of a model."""
        with running_as(model, None):  # no other thread has switched its adapters
            objects, self._marks, tensors = _parts(model)
        self._objects = [weakref.ref(x) for x in objects]
        self._places = _places_in(tensors)
        self._values = self._values_of(tensors)

    def holds(self, model: nn.Module, *, values: bool = True) -> bool:
        """Whether the model is unchanged; `values` compares values too, for which the host waits for the device."""
        with running_as(model, None):
            objects, marks, tensors = _parts(model)
        if marks != self._marks or len(objects) != len(self._objects):
            return False
        if not all(ref() is x for ref, x in zip(self._objects, objects, strict=True)):
            return False
        found = self._values_of(tensors) if values else self._values
        return all(map(torch.equal, found, self._values))

    @torch.no_grad()
    def _values_of(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The values at `_places`, as bytes, so that NaN equals NaN."""
        return [
            torch.cat([tensors[i].as_strided(size, stride, start) for i, size, stride, start in places]).view(
                torch.uint8
            )
            for places in self._places
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Fingerprint:
        return self  # a copy of a cache was filled by the same model

    def __reduce__(self) -> Any:
        return _Gone, ()  # the model of a pickled cache cannot be told


class _Gone(Fingerprint):
    """The fingerprint of a pickled cache: it holds for no model."""

    def __init__(self) -> None:
        pass

    def holds(self, model: nn.Module, *, values: bool = True) -> bool:
        return False


def _parts(model: nn.Module) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """All modules and tensors; what else matters, to be compared by value; the tensors alone."""
    modules: list[nn.Module] = [model]
    held: list[torch.Tensor | None] = []
    marks: list[Any] = []
    for module in modules:  # grows meanwhile
        own = vars(module)
        if own["_modules"]:
            modules += [child for child in own["_modules"].values() if child is not None]
        if own["_parameters"]:
            held += own["_parameters"].values()
        if own["_buffers"] and not sets_frequencies(own):
            held += own["_buffers"].values()
        for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
            if hooks:  # their numbers are never used twice
                marks += [number for number, hook in hooks.items() if not only_looks(hook)]
        if "forward" in own:
            marks.append(own["forward"])
        if is_adapter_layer(cast(Hashable, type(module))):
            layer: Any = module
            marks += [list(layer.active_adapters), layer.disable_adapters, list(layer.merged_adapters)]
            scaling = own.get("scaling")
            if isinstance(scaling, dict):  # a tensor after peft's prepare_model_for_compiled_hotswap
                held += [x for x in scaling.values() if isinstance(x, torch.Tensor)]
                marks += [(name, x) for name, x in scaling.items() if not isinstance(x, torch.Tensor)]
    tensors = [x for x in held if x is not None and not x.is_meta]
    marks += [-1 if x.is_inference() else x._version for x in tensors]
    with contextlib.suppress(RuntimeError, NotImplementedError):  # wrappers without storage of their own
        marks += [x.data_ptr() for x in tensors]
    return [*modules, *tensors], marks, tensors


def only_looks(hook: Any) -> bool:
    """Whether a hook is one of transformers' own, which change nothing and keep nothing unless they are asked to."""
    # transformers puts hooks on a model for good when it is first asked for hidden states.
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def sets_frequencies(own: dict[str, Any]) -> bool:
    """Whether a module, by its attributes, is an embedding of positions that sets its frequencies itself."""
    kinds = str(own.get("rope_type", ""))
    return "dynamic" in kinds or "longrope" in kinds


_Place = tuple[int, tuple[int], tuple[int], int]


def _places_in(tensors: list[torch.Tensor]) -> list[list[_Place]]:
    """Evenly spaced values in all plain tensors: index, number, stride and offset, by device and dtype."""
    places: dict[Any, list[_Place]] = {}
    for i, x in enumerate(tensors):
        if type(x) in (torch.Tensor, nn.Parameter) and x.is_contiguous() and (count := x.numel()):
            step = max(1, count // _SAMPLES)
            step -= step % 2 == 0  # an even one may stay in one column
            places.setdefault((x.device, x.dtype), []).append(
                (i, (min(count, _SAMPLES),), (step,), int(x.storage_offset()))
            )
    return list(places.values())
