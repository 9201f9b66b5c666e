"""Long-rope members (Phi-3, Phi-4 mini, PhiMoE): in a text beyond the switch, all positions have other frequencies.

The longest row of a pass decides for the whole pass, as in transformers. So a cache is of use on its own side of the
switch only. `generate()` reads the text again where it crosses; a mode that rewinds, or feeds mixtures, cannot.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from proxytune.errors import CacheError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.innermost import innermost

__all__ = [
    "is_beyond",
    "longest_prompt",
    "must_read_again",
    "note_side",
    "read_whole",
    "refuse_crossing",
    "refuse_missing_ids",
    "refuse_unread",
    "side_of_pass",
    "switch_of",
    "switches_of",
]

_SIDE = "_proxytune_beyond_switch"


def switch_of(model: Any) -> int | None:
    """From how many tokens on a long-rope model uses its other frequencies; None for other models."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") == "longrope":
            found = one.get("original_max_position_embeddings")
            return found or getattr(config, "original_max_position_embeddings", None)
    return None


def switches_of(members: Iterable[Any]) -> dict[str, int]:
    """Role → switch of those members (`Member`) that have one."""
    return {m.role: m.switch for m in members if m.switch is not None}


def is_beyond(switch: int | None, length: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether a text of `length` columns is beyond the switch.

    Waits for the device if there is a mask `[B, length]`, beyond the switch only.
    """
    if switch is None or length <= switch:
        return False
    return attention_mask is None or int(attention_mask.sum(-1).max()) > switch


def longest_prompt(generation_config: Any, model_kwargs: Mapping[str, Any], width: int) -> int:
    """Tokens of the longest row of a `generate()`, padding not counted, with those that only a cache holds."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.sum(-1).max())
    return getattr(generation_config, "_mask_length", None) or width  # a mask of ones is dropped


def read_whole(
    switches: Mapping[str, int], generation_config: Any, model_kwargs: Mapping[str, Any], width: int
) -> None:
    """Have a `generate()` read a prompt beyond a switch in one pass: its first chunks would be on the other side."""
    if not switches or generation_config.prefill_chunk_size is None:
        return
    if longest_prompt(generation_config, model_kwargs, width) > min(switches.values()):
        generation_config.prefill_chunk_size = None


def refuse_crossing(
    loop: str,
    switches: Mapping[str, int],
    lengths: torch.Tensor,
    most_new: int,
    *,
    instead: str,
    rows_leave: bool = False,
) -> None:
    """Raise UnsupportedModeError for a call that may cross a switch, in a mode that cannot read the text again.

    Args:
        loop: The mode, for messages.
        switches: Role → switch.
        lengths: `[B]`, int64: tokens of each prompt, padding not counted. Waits for the device if there is a switch.
        most_new: The maximum number of new tokens.
        instead: What else to do, in the imperative.
        rows_leave: Whether texts that have ended leave the batch: the rest may then be within the switch again.
    """
    for role, switch in switches.items():
        shortest, longest = (int(x) for x in torch.aminmax(lengths))
        if (shortest if rows_leave else longest) <= switch < longest + most_new:
            rows = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
            within = f"lower max_new_tokens to {switch - longest}, so that the text stays within the switch, or "
            remedy = (within if longest < switch else "") + instead
            raise UnsupportedModeError.of(
                f"length for the {role}",
                expected=f"a text within {switch} tokens, or prompts beyond them, with {loop}: a long-rope "
                "model has other frequencies for all positions of a longer text",
                got=f"prompts of {rows} tokens and max_new_tokens={most_new}",
                remedy=f"{remedy[0].upper()}{remedy[1:]}.",
            )


def refuse_missing_ids(
    switches: Mapping[str, int], generation_config: Any, model_kwargs: Mapping[str, Any], width: int
) -> None:
    """Raise UnsupportedModeError if a `generate()` may cross a switch, and has only ids `[B, width]` after a cache."""
    mask = model_kwargs.get("attention_mask")
    covered = (getattr(generation_config, "_mask_length", None) or width) if mask is None else mask.shape[1]
    if switches and covered != width:
        lengths = torch.tensor([longest_prompt(generation_config, model_kwargs, width)])
        instead = "pass the ids of the whole text, which generate() reads again there"
        refuse_crossing(
            "a cache and new ids alone", switches, lengths, generation_config.max_length - width, instead=instead
        )


def refuse_unread(
    loop: str, model: Any, switches: Mapping[str, int], lengths: torch.Tensor, width: int, most_new: int
) -> None:
    """Raise UnsupportedModeError if a plain model would cross its switch, and not read its text again there.

    Phi-3 does so where the ids are more than the switch, padding counted; before transformers 5.23 it loses the text.
    Other families with such frequencies do not. Takes ids `[B, width]`; for the rest see `refuse_crossing`.
    """
    if switches and not (_reads_again(model) and int(lengths.max()) == width):
        instead = "pass use_cache=False, or to a Phi-3 of transformers 5.23 the longest prompt whole, without padding"
        refuse_crossing(loop, switches, lengths, most_new, instead=instead)


def _reads_again(model: Any) -> bool:
    method = inspect.unwrap(type(innermost(model)).prepare_inputs_for_generation)
    own = method is not inspect.unwrap(GenerationMixin.prepare_inputs_for_generation)
    return own and "next_sequence_length" in method.__code__.co_consts  # which it sets, to pass all ids


def _side(switches: Mapping[str, int], length: int, attention_mask: torch.Tensor | None) -> frozenset[str]:
    """The roles that are beyond their switch in a text of `length` columns."""
    return frozenset(role for role, switch in switches.items() if is_beyond(switch, length, attention_mask))


def _side_of_cache(
    cache: Cache, switches: Mapping[str, int], past: int, attention_mask: torch.Tensor | None
) -> frozenset[str]:
    """The roles whose `past` cached tokens were turned by the frequencies beyond the switch."""
    noted: frozenset[str] | None = getattr(cache, _SIDE, None)
    if noted is not None:
        return noted
    return _side(switches, past, None if attention_mask is None else attention_mask[:, :past])


def note_side(cache: Cache, side: frozenset[str] | None) -> None:
    """Write on a cache on which side of the switches the pass was that filled it; None for one that went on."""
    if side is not None:
        setattr(cache, _SIDE, side)


def must_read_again(
    cache: Cache | None, switches: Mapping[str, int], length: int, new: int, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the cache of the first `length − new` tokens is of no use: it is from the other side of a switch."""
    if not switches or cache is None or new >= length:
        return False
    return _side(switches, length, attention_mask) != _side_of_cache(cache, switches, length - new, attention_mask)


def side_of_pass(
    cache: Cache | None, switches: Mapping[str, int], past: int | None, new: int, attention_mask: torch.Tensor | None
) -> frozenset[str] | None:
    """The roles that are beyond their switch in a pass over `new` tokens, after `past` in the cache.

    None if there is no long-rope member, or `past` is None (only the device knows it, and `generate()` has asked).

    Raises:
        UnsupportedModeError: If the cache would be continued beyond a switch.
        CacheError: If the cache was filled beyond a switch, and would be continued within it.
    """
    if not switches or past is None:
        return None
    side = _side(switches, past + new, attention_mask)
    if cache is None or past == 0:
        return side
    held = _side_of_cache(cache, switches, past, attention_mask)
    for role, switch in switches.items():
        if role in side - held:
            raise UnsupportedModeError.of(
                f"length for the {role}",
                expected=f"a text within {switch} tokens, or read again as a whole beyond them: a long-rope model has "
                "other frequencies for all positions of a longer text",
                got=f"{past} cached tokens, continued to {past + new}",
                remedy="Use generate(), which reads the text again, or pass the whole text without the cache.",
            )
        if role in held - side:
            raise CacheError.of(
                CACHE,
                expected=f"one of a text within {switch} tokens: a long-rope model, the {role}, has other frequencies "
                "for all positions of a longer text",
                got=f"one that a longer text filled, of which {past} tokens or shorter rows are left",
                remedy="Use generate(), which reads the text again, or pass the whole text without the cache.",
            )
    return side
