"""Is a model right by itself? The same tokens in one pass, in two over a cache, left-padded, and moved in the cache.

Some families are not: an encoder with `is_decoder=False` reads later tokens too, and some count positions by columns,
whatever stands in the mask. Alone they would be as wrong, so nothing else notices. The test compares hidden states
after the first layers, in three passes over six tokens; models that differ in sizes only share a verdict.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from proxytune.models.members.embedding_table import device_of
from proxytune.models.members.innermost import innermost
from proxytune.models.members.self_test_passes import ModelPasses, PairPasses, Verdict

__all__ = ["UNTESTED", "Verdict", "generation_fault", "padding_fault", "static_fault", "verdict_of"]

_NAMES = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "architectures", "transformers_version"})


UNTESTED = Verdict()

_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What models raise at sizes or masks that they do not take."""

_of_kind: dict[object, Verdict] = {}
_of_generation: dict[object, str | None] = {}
_of_static: weakref.WeakKeyDictionary[nn.Module, dict[object, str | None]] = weakref.WeakKeyDictionary()


def verdict_of(model: Any, takes_position_ids: bool) -> Verdict:
    """Test a model, or find the verdict of this process on one of the same class and config.

    A model that cannot be run yet (weights on `meta`), or whose states are not finite, is not tested, and leaves no
    verdict for others. The passes run on its shadow, so nothing of the model changes, also while other threads use it.
    """
    kind = _kind(model)
    if kind not in _of_kind:
        verdict = _attempt(model, takes_position_ids)
        if verdict is None:
            return UNTESTED
        _of_kind[kind] = verdict
    return _of_kind[kind]


def static_fault(model: Any, takes_position_ids: bool, length: int, *, ragged: bool = False) -> str | None:
    """What a model does wrong on a static cache of `length`, in words; None if nothing, or if it could not be tested.

    With `ragged`, its rows differ in length. Some mask from the end of what a cache has room for, which only a long one
    shows: who is right there is tested once.
    A cache of recurrent layers alone has no length, and says −1.
    """
    known = _of_static.setdefault(model, {})
    config, kind = model.config.get_text_config(decoder=True), _kind(model)
    fault = None
    for room in (min(getattr(config, "max_position_embeddings", None) or 512, 2048), *([length] if length > 0 else [])):
        key = kind, room, ragged
        if key not in known:
            known[key] = None
            with _tested(model):
                try:
                    passes = ModelPasses(model, takes_position_ids)
                    known[key] = passes.ragged(room) if ragged else passes.static(room)
                except _FAULTS as error:  # of sizes that do not fit, say, or of masks, where other caches work
                    known_right = kind in _of_kind and (ragged or isinstance(error, RuntimeError))
                    if known_right and not isinstance(error, torch.OutOfMemoryError):
                        said = str(error).split("\n")[0]
                        known[key] = f"a pass that fails there ({type(error).__name__}: {said})"
        if (fault := known[key]) is None:
            break
    return fault


def generation_fault(model: Any, rows: int) -> str | None:
    """What a model's own `generate()` carries on wrongly in `rows` texts, in words; None if nothing, or untested.

    For models whose state is in no cache: what they carry is not seen otherwise.
    """
    key = _kind(model), rows
    if key not in _of_generation:
        _of_generation[key] = None
        with _tested(model):
            _of_generation[key] = ModelPasses(model, False).generated(rows)
    return _of_generation[key]


def padding_fault(model: Any) -> str | None:
    """What left padding changes for a model by itself and without a cache, in words; None if nothing, or untested."""
    with _tested(model):
        return ModelPasses(
            model, "position_ids" in inspect.signature(innermost(model).forward).parameters
        ).padded_alone()
    return None


def _attempt(model: Any, takes_position_ids: bool) -> Verdict | None:
    with _tested(model):
        if getattr(model.config, "is_encoder_decoder", False):
            return PairPasses(model, False).verdict()
        found = ModelPasses(model, takes_position_ids).verdict()
        if found.cache is None or not takes_position_ids:
            return found
        # Those with positions of their own are right as long as nobody tells them any.
        untold = ModelPasses(model, False).verdict()
        return found if untold.cache else Verdict(None, untold.padding, untold.moved, counts=False)
    return None


@contextmanager
def _tested(model: Any) -> Iterator[None]:
    """The test's passes run as the weights are: a verdict is kept, and autocast, which rounds, is the caller's alone.

    What cannot run here will say so where it is used.
    """
    kinds = [kind for kind in {"cpu", device_of(model).type} if torch.amp.is_autocast_available(kind)]
    with suppress(Exception), torch.no_grad(), ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _kind(model: Any) -> object:
    """What models that behave alike have in common: code and settings, but no sizes."""
    inside = innermost(model)
    attention = getattr(inside.config, "_attn_implementation", None)
    quantized = type(getattr(inside, "hf_quantizer", None)).__name__
    settings = _without_sizes({k: v for k, v in inside.config.to_dict().items() if k not in _NAMES})
    return type(model), type(inside), repr(settings), attention, quantized, model.dtype, device_of(model).type


def _without_sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_sizes(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return sorted({repr(_without_sizes(v)) for v in value})
    return value if isinstance(value, str | bool | None) else type(value).__name__
