"""Wrong use of stochastic recursion, refused before the first forward pass."""

from __future__ import annotations

import math
from typing import Any, Protocol

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.batch import cache_of

__all__ = ["refuse_call", "refuse_settings"]

_BRANCHES = 1 << 30


class _Settings(Protocol):
    @property
    def sigma(self) -> Any: ...
    @property
    def when(self) -> Any: ...
    @property
    def trajectories(self) -> Any: ...
    @property
    def halt(self) -> Any: ...
    @property
    def streamer(self) -> Any: ...


def refuse_settings(settings: _Settings) -> None:
    """Refuse settings that are out of their ranges, whatever the model.

    Args:
        settings: Those of `RecursionDecoding`.

    Raises:
        InputError: If one is.
        UnsupportedModeError: For a streamer with several trajectories.
    """

    def refuse(what: str, expected: str, remedy: str) -> None:
        raise InputError.of(what, expected=expected, got=repr(getattr(settings, what)), remedy=remedy)

    if not _is_number(settings.sigma) or settings.sigma < 0:
        refuse("sigma", "a finite number ≥ 0", "Pass 0 for no noise; it is relative to the rms of the state.")
    when, wanted = settings.when, settings.trajectories
    if isinstance(when, str) or not isinstance(when, tuple):
        if when not in ("cycle", "once"):
            refuse("when", "'cycle', 'once' or a tuple of cycles", "Leave it out for 'cycle'.")
    elif not when or not all(_is_whole(c) and c >= 0 for c in when):
        refuse("when", "numbers of cycles from 0, one at least", "Pass e.g. when=(0, 1); sigma=0 for no noise.")
    if isinstance(wanted, bool) or (isinstance(wanted, int) and not 1 <= wanted <= _BRANCHES):
        refuse("trajectories", "a whole number of at least 1", "Pass e.g. trajectories=8.")
    if not isinstance(wanted, int):
        numbers = list(wanted) if isinstance(wanted, list | tuple | range) else []
        if not numbers or len(set(numbers)) < len(numbers) or not all(_is_whole(n) for n in numbers):
            refuse("trajectories", "a whole number, or different whole numbers in a list", "Pass e.g. trajectories=8.")
        if not all(0 <= n < _BRANCHES for n in numbers):
            refuse("trajectories", f"numbers from 0 to {_BRANCHES - 1}", "Number them from 0.")
    if settings.halt is not None and (not _is_number(settings.halt) or settings.halt <= 0):
        refuse("halt", "a finite number > 0, or None", "Pass e.g. halt=0.05.")
    if settings.streamer is not None and (wanted if isinstance(wanted, int) else len(wanted)) > 1:
        _refuse_streamer()


def refuse_call(
    loop: str, model: Any, generation_config: Any, streamer: Any, model_kwargs: dict[str, Any], *, trajectories: int
) -> None:
    """Refuse what `generate()` may be asked for but several noisy trajectories cannot give.

    Args:
        loop: Its name, for the message.
        model: The model.
        generation_config: The settings of the call.
        streamer: A streamer, or None.
        model_kwargs: What the model is called with; the cache among them.
        trajectories: How many for each prompt.

    Raises:
        UnsupportedModeError: If it is asked for.
    """
    if streamer is not None and trajectories > 1:
        _refuse_streamer()
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise UnsupportedModeError.of(
                name,
                expected=f"none with {loop}: one trajectory of many is returned",
                got="it",
                remedy="Leave it out; the output has each trajectory's mean log-probability.",
            )
    cache = cache_of(model_kwargs)
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise UnsupportedModeError.of(
            "past_key_values",
            expected=f"an empty cache with {loop}: what it holds was computed without this noise",
            got=f"one of {int(cache.get_seq_length())} positions",
            remedy="Leave it out, and pass the whole text.",
        )
    compiled = _compiled(model)
    if compiled is not None or generation_config.compile_config is not None:
        raise UnsupportedModeError.of(
            f"a compiled model with {loop}",
            expected="one that runs eagerly: a graph would be made with the noise, or without it, for good",
            got="a compile_config" if compiled is None else f"{compiled} compiled",
            remedy="Decode with the model as it was loaded, without compile().",
        )


def _compiled(model: Any) -> str | None:
    """The name of a module that was compiled in place; `torch.compile(model)` itself hands over the model as it was."""
    for name, module in model.named_modules():
        forward = getattr(module, "forward", None)
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        if in_place or hasattr(forward, "_torchdynamo_orig_callable") or hasattr(module, "_orig_mod"):
            return name or type(model).__name__
    return None


def _refuse_streamer() -> None:
    raise UnsupportedModeError.of(
        "streamer",
        expected="none with several trajectories: which is selected is known at their end",
        got="one",
        remedy="Leave it out, or pass trajectories=1.",
    )


def _is_whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
