"""Checks of a tree loop's settings and call, before the first forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from transformers import StaticCache

from proxytune.budget.ledger import TokenLedger
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.call import Call
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.cache_name import cache_of
from proxytune.models.members.layer_kinds import refuse_lacking
from proxytune.models.members.long_rope import refuse_crossing
from proxytune.models.members.whole_text import reads_whole_text
from proxytune.ops import Impl
from proxytune.validation import choice, finite, proper_share, refuse_seed, whole

__all__ = ["Where", "refuse_extras", "refuse_hidden_state", "refuse_leaving", "refuse_settings", "refuse_threshold"]

Where = Literal["forks", "random", "start"]
"""Where a tree forks, see `proxytune.methods.trees.fork_decoding.ForkDecoding`."""


class _Settings(Protocol):
    """The settings that are checked."""

    @property
    def threshold(self) -> float | ForkThreshold | None: ...
    @property
    def where(self) -> Where: ...
    @property
    def share(self) -> float: ...
    @property
    def fork_temperature(self) -> float | None: ...
    @property
    def max_total_tokens(self) -> int | None: ...
    @property
    def reserve(self) -> int | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def impl(self) -> Impl: ...


def refuse_settings(loop: _Settings, least: Mapping[str, int], *, needed: bool, allowed: Sequence[str] = ()) -> None:
    """Raise InputError if a setting of a loop is out of its range.

    `least` holds the minimum of each of the loop's own integer settings; `needed` requires a threshold; `allowed`
    restricts `where`.
    """
    name = type(loop).__name__

    choice("where", loop.where, allowed or get_args(Where), remedy="Leave it out for 'forks'.")
    for what, lowest in least.items():
        remedy = f"Pass e.g. {name}({what}={max(lowest, 8)})."
        object.__setattr__(loop, what, whole(what, getattr(loop, what), "", least=lowest, remedy=remedy))
    threshold = loop.threshold
    if isinstance(threshold, ForkThreshold):
        if threshold.is_streaming:
            raise InputError.of(
                "threshold",
                expected="a fixed or calibrated threshold: a tree must not depend on the batch",
                got="a streaming threshold",
                remedy=_CALIBRATE,
            )
        if threshold.measure not in (None, "raw"):
            raise InputError.of(
                "threshold",
                expected="a threshold of the raw entropy",
                got=f"a threshold of the {threshold.measure} entropy",
                remedy=_CALIBRATE,
            )
    elif threshold is not None or needed:
        finite("threshold", threshold, "of nats", remedy=_CALIBRATE)
    proper_share(loop.share)
    if loop.fork_temperature is not None:
        remedy = "Pass e.g. fork_temperature=1.0, or None."
        finite("fork_temperature", loop.fork_temperature, above=0.0, remedy=remedy)
    if loop.max_total_tokens is not None:
        TokenLedger(loop.max_total_tokens)
    if loop.reserve is not None:
        whole("reserve", loop.reserve, least=1)
        if loop.max_total_tokens is None:
            raise InputError.of(
                "reserve", expected="max_total_tokens with it", got="no budget", remedy="Leave it out, or set a budget."
            )
    refuse_seed(loop.seed, name)
    choice("impl", loop.impl, get_args(Impl), remedy="Leave it out for 'auto'.")


_CALIBRATE = (
    "`proxytune calibrate` finds one for a model, and ForkThreshold.of(recipe.fork_threshold) reads it; "
    "ForkThreshold.calibrated(entropies) makes one from a run."
)


def refuse_threshold(threshold: float | ForkThreshold | None, model: Any) -> None:
    """Raise InputError if the threshold was calibrated at another α; plain numbers and plain models have none."""
    calibrated = threshold.alpha if isinstance(threshold, ForkThreshold) else None
    alpha = Ensemble.of(model).alpha
    if None not in (alpha, calibrated) and calibrated != alpha:
        raise InputError.of(
            "threshold", expected=f"a threshold calibrated at α = {alpha}", got=f"α = {calibrated}", remedy=_CALIBRATE
        )


def refuse_extras(
    loop: str, generation_config: Any, streamer: Any, synced_gpus: bool | None, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what `generate()` supports but a tree does not.

    Raises:
        UnsupportedModeError: For a streamer, synced GPUs, per-step outputs, a static cache, or a state without a cache.
        InputError: If there is no padding token.
    """
    requested = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(generation_config, name, False)
    ]
    cache = cache_of(model_kwargs)
    refused = {
        "streamer": streamer,
        "synced_gpus": synced_gpus or None,
        requested[0] if requested else "outputs": True if requested else None,
        "a static cache": cache if isinstance(cache, StaticCache) else None,
    }
    for what, given in refused.items():
        if given is not None:
            raise UnsupportedModeError.of(
                what,
                expected=f"none with {loop}: the number of rows changes as branches come and go",
                got=repr(given) if isinstance(given, bool) else f"a {type(given).__name__}",
                remedy="Leave it out; the trees hold each token's log-probability, entropy and confidence.",
            )
    if model_kwargs.get("use_cache") and cache is None:
        raise UnsupportedModeError.of(
            "use_cache",
            expected=f"a model with a cache made by generate(), for {loop}: branches copy rows of it",
            got=f"use_cache={model_kwargs['use_cache']!r}, and no such cache",
            remedy="Pass use_cache=False.",
        )
    if generation_config._pad_token_tensor is None:
        raise InputError.of(
            "pad_token_id",
            expected="a padding token, since leaves differ in length",
            got="None",
            remedy="Pass pad_token_id= to generate().",
        )


def refuse_leaving(loop: str, call: Call) -> None:
    """Raise UnsupportedModeError if rows cannot leave a cache, or may leave others below a long-rope switch."""
    if call.config.use_cache and not call.ensemble.composed and (why := reads_whole_text(call.model)) is not None:
        raise UnsupportedModeError.of(
            "use_cache",
            expected=f"a model that returns its cache, for {loop}: branches copy rows of it",
            got=f"a {type(call.model).__name__}, which {why}",
            remedy="Pass use_cache=False.",
        )
    if call.config.use_cache and call.ensemble.composed:
        expected = "layers of a cache whose rows can come and go"
        refuse_lacking(call.ensemble.members, "repeat", loop, expected=expected, remedy="Pass use_cache=False.")
    switches = call.ensemble.switches if call.config.use_cache else {}
    # Texts of one length stay of one length, and cross together.
    if switches and int(call.lengths.min()) < int(call.lengths.max()):
        instead = "pass prompts of one length, one prompt at a time, or use_cache=False"
        refuse_crossing(loop, switches, call.lengths, call.most_new, instead=instead, rows_leave=True)


def refuse_hidden_state(loop: str, model: Any, outputs: Any, use_cache: Any) -> None:
    """Raise UnsupportedModeError if a model, after its first pass, does not return the state that it goes on from."""
    if use_cache and cache_of(outputs) is None:
        raise UnsupportedModeError.of(
            "use_cache",
            expected=f"a model that returns its cache, for {loop}: branches copy rows of it",
            got=f"a {type(model).__name__}, which keeps a state in its own layers",
            remedy="Pass use_cache=False.",
        )
