"""The settings of `generate()` that are options too, and what their values have to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["SETTINGS", "Setting"]


@dataclass(frozen=True)
class Setting:
    """One field of `GenerationConfig`.

    Attributes:
        expected: Its values in words, for messages.
        fits: Whether a value is one of them.
        metavar: How `--help` calls its value; None for a flag.
        help: What `--help` says of it; empty: not listed there.
    """

    expected: str
    fits: Callable[[Any], bool]
    metavar: str | None
    help: str = ""


def _whole(least: int, text: str = "") -> Setting:
    def fits(value: Any) -> bool:
        return type(value) is int and value >= least

    return Setting(f"a whole number, at least {least}", fits, "<int>", text)


def _number(interval: str = "", text: str = "") -> Setting:
    """A finite number; `interval` in the usual notation, e.g. "(0, 1]"."""
    low, high = (float(part.strip("[]() ")) for part in (interval or "(-inf, inf)").split(","))

    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        above = value >= low if interval.startswith("[") else value > low
        return above and (value <= high if interval.endswith("]") else value < high)

    bounds = "" if not interval else f" > {low:g}" if math.isinf(high) else f" in {interval}"
    return Setting(f"a {'finite ' if math.isinf(high) else ''}number{bounds}", fits, "<float>", text)


def _flag(text: str = "") -> Setting:
    return Setting("true or false", lambda value: type(value) is bool, None, text)


def _several(each: Callable[[Any], bool], what: str, metavar: str, text: str = "") -> Setting:
    def fits(value: Any) -> bool:
        many = value if isinstance(value, list) else [value]
        return bool(many) and all(map(each, many))

    return Setting(f"{what}, or several as a JSON list", fits, metavar, text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""  # every text ends with ""


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _lists(expected: str, each: Callable[[Any], bool]) -> Setting:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(each, value))

    return Setting(f"{expected} as JSON", fits, "<json>")


SETTINGS = {
    "max_new_tokens": _whole(1, "Most tokens of an answer (default: the model's own, else 20)."),
    "min_new_tokens": _whole(0, "Fewest tokens of an answer."),
    "do_sample": _flag("Draw tokens instead of taking the likeliest."),
    "temperature": _number("(0, inf)", "Divides the logits before a draw."),
    "top_k": _whole(0, "Draw from this many tokens; 0: from all."),
    "top_p": _number("(0, 1]", "Draw from the likeliest tokens that have this probability together."),
    "min_p": _number("[0, 1]", "Draw from tokens with at least this share of the likeliest one's probability."),
    "repetition_penalty": _number("(0, inf)", "Above 1: tokens that were there become less likely."),
    "stop_strings": _several(_is_text, "a text", "<str>", "End at this text; several as a JSON list."),
    "num_beams": _whole(1, "Beams of beam search."),
    "num_return_sequences": _whole(1, "Answers per prompt."),
    "max_length": _whole(1),
    "min_length": _whole(0),
    "max_time": _number("(0, inf)"),
    "top_h": _number("(0, 1]"),
    "typical_p": _number("(0, 1]"),
    "epsilon_cutoff": _number("[0, 1)"),
    "eta_cutoff": _number("[0, 1)"),
    "encoder_repetition_penalty": _number("(0, inf)"),
    "length_penalty": _number(),
    "guidance_scale": _number(),
    "no_repeat_ngram_size": _whole(0),
    "eos_token_id": _several(_is_id, "a token id", "<int>"),
    "pad_token_id": _whole(0),
    "bos_token_id": _whole(0),
    "prompt_lookup_num_tokens": _whole(1),
    "max_matching_ngram_size": _whole(1),
    "prefill_chunk_size": _whole(1),
    "bad_words_ids": _lists("lists of token ids, [[5, 6], …],", _is_ids),
    "suppress_tokens": _lists("a list of token ids", _is_id),
    "begin_suppress_tokens": _lists("a list of token ids", _is_id),
    "sequence_bias": _lists(
        "pairs of token ids and nats, [[[5, 6], -2.0], …],",
        lambda pair: isinstance(pair, list) and len(pair) == 2 and _is_ids(pair[0]) and type(pair[1]) in (int, float),
    ),
    "forced_bos_token_id": _whole(0),
    "forced_eos_token_id": _several(_is_id, "a token id", "<int>"),
    "exponential_decay_length_penalty": Setting(
        "a position and a factor, [20, 1.05], as JSON",
        lambda pair: isinstance(pair, list) and [isinstance(one, int | float) for one in pair] == [True, True],
        "<json>",
    ),
    "watermarking_config": Setting("an object as JSON", lambda value: isinstance(value, dict), "<json>"),
    "use_cache": _flag(),
    "renormalize_logits": _flag(),
    "remove_invalid_values": _flag(),
    "token_healing": _flag(),
    "disable_compile": _flag(),
}
"""The fields whose values are checked before a model is loaded; each is an option too. `key=value` takes all fields."""
