"""The composite cache: one transformers `Cache` that holds the layers of all members, one member after the other.

While it is still empty, any cache made for the composed model (dynamic, static, offloaded) gets the layers that the
members' configs ask for, so reordering, cropping and resetting need no code here. A member sees a view: a cache of the
same class over its slice of the *shared* layer objects.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    get_layer_types_and_kwargs,
)

from proxytune.errors import CacheError
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.counting_layer import CountingLayer
from proxytune.models.members.fingerprint import Fingerprint
from proxytune.models.members.layer_kinds import STATES, kinds_of
from proxytune.models.members.looped import loop_of, with_passes
from proxytune.models.members.rewind import compresses, make_rewindable, rewindable_layers
from proxytune.models.members.text_layer import TextLayer

__all__ = [
    "adopt",
    "at_home",
    "cached_layers",
    "decoder_config",
    "empty_cache",
    "idle_in",
    "is_lazy",
    "is_owned",
    "note_members",
    "refuse_outdated",
    "refuse_short_cache",
    "room_of",
    "stored",
    "view",
]

_OWNER = "_proxytune_owner"
_FILLED_BY = "_proxytune_filled_by"
_IMAGES = "_proxytune_images"
_IDLE = "_proxytune_idle"
_LAZY = "_proxytune_lazy"
_ROOM = "_proxytune_room"
_HOMES = "_proxytune_homes"
_APART = "_proxytune_apart"  # the layers that do not see each token of a text
_WITHOUT: Any = getattr(cache_utils, "DummyLayer", ())  # transformers before it had one left such layers out


def stored(cache: Cache) -> list[Any]:
    """The layers that hold keys and values; those that attend to another layer's hold none."""
    return [layer for layer in cache.layers if not isinstance(layer, _WITHOUT)]


def _sized(cache: Cache) -> list[Any]:
    """The layers of a static cache that have a length: recurrent ones have none."""
    return [layer for layer in stored(cache) if hasattr(layer, "max_cache_len")]


def cached_layers(config: PreTrainedConfig) -> int:
    """How many layers a member has in a cache: fewer than in its config where transformers before 5.20 skips some."""
    loop = loop_of(config)
    return len(get_layer_types_and_kwargs(config)[0]) + (0 if loop is None else loop.copies)


def empty_cache(config: PreTrainedConfig, *, windows: bool = True) -> DynamicCache:
    """An empty cache of one member alone; with `windows=False`, sliding layers keep all tokens where they can."""
    cache = DynamicCache(config=config)
    if not windows and not any(map(compresses, cache.layers)):
        cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    cache.layers = _with_length(_layers(cache, config))
    return cache


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A model's text config; of an encoder-decoder that of its decoder, with the decoder's number of layers."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    if not getattr(config, "is_encoder_decoder", False):
        return text
    text = copy.deepcopy(text)
    text.is_encoder_decoder = False  # or it would be looked for again
    # transformers itself looks for `decoder_layers` alone; T5 and ProphetNet have another name.
    if (layers := getattr(config, "num_decoder_layers", None)) is not None:
        setattr(text, "num_encoder_layers" if hasattr(text, "num_encoder_layers") else "num_hidden_layers", layers)
    return text


def view(cache: Cache, start: int, stop: int) -> Cache:
    """A cache of the same class over the layers `start` to `stop`; the layers are shared, so updates reach `cache`."""
    if isinstance(cache, EncoderDecoderCache):  # made anew, it finds out which sources have been read
        return EncoderDecoderCache(
            view(cache.self_attention_cache, start, stop), view(cache.cross_attention_cache, start, stop)
        )
    part = copy.copy(cache)
    part.layers = _with_length(cache.layers[start:stop])
    return part


def is_owned(cache: Cache, owner: str) -> bool:
    """Whether a cache is that of a composed model already."""
    return getattr(cache, _OWNER, None) == owner


def adopt(
    cache: Cache,
    configs: Sequence[PreTrainedConfig],
    owner: str,
    *,
    ahead: bool = False,
    texts: bool = False,
    idle: Collection[int] = (),
    lazy: bool = False,
    follows: bool = False,
) -> None:
    """Make a cache this model's, or refuse it.

    Args:
        cache: A cache that `generate()` or the caller made. While it is empty it gets the members' layers, in place.
        configs: The members' text configs, in the order of their layers.
        owner: An id of the composed model; it is written on the cache and kept by copies of it.
        ahead: Whether some members have run ahead of the others, as drafts do.
        texts: Whether an empty cache gets a text layer as well (`proxytune.models.members.text_layer`).
        idle: The members that do not run now, since their weight is 0. Their layers stay empty for the cache's life.
        lazy: Whether companions are to read an empty cache's text where a gate opens (`proxytune.models.lazy`). Their
            layers stay empty, and the cache gets a text layer.
        follows: Whether companions can read the text in this pass.

    Raises:
        CacheError: If the cache holds tokens from another model, or tokens that only some members have seen; or if its
            length or layers cannot serve all members.
    """
    if not hasattr(cache, "layers"):  # tuples of tensors (older transformers), or an encoder-decoder's pair of caches
        raise CacheError.of(
            CACHE,
            expected="a cache of a decoder, such as DynamicCache()",
            got=f"a {type(cache).__name__}",
            remedy=f"Pass the {CACHE} that this model returned, or none.",
        )
    if is_owned(cache, owner):
        if not _filled(cache):
            _lay_out(cache, configs, None, texts, idle, lazy)
        asleep = idle_in(cache)
        if is_lazy(cache) and not follows:
            raise CacheError.of(
                CACHE,
                expected="a cache that all members have read, for drafts, latent steps and images",
                got="one that was filled under a gate, where companions run only when it opens",
                remedy="Start without it.",
            )
        if not is_lazy(cache) and not asleep <= {*idle}:
            raise CacheError.of(
                CACHE,
                expected="a cache that all members with a weight have read",
                got=f"one that was filled while {len(asleep - {*idle})} of them had the weight 0, and did not run",
                remedy="Start without it.",
            )
        if not ahead:
            _refuse_torn(cache)
        return
    if _filled(cache):
        raise CacheError.of(
            CACHE,
            expected="an empty cache, or one that this composed model filled",
            got=f"a {type(cache).__name__} of {len(cache.layers)} layers filled by another model",
            remedy=f"The companions have not seen its tokens. Start without it, or pass the {CACHE} that this "
            "model's generate(..., return_dict_in_generate=True) returned.",
        )
    # From each member's own config: transformers before 5.20 gives all layers of one config the same window.
    if type(cache) is DynamicCache:
        counts = _fill(cache, [(DynamicCache(config=c), c) for c in configs])
        cache.layer_class_to_replicate = None
    elif type(cache) is StaticCache:
        length = _static_length(cache, configs)
        counts = _fill(cache, [(StaticCache(config=c, max_cache_len=length), c) for c in configs])
    elif len(cache.layers) != (layers := sum(counts := [cached_layers(c) for c in configs])):
        raise CacheError.of(
            CACHE,
            expected=f"a {type(cache).__name__} with the {layers} layers of all members",
            got=f"{len(cache.layers)} layers",
            remedy=f"Build it as {type(cache).__name__}(config=model.config, …).",
        )
    elif states := sorted({kind for c in configs for kind in kinds_of(c) & STATES}):
        raise CacheError.of(
            CACHE,
            expected="a DynamicCache or StaticCache for members with recurrent layers",
            got=f"a {type(cache).__name__}, and {', '.join(states)} layers",
            remedy="Leave out cache_implementation.",
        )
    setattr(cache, _OWNER, owner)
    _lay_out(cache, configs, counts, texts, idle, lazy)
    vars(cache).pop(_FILLED_BY, None)


def _lay_out(
    cache: Cache,
    configs: Sequence[PreTrainedConfig],
    counts: list[int] | None,
    texts: bool,
    idle: Collection[int],
    lazy: bool,
) -> None:
    """Decide what an empty cache will hold: whether the texts, and whose layers.

    `counts` are the layers of each member in a cache that has just been adopted; None for one that was before.
    """
    if texts and type(cache) is not DynamicCache:
        raise CacheError.of(
            CACHE,
            expected="a DynamicCache, for members with a prompt of their own",
            got=f"a {type(cache).__name__}",
            remedy="Leave out cache_implementation.",
        )
    held = bool(cache.layers) and isinstance(cache.layers[-1], TextLayer)
    if (texts or lazy) and not held:
        cache.layers.append(TextLayer())
    elif held and not (texts or lazy):
        cache.layers.pop()
    asleep = frozenset(range(1, len(configs)) if lazy else idle)
    if counts is None and held == (texts or lazy) and is_lazy(cache) == lazy and idle_in(cache) == asleep:
        return  # as it was laid out before
    setattr(cache, _IDLE, asleep)
    setattr(cache, _LAZY, lazy)
    counts = [cached_layers(c) for c in configs] if counts is None else counts
    apart, start = {*_cross_attention(configs, counts)}, 0
    for i, count in enumerate(counts):
        stop = start + count
        for layer in cache.layers[start:stop]:
            vars(layer).pop("crop", None)
            if i in asleep:
                layer.crop = _stay_empty
        apart |= {*range(start, stop)} if i in asleep else set()
        start = stop
    setattr(cache, _APART, frozenset(apart))


def _stay_empty(tokens: int) -> None:
    """Stands for `crop` of layers that hold nothing, at which transformers 5.17 fails."""


def is_lazy(cache: Cache | None) -> bool:
    """Whether the companions' layers are outside of a cache, since they read its text where a gate opens."""
    return bool(getattr(cache, _LAZY, False))


def idle_in(cache: Cache) -> frozenset[int]:
    """The members that a cache holds nothing of, since they had no weight when it was filled."""
    found: frozenset[int] = getattr(cache, _IDLE, frozenset())
    return found


def _fill(cache: Cache, parts: Iterable[tuple[Cache, PreTrainedConfig]]) -> list[int]:
    """Give a cache the layers of members' empty caches, made by their configs; how many each member has."""
    of_members = [_layers(part, config) for part, config in parts]
    cache.layers = _with_length([layer for layers in of_members for layer in layers])
    return [len(layers) for layers in of_members]


def _with_length(layers: list[Any]) -> list[Any]:
    """Layers of which one can tell how many tokens they hold, as `generate()` and some recurrent models ask."""
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return [*layers, CountingLayer(layers[0])]
    return layers


def _layers(empty: Cache, config: PreTrainedConfig) -> list[Any]:
    """A member's layers, from a cache made by its config."""
    layers = with_passes(empty.layers, config)
    make_rewindable(layers)
    return layers


def note_members(
    cache: Cache,
    members: Mapping[str, nn.Module],
    adapter_names: list[str] | None = None,
    *,
    last: dict[str, Fingerprint],
    images: bool = False,
) -> None:
    """Write on a cache which models, role → model, have filled it, and the base's adapters of its rows, once.

    `last` are the fingerprints that were taken for another cache; those that still hold are not taken again. `images`
    says that the base has seen images in it, so that its columns are not those of the others.
    """
    if images:
        setattr(cache, _IMAGES, True)
    if not hasattr(cache, _FILLED_BY):
        for role, model in members.items():
            if role not in last or not last[role].holds(model):
                last[role] = Fingerprint(model)
        setattr(cache, _FILLED_BY, ({role: last[role] for role in members}, adapter_names))


def refuse_outdated(
    cache: Cache, members: Mapping[str, nn.Module], adapter_names: list[str] | None = None, *, values: bool
) -> None:
    """Raise CacheError if a cache holds tokens, and a member, role → model, has changed since they were read.

    `values` compares values of the weights as well, for which the host waits for the device.
    """
    filled: tuple[dict[str, Fingerprint], list[str] | None] = getattr(cache, _FILLED_BY, ({}, adapter_names))
    noted, names = filled
    changed = [role for role, model in members.items() if role in noted and not noted[role].holds(model, values=values)]
    if names != adapter_names:
        changed.append("adapter_names")
    if not changed:
        return
    if not _filled(cache):  # it was reset
        delattr(cache, _FILLED_BY)
        return
    raise CacheError.of(
        CACHE,
        expected="a cache filled by the members as they are now",
        got=f"one that was filled before the {' and the '.join(changed)} changed (weights, adapter, layers or hooks)",
        remedy="Start without it: generate() reads the whole text anew.",
    )


def refuse_short_cache(cache: StaticCache, length: int) -> None:
    """Raise CacheError if a static cache holds fewer than `length` tokens; sliding layers need only their window."""
    held = max((layer.max_cache_len for layer in _sized(cache) if not layer.is_sliding), default=length)
    setattr(cache, _ROOM, held)
    if held < length:
        raise CacheError.of(
            CACHE,
            expected=f"a StaticCache for at least {length} tokens",
            got=f"a StaticCache for {held}",
            remedy="Make it longer, or lower max_new_tokens.",
        )


def room_of(cache: Cache) -> int | None:
    """How many tokens a static cache is for; None if its windows do not tell, and `generate()` has not."""
    if not hasattr(cache, _ROOM):
        setattr(cache, _ROOM, max((x.max_cache_len for x in _sized(cache) if not x.is_sliding), default=None))
    room: int | None = getattr(cache, _ROOM)
    return room


def at_home(cache: Cache, name: str, x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that graphs write to, at one place in memory for as long as the cache lives."""
    homes = vars(cache).setdefault(_HOMES, {})
    key = (name, x.shape, x.dtype, x.device, torch.is_inference_mode_enabled())
    if key not in homes:
        homes[key] = x.clone(memory_format=torch.contiguous_format)
        torch._dynamo.mark_static_address(homes[key])
    home: torch.Tensor = homes[key]
    return home.copy_(x)


def _filled(cache: Cache) -> bool:
    return any(_holds_tokens(layer) for layer in stored(cache))


def _holds_tokens(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values()):
        return True
    return getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0


def _static_length(cache: StaticCache, configs: Sequence[PreTrainedConfig]) -> int:
    """The length a static cache was made for; sliding layers end at their window and may not tell."""
    length = max((layer.max_cache_len for layer in _sized(cache)), default=0)
    unbounded = [StaticCache(config=c, max_cache_len=sys.maxsize) for c in configs]
    wanted = [layer.max_cache_len for one in unbounded for layer in _sized(one)]  # the window, or unbounded
    # If shorter than every window, it is the length itself; if as long as the longest, the length does not matter.
    if wanted and all(layer.is_sliding for layer in _sized(cache)) and min(wanted) <= length < max(wanted):
        raise CacheError.of(
            CACHE,
            expected="a StaticCache that shows its length: some member needs more than these sliding windows",
            got=f"a StaticCache of sliding layers only, of length {length}",
            remedy="Build it as StaticCache(config=model.config, max_cache_len=…).",
        )
    return length


def _refuse_torn(cache: Cache) -> None:
    if hasattr(cache, _IMAGES):
        if _filled(cache):
            raise CacheError.of(
                CACHE,
                expected="one that was filled without images",
                got="one whose images the base has seen, while the companions have seen the text alone",
                remedy="Start without it, and pass the images again.",
            )
        delattr(cache, _IMAGES)  # it was reset
    # Static layers have their length on the device; reading it would make the host wait in every step.
    apart: frozenset[int] = getattr(cache, _APART, frozenset())
    layers = [x for i, x in enumerate(cache.layers) if i not in apart and not isinstance(x, _WITHOUT)]
    counts = [layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")]
    lengths = {n for n in counts if isinstance(n, int)}
    if len(lengths) > 1 or any(layer.torn for layer in rewindable_layers(cache)):
        raise CacheError.of(
            CACHE,
            expected="layers that have all seen the same tokens",
            got=(f"layers of {min(lengths)} to {max(lengths)} tokens" if len(lengths) > 1 else "states of half a pass")
            + ", as after an interrupted forward, or after reset() in older versions of transformers",
            remedy="Start without the cache, or from a copy that was made before.",
        )


def _cross_attention(configs: Sequence[PreTrainedConfig], counts: list[int]) -> Iterator[int]:
    """The layers that attend to images, and hold nothing of a text (Mllama)."""
    start = 0
    for config, count in zip(configs, counts, strict=True):
        yield from (start + i for i in getattr(config, "cross_attention_layers", None) or ())
        start += count
