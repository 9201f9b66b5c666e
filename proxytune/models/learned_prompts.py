"""PEFT models that learn a prompt or prefix: their own tokens stand in the cache before the text."""

from __future__ import annotations

import inspect
from typing import Any

from proxytune.errors import UnsupportedModeError
from proxytune.models.members.cache_name import CACHE

__all__ = ["learned_prompt_of", "refuse_unfound_cache"]


def learned_prompt_of(model: Any) -> Any:
    """The config of the learned prompt with which PEFT runs `generate()` on this model; None without one."""
    # While a PEFT model generates, its own method stands on the model inside.
    peft = getattr(inspect.unwrap(model.prepare_inputs_for_generation), "__self__", None)
    config = getattr(peft, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def refuse_unfound_cache(model: Any, use_cache: bool | None) -> None:
    """Raise UnsupportedModeError where PEFT looks for the cache under another name than transformers gives it.

    It then takes every step for the first one, and puts the learned prompt before each new token; a prefix without a
    cache is lost.
    """
    if CACHE == "past_key_values" or (config := learned_prompt_of(model)) is None:
        return
    in_cache = config.peft_type == "PREFIX_TUNING"  # the prefix itself is handed over as a cache, under the old name
    if use_cache is False and not in_cache:
        return
    peft: Any = inspect.unwrap(model.prepare_inputs_for_generation)
    source = inspect.getsource(peft.__func__)
    if not any(f"{quote}{CACHE}{quote}" in source for quote in "'\""):
        raise UnsupportedModeError.of(
            f"a PEFT model with {type(config).__name__}",
            expected=f"a release of peft that finds the cache as {CACHE!r}, as this release of transformers names it",
            got="one that looks for 'past_key_values', and would read the learned prompt anew in every step",
            remedy=f"{'Use' if in_cache else 'Pass use_cache=False, or use'} transformers before 5.24 or a newer peft.",
        )
