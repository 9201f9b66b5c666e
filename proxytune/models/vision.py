"""A vision-language base with text-only companions: the base sees the images, the companions read the text alone.

An image stands in `input_ids` as placeholder tokens, often thousands. They mean nothing to a text-only model, which may
not even embed them, so the companions' rows leave them out; rows of different lengths are padded at the left, as usual.
The base gets its inputs from its own methods for `generate()`, so that each family does there what it does alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from proxytune.errors import InputError, ProxytuneError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE, tokens_in
from proxytune.models.members.forward import Text
from proxytune.models.members.innermost import innermost
from proxytune.models.members.long_rope import switches_of
from proxytune.models.members.masks import positions_of
from proxytune.models.members.member import Member
from proxytune.models.members.text_checks import check_ids

__all__ = [
    "BASE_INPUTS",
    "BaseInputs",
    "StepInputs",
    "holds_nothing",
    "pixels_in",
    "refuse_cached_images",
    "refuse_images",
    "refuse_regrouped",
    "refuse_settings",
    "reopened_as",
    "says_text",
    "sees",
    "take_base_inputs",
    "text_mask",
    "text_of",
]

BASE_INPUTS = "base_inputs"
"""Under this name a composed model's `generate()` hands on what only its base takes."""

# What text-only models take too.
_COMMON = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep", "return_dict"}
_COMMON |= {"past_key_values", "cache", "cache_params", "cache_position", "use_cache", "kwargs", "model_kwargs"}
_COMMON |= {"next_sequence_length", "is_first_iteration"}
_PIXELS = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "mm_encoder_outputs", "image_grid_thw", "video_grid_thw"}
_RAW = {"pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches"}
_SOUND = ("audio", "input_features", "input_values", "feature_attention_mask")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
# Settings that run the model on other rows than the prompts', or on parts of them.
_OFF = {"guidance_scale": (None, 1), "token_healing": (None, False), "prefill_chunk_size": (None,)}
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}


def sees(model: Any) -> bool:
    """Whether a model takes images or videos beside the text."""
    # `input_modalities` is not set in every family.
    forward = getattr(innermost(model), "forward", None)
    if forward is None:
        return False
    own = getattr(forward, "__func__", None)
    return _has_raw(forward) if own is None else _has_raw_of_class(own)


def _has_raw(forward: Callable[..., Any]) -> bool:
    return not _RAW.isdisjoint(inspect.signature(forward).parameters)


_has_raw_of_class = functools.lru_cache(64)(_has_raw)  # of functions: what stands on one model may hold it


def reopened_as(base: Any) -> str | None:
    """What a recipe would open in place of a base that sees: a class, or "nothing"; None if the same."""
    model = innermost(base)
    if not sees(model) or model.config.is_encoder_decoder:
        return None
    found = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    opened = "nothing" if found is None else found.__name__
    return None if opened == type(model).__name__ else opened


def pixels_in(given: Mapping[str, Any]) -> list[str]:
    """The names of the images, videos and sounds among keyword arguments, raw or encoded, sorted."""
    found = {name: given[name] for name in _PIXELS & given.keys()}
    return sorted(name for name, value in found.items() if not holds_nothing(value))


def holds_nothing(value: Any) -> bool:
    """Whether an argument is None, or a dict of nothing, as `generate()` makes for models that could see."""
    if isinstance(value, Mapping):
        return all(holds_nothing(part) for part in value.values())
    return value is None or (isinstance(value, Sequence) and not value)


def take_base_inputs(base: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Take from `generate()`'s arguments, in place, what a base takes beside the text; return it.

    Raises:
        InputError: If there are images, and the base is a text-only model.
        UnsupportedModeError: If there are sounds, images for an encoder-decoder, or arguments that do not go with them.
    """
    if not sees(base):
        if names := pixels_in(given):
            raise InputError.of(
                names[0],
                expected="text only: no member takes images",
                got=f"{', '.join(names)} for a base that is a {type(innermost(base)).__name__}",
                remedy="Compose a vision-language model, loaded with AutoModelForImageTextToText, as the base.",
            )
        return {}
    model = innermost(base)
    if model.config.is_encoder_decoder:
        refuse_images(f"a {type(model).__name__}, an encoder-decoder,", given)
        return {}
    known = {*inspect.signature(model.forward).parameters}
    known |= {*inspect.signature(model.prepare_inputs_for_generation).parameters}
    names = [k for k in given if k in known - _COMMON and given[k] is not None and not k.startswith("output_")]
    if sounds := [name for name in names if name.startswith(_SOUND)]:
        raise UnsupportedModeError.of(
            sounds[0],
            expected="text and images",
            got=f"{', '.join(sounds)} for a {type(model).__name__}",
            remedy="Use the base alone, model.base.generate(…).",
        )
    taken = {name: given.pop(name) for name in names}
    if all(says_text(name, value) for name, value in taken.items()):
        return {}
    if taken:
        for name in ("position_ids", "adapter_names"):
            if given.get(name) is not None:
                raise _refusal(name, f"{name} beside {', '.join(taken)}")
    return taken


def says_text(name: str, value: Any) -> bool:
    """Whether a processor's argument says of every token that it is text, as without images; waits for the device."""
    return name.endswith("token_type_ids") and isinstance(value, torch.Tensor) and not bool(value.any())


def refuse_images(loop: str, model_kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModeError for images in a mode that runs the model on other rows or inputs than the prompts'."""
    names = [BASE_INPUTS] if model_kwargs.get(BASE_INPUTS) is not None else pixels_in(model_kwargs)
    if names:
        raise _refusal(loop, f"{loop} with images")


def _refusal(name: str, got: str, remedy: str = "Leave it out, or pass the text alone.") -> ProxytuneError:
    return UnsupportedModeError.of(
        name,
        expected="greedy decoding, sampling (FusedDecoding too) or beam search by generate(), on a new dynamic cache, "
        "where there are images",
        got=got,
        remedy=remedy,
    )


def refuse_settings(
    generation_config: GenerationConfig, mode: GenerationMode, cache: Cache | None, members: Iterable[Member]
) -> None:
    """Raise UnsupportedModeError for settings of a composed model's `generate()` that are not supported with images."""
    if mode not in _MODES:
        raise _refusal("images", mode.value.replace("_", " "))
    for name, off in _OFF.items():
        if (value := getattr(generation_config, name, None)) not in off:
            raise _refusal(name, f"{name}={value!r}")
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        raise _refusal(CACHE, f"a {type(cache).__name__}{', offloaded' if cache.offloading else ''}")
    if cache is not None and tokens_in(cache):
        raise _refusal(CACHE, f"one that holds {tokens_in(cache)} tokens", f"Start without {CACHE}.")
    for role, switch in switches_of(members).items():
        raise _refusal("images", f"a long-rope {role}, of other frequencies beyond {switch} tokens")


def placeholders(base: Any) -> list[int]:
    """The ids that stand for a base's images and videos, sorted; empty if its config tells none."""
    config = innermost(base).config
    return sorted({found for name in _PLACEHOLDERS if isinstance(found := getattr(config, name, None), int)})


def refuse_cached_images(base: Any, input_ids: torch.Tensor | None, images: bool) -> None:
    """Raise UnsupportedModeError for images in a `generate()` of prompts `[B, T]` that goes on from a filled cache."""
    if not images and input_ids is not None and sees(base):
        images = bool(_shown(base, input_ids).any())
    if images:
        raise _refusal(CACHE, "a filled one", f"Start without {CACHE}, and pass the images again.")


def refuse_regrouped(base: Any, input_ids: torch.Tensor, given: Mapping[str, Any], times: int, held: int = 1) -> None:
    """Raise UnsupportedModeError where transformers gives the images of prompts `[B, T]` to the wrong rows.

    Before 5.18 it repeats images one by one for the `times` rows of a prompt, unless the family knows better: of two
    images of a prompt, its first row then gets the first one twice. Those in `given` have been repeated `held` times.
    """
    model = innermost(base)
    known = type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation
    if times == 1 or known or hasattr(model, _ENCODES):
        return
    seeing = int(_shown(base, input_ids).any(-1).sum())
    for name in pixels_in(given):
        value = given[name]
        # Some families pad the images of each prompt: [B, images, …].
        by_prompt = isinstance(value, torch.Tensor) and value.ndim > 4 and len(value) == len(input_ids) * held
        if isinstance(value, torch.Tensor) and len(value) != seeing * held and not by_prompt:
            raise UnsupportedModeError.of(
                "images",
                expected="one in each prompt that has any, where beams or num_return_sequences repeat its row",
                got=f"{len(given[name]) // held} {name} for {seeing} of {len(input_ids)} prompts",
                remedy="Install transformers 5.18 or later, or leave out num_beams and num_return_sequences.",
            )


def _shown(base: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Where ids `[B, T]` stand for an image or video."""
    return torch.isin(input_ids, torch.tensor(placeholders(base), device=input_ids.device))


def text_mask(base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens of prompts `[B, T]` companions read: no padding, and no placeholder of an image or video.

    Returns:
        `[B, T]`, int64.

    Raises:
        UnsupportedModeError: If the base's config does not tell its placeholders.
        InputError: If a row holds nothing else.
    """
    if not placeholders(base):
        raise UnsupportedModeError.of(
            "images",
            expected=f"a base whose config names its placeholder tokens, as {_PLACEHOLDERS[0]} does",
            got=f"a {type(innermost(base)).__name__}",
            remedy="Pass the text alone, or use the base alone.",
        )
    mask = ~_shown(base, input_ids)
    if attention_mask is not None:
        mask &= attention_mask.to(mask.device) != 0
    empty = ~mask.any(-1)
    if bool(empty.any()):
        raise InputError.of(
            "input_ids",
            expected="some text in each row: companions read the prompt without its images",
            got=f"placeholders and padding only in row {int(empty.int().argmax())}",
            remedy="Add a question, or the BOS token.",
        )
    return mask.long()


def text_of(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows `[B, T]` without the tokens of mask 0, padded at the left to the longest that is left.

    Returns:
        `[B, L]`, int64, 0 on padding; and its mask `[B, L]`, int64, None if nothing is padded.
    """
    length = int(mask.sum(-1).max())
    order = mask.argsort(dim=-1, stable=True)[:, mask.shape[1] - length :]  # the text is last, in its order
    kept = mask.gather(1, order)
    ids = input_ids.gather(1, order).masked_fill(kept == 0, 0)
    return ids, None if bool((kept == 1).all()) else kept


@dataclass(frozen=True, eq=False)
class BaseInputs:
    """What the members of a composed model read in one `generate()` with images.

    Attributes:
        base: The vision-language model.
        given: Its keyword arguments, as its own `generate()` has them between two steps.
        width: T, the tokens of each prompt, placeholders and padding too.
        text: `[rows, L]`, int64: the prompts as companions read them.
        mask: `[rows, L]`, 1 for tokens and 0 for padding; None if nothing is padded.
    """

    base: Any
    given: dict[str, Any]
    width: int
    text: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, base: Any, given: Mapping[str, Any], ids: torch.Tensor, mask: torch.Tensor | None, times: int) -> Self:
        """Prepare prompts `[B, T]` of mask `[B, T]` (None: no padding) for `times` rows each.

        Raises:
            InputError: If a row holds nothing but placeholders.
            UnsupportedModeError: If the base's config does not tell its placeholders.
        """
        model = innermost(base)
        text, left = text_of(ids, text_mask(base, ids, mask))
        held = dict(given)
        if "position_ids" in inspect.signature(model.forward).parameters:
            told = {**held, "attention_mask": torch.ones_like(ids) if mask is None else mask}
            held["position_ids"] = model._prepare_position_ids_for_generation(ids, told)
        held["attention_mask"] = mask
        # transformers since 5.18 encodes images once, before rows are repeated.
        if encode := getattr(model, _ENCODES, None):
            held = encode(ids, held, "input_ids", model.generation_config)
        refuse_regrouped(model, ids, held, times)
        _, held = model._expand_inputs_for_generation(expand_size=times, input_ids=ids, **held)
        rows = [None if x is None else x.repeat_interleave(times, 0) for x in (text, left)]
        assert rows[0] is not None
        return cls(model, held, ids.shape[1], rows[0], rows[1])

    def extended(self, new: int) -> Self:
        """The same after `new` more tokens of each row."""
        update = self.base._update_model_kwargs_for_generation
        return replace(self, given=update({}, dict(self.given), is_encoder_decoder=False, num_new_tokens=new))

    def step(
        self, input_ids: torch.Tensor, new: int | None, cache: Cache | None, first: bool, use_cache: bool
    ) -> StepInputs:
        """One forward pass over the last `new` of the tokens `[rows, T + …]` (None: all), after those of a cache."""
        held = {} if cache is None else {CACHE: cache}
        base = self.base.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=first, use_cache=use_cache, **held, **self.given
        )
        ids = torch.cat([self.text, input_ids[:, self.width :]], 1)
        length = ids.shape[1]
        mask = None if self.mask is None else nn.functional.pad(self.mask, (0, length - self.mask.shape[1]), value=1)
        positions = torch.arange(length, device=ids.device)[None] if mask is None else positions_of(mask)
        start = 0 if first or new is None else length - new
        base = {k: v for k, v in base.items() if k not in (CACHE, "use_cache")}
        return StepInputs(base, Text(ids[:, start:], mask, positions[:, start:]), length, first)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What the members take in one forward pass.

    Attributes:
        base: The base's keyword arguments, but for the cache.
        text: What companions read.
        length: The columns of the companions' rows, those of the cache too.
        first: Whether this is the prompt.
    """

    base: dict[str, Any]
    text: Text
    length: int
    first: bool

    def check(self, members: Sequence[Member]) -> None:
        """Refuse what is wrong for some member, before any of them runs.

        Raises:
            InputError: If the text is too long for a companion, or has ids that a member cannot embed.
            UnsupportedModeError: If rows are padded at the left, and a member is wrong there.
        """
        members[0].refuse_padding(self.base.get("attention_mask"))
        for companion in members[1:]:
            companion.refuse_padding(self.text.attention_mask)
            companion.refuse_length(self.length)
        if self.first:
            check_ids(self.text.input_ids, list(members))
