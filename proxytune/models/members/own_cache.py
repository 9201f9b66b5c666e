"""Models that take a cache of a class of their own only: they get one whose states are those of the layers here."""

from __future__ import annotations

import functools
import inspect
import typing
from contextlib import suppress
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from proxytune.errors import UnsupportedModeError
from proxytune.models.members.innermost import innermost

__all__ = ["in_own_class", "own_class_of", "refuse_reordering"]


def own_class_of(model: Any) -> type | None:
    """The class with `get_linear_cache` and `set_linear_cache` (MiniMax) that a model wants its cache in, or None."""
    decoder = getattr(innermost(model), "base_model", model)
    with suppress(NameError, TypeError, SyntaxError, AttributeError):  # annotations that cannot be read
        for parameter in inspect.signature(decoder.forward, eval_str=True).parameters.values():
            for kind in (parameter.annotation, *typing.get_args(parameter.annotation)):
                if isinstance(kind, type) and issubclass(kind, DynamicCache) and hasattr(kind, "set_linear_cache"):
                    return kind
    return None


def refuse_reordering(mode: str, model: Any, use_cache: bool | None) -> None:
    """Raise UnsupportedModeError for a plain model whose own cache class keeps states where rows are not moved."""
    if use_cache and (kind := own_class_of(model)) is not None:
        raise UnsupportedModeError.of(
            f"{mode} for the base",
            expected="a cache whose rows can take each other's content",
            got=f"a {type(innermost(model)).__name__}, whose {kind.__name__} leaves its states where they are",
            remedy="Pass use_cache=False, or compose it with proxytune.wrap.",
        )


def in_own_class(cache: Cache, kind: type) -> Cache:
    """A cache of a model's own class over the layers of `cache`, which are shared."""
    part: Cache = object.__new__(_shared(kind))
    vars(part).update(vars(cache))
    return part


@functools.cache
def _shared(kind: Any) -> Any:
    return type(f"Shared{kind.__name__}", (_SharedStates, kind), {})


class _SharedStates:
    layers: list[Any]

    def __len__(self) -> int:
        return len(self.layers)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        layer = self.layers[layer_idx]
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(linear_cache)
        self.layers[layer_idx].has_previous_state[0] = True
