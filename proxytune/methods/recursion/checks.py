"""Reject unsupported settings and calls of `RecursionDecoding` before the first forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE, cache_of, tokens_in
from proxytune.validation import as_int, choice, finite, whole

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
    """Raise InputError for a setting out of range, UnsupportedModeError for a streamer with several trajectories."""
    remedy = "It is relative to the rms of the state; pass 0 for no noise."
    finite("sigma", settings.sigma, least=0.0, remedy=remedy)
    if not isinstance(settings.when, tuple):
        remedy = "Leave it out for 'cycle', or pass e.g. when=(0, 1)."
        choice("when", settings.when, ("cycle", "once"), "a tuple of cycles", remedy=remedy)
    elif not settings.when or not all(as_int(c) is not None and c >= 0 for c in settings.when):
        raise InputError.of(
            "when",
            expected="at least one number of a cycle, from 0",
            got=repr(settings.when),
            remedy="Pass e.g. when=(0, 1), or sigma=0 for no noise.",
        )
    _refuse_trajectories(settings.trajectories)
    if settings.halt is not None:
        finite("halt", settings.halt, above=0.0, remedy="Pass e.g. halt=0.05, or None.")
    given = settings.trajectories
    if settings.streamer is not None and (len(given) if isinstance(given, Sequence) else given) > 1:
        _refuse_streamer(settings.streamer)


def _refuse_trajectories(trajectories: Any) -> None:
    remedy = "Pass e.g. trajectories=8."
    if not isinstance(trajectories, list | tuple | range):
        whole("trajectories", trajectories, "of trajectories", least=1, most=_BRANCHES, remedy=remedy)
        return
    numbers = list(trajectories)
    if not numbers or not all(as_int(n) is not None for n in numbers) or len(set(numbers)) < len(numbers):
        raise InputError.of(
            "trajectories",
            expected="a whole number, or different whole numbers in a list",
            got=repr(trajectories),
            remedy=remedy,
        )
    for n in numbers:
        whole("trajectories", n, "as a number", most=_BRANCHES - 1, remedy="Number them from 0.")


def refuse_call(
    loop: str, model: Any, generation_config: Any, streamer: Any, model_kwargs: dict[str, Any], *, trajectories: int
) -> None:
    """Raise UnsupportedModeError for what `generate()` was asked to do that several noisy trajectories cannot."""
    if streamer is not None and trajectories > 1:
        _refuse_streamer(streamer)
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise UnsupportedModeError.of(
                name,
                expected=f"none with {loop}: one trajectory of many is returned",
                got=f"{name}={getattr(generation_config, name)!r}",
                remedy="Leave it out; the output has each trajectory's mean log-probability.",
            )
    cache = cache_of(model_kwargs)
    if cache is not None and (held := tokens_in(cache)) != 0:
        raise UnsupportedModeError.of(
            CACHE,
            expected=f"an empty cache with {loop}: its contents were computed without this noise",
            got=f"a cache of {'some' if held is None else held} positions",
            remedy="Leave it out, and pass the whole text.",
        )
    compiled = _compiled(model)
    if compiled is not None or generation_config.compile_config is not None:
        raise UnsupportedModeError.of(
            f"a compiled model with {loop}",
            expected="one that runs eagerly: a compiled graph would keep the noise, or its absence, for good",
            got="a compile_config" if compiled is None else f"{compiled} compiled",
            remedy="Decode with the model as loaded, without compile().",
        )


def _compiled(model: Any) -> str | None:
    """The name of a module compiled in place; with `torch.compile(model)`, `generate()` gets the original model."""
    for name, module in model.named_modules():
        forward = getattr(module, "forward", None)
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        if in_place or hasattr(forward, "_torchdynamo_orig_callable") or hasattr(module, "_orig_mod"):
            return name or type(model).__name__
    return None


def _refuse_streamer(streamer: Any) -> None:
    raise UnsupportedModeError.of(
        "streamer",
        expected="none with several trajectories: the selected one is known only at their end",
        got=f"a {type(streamer).__name__}",
        remedy="Leave it out, or pass trajectories=1.",
    )
