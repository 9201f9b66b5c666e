"""What transformers calls the cache: `past_key_values`, and since 5.24 `cache`, in `generate()`, forwards and outputs.

This is the only module that knows. Names are read from signatures, so a model with code of its own may differ from the
installed release.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import GenerationMixin

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.members.innermost import innermost
from proxytune.models.members.rewind import length_of, rewindable_layers

__all__ = ["CACHE", "argument_of", "cache_of", "one_cache", "renamed", "tokens_in"]

_NAMES = ("past_key_values", "cache")
_OF_STATES = "cache_params"  # what recurrent models called it before 5.24


def _name_of_generate() -> str:
    found = [name for name in _NAMES if name in _parameters(GenerationMixin.prepare_inputs_for_generation)]
    if len(found) != 1:  # a cache under a name that nobody looks for would go unchecked
        raise UnsupportedModeError.of(
            "transformers",
            expected=f"a release whose generate() calls the cache {' or '.join(_NAMES)}",
            got=f"{transformers.__version__}, with {' and '.join(found) or 'neither'}",
            remedy="Install a release that proxytune supports, see `pip show proxytune`.",
        )
    return found[0]


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


CACHE = _name_of_generate()
"""The cache's name in the installed transformers: in `generate()`, its model kwargs, and outputs."""

_HELD = (CACHE,) if CACHE == "cache" else (CACHE, _OF_STATES)


def argument_of(model: Any) -> str | None:
    """The name of the cache in a causal LM's forward; None if it takes none that transformers' caches fit."""
    # A PEFT model passes everything on: the signature of the model inside counts.
    parameters = _parameters(innermost(model).forward)
    for name in (*_NAMES, _OF_STATES):
        # xlm has had a `cache` of another kind since before the renaming.
        if name in parameters and "dict[" not in str(parameters[name].annotation):
            return name
    return None


def cache_of(held: Mapping[str, Any]) -> Any:
    """The cache among a model's keyword arguments or in its output, also a recurrent model's; None if there is none."""
    return next((cache for name in _HELD if (cache := held.get(name)) is not None), None)


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a caller gave by either name; InputError for two different ones."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise InputError.of(
            "cache",
            expected="one cache, as past_key_values or as cache",
            got=f"two: a {type(past_key_values).__name__} and a {type(cache).__name__}",
            remedy="Pass one of them.",
        )
    return past_key_values if cache is None else cache


def renamed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's keyword arguments with the cache under the installed name; InputError for two different ones."""
    others = {name: value for name, value in kwargs.items() if name not in _NAMES}
    if len(others) == len(kwargs):
        return others
    return others | {CACHE: one_cache(*map(kwargs.get, _NAMES))}


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it holds some and, being of recurrent layers only, does not count them.

    A static cache has its length on the device: the host waits for it.
    """
    layers = getattr(cache, "layers", None)
    if layers and rewindable_layers(cache):
        return int(length_of(cache))
    if layers is None or not layers or any(hasattr(layer, "get_seq_length") for layer in layers):
        count = getattr(cache, "get_seq_length", None)
        return None if count is None else int(count())
    return None if cache.has_previous_state() else 0
