"""Prompts from arguments, files or stdin, and `key=value` generation settings."""

from __future__ import annotations

import copy
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli import terminal
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["check_names", "merged_settings", "parse_value", "read_prompts", "refuse_empty", "split_arguments"]

_FLAG = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_BARE_FRACTION = re.compile(r"[+-]?\.\d+")
_WORDS = {"true": True, "false": False, "none": None}
_READ_AS_SETTING = "Arguments of the form key=value at the end are read as settings."
_ELSEWHERE = "Pass a prompt of this form with --file or on stdin."
_NOT_SETTABLE = ("transformers_version",)
# Without effect unless sampling.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate prompts from the `key=value` settings after them; a setting given twice is refused.

    Only the last arguments can be settings. A prompt that looks like one is safe before another prompt; on its own it
    has to come from a file or stdin.
    """
    end = len(arguments)
    while end and _FLAG.fullmatch(arguments[end - 1]):
        end -= 1
    flags: dict[str, Any] = {}
    for argument in arguments[end:]:
        key, _, value = argument.partition("=")
        if key in flags:
            raise InputError.of(
                f"generation setting {key!r}",
                expected="one value",
                got=f"two, {flags[key]!r} and {parse_value(value)!r}",
                remedy="Remove one of them.",
            )
        flags[key] = parse_value(value)
    return list(arguments[:end]), flags


def parse_value(text: str) -> Any:
    """The value of a setting: JSON, or Python's True, False and None, or else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # JSON requires a digit before the point.
        return float(text) if _BARE_FRACTION.fullmatch(text) else text


def check_names(flags: Mapping[str, Any]) -> None:
    """Refuse names that are not fields of `GenerationConfig`, before any model is loaded."""
    from transformers import GenerationConfig

    known = sorted(name for name in GenerationConfig().to_dict() if name[0] != "_" and name not in _NOT_SETTABLE)
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            as_prompt = f"{_READ_AS_SETTING} {_ELSEWHERE}"
            prose = isinstance(flags[name], str) and " " in flags[name]
            raise InputError.of(
                f"generation setting {name!r}",
                expected="a field of transformers' GenerationConfig",
                got=f"{name}={flags[name]}" if prose else f"{name}={flags[name]!r}",
                remedy=as_prompt if prose or not near else f"Did you mean {', '.join(near)}?",
            )


def merged_settings(defaults: GenerationConfig, flags: Mapping[str, Any]) -> GenerationConfig:
    """The model's own settings, overridden by those of the command line; `defaults` is not changed.

    Raises:
        InputError: If `GenerationConfig` refuses a value, or a sampling setting is given without sampling.
    """
    merged = copy.deepcopy(defaults)
    given = ", ".join(f"{name}={value!r}" for name, value in flags.items())
    try:
        merged.update(**flags)
        merged.validate()
    except (ValueError, TypeError) as error:
        raise InputError.of(
            "generation settings",
            expected="values that GenerationConfig accepts",
            got=given,
            remedy=f"transformers says: {error}",
        ) from error
    idle = [name for name in _OF_SAMPLING if flags.get(name) is not None]
    if idle and not merged.do_sample:
        raise InputError.of(
            "generation settings",
            expected="do_sample=true with settings of sampling",
            got=given,
            remedy=f"Greedy decoding would ignore {', '.join(idle)}. Add do_sample=true, or remove them.",
        )
    return merged


def read_prompts(
    file: str | None, *, prompts_given: bool, settings: Sequence[str] = (), option: str = "--file"
) -> list[str]:
    """Read prompts, one per line, from a file; `-` is stdin, and so is None if no prompt was given.

    Args:
        file: The file.
        prompts_given: Whether prompts were given as arguments.
        settings: The arguments that were read as settings, for the message where there is no prompt.
        option: The option that named the file.

    Raises:
        InputError: If there is no prompt at all, the file cannot be read or is not UTF-8, or a line of a `.jsonl` file
            is not an object with a `"prompt"`.
    """
    taken = f", and {', '.join(map(repr, settings))} read as settings" if settings and file is None else ""
    elsewhere = f" {_ELSEWHERE}" if taken else ""
    if file is None:
        if prompts_given:
            return []
        if terminal.is_terminal(sys.stdin):
            raise InputError.of(
                "prompts",
                expected="at least one",
                got=f"none{taken}",
                remedy=f"Give them as arguments, with --file, or on stdin.{elsewhere}",
            )
        file = "-"
    name = "stdin" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError.of(
            f"prompts from {name}",
            expected="text in UTF-8",
            got=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            remedy="Convert it, e.g. with iconv.",
        ) from error
    except OSError as error:
        raise InputError.of(
            option,
            expected="a file of prompts that can be read",
            got=f"{file}: {(error.strerror or str(error)).lower()}",
            remedy="Correct the path, or its permissions.",
        ) from error
    if not text:
        raise InputError.of(
            f"prompts from {name}",
            expected="at least one line",
            got=f"nothing{taken}",
            remedy=f"Write one prompt per line.{elsewhere}",
        )
    lines = text.removesuffix("\n").split("\n")  # splitlines() would also break at U+2028 and others
    as_json = file.endswith(".jsonl")
    return [_prompt_of_line(line, f"{name}, line {number}", as_json) for number, line in enumerate(lines, 1)]


def refuse_empty(prompts: Sequence[str]) -> None:
    """Refuse empty or blank prompts, of which most tokenizers make no token."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError.of(
                f"prompt {number}", expected="some text", got=repr(prompt), remedy="Remove it, or give it some text."
            )


def _prompt_of_line(line: str, where: str, as_json: bool) -> str:
    if not as_json:
        return line
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError.of(where, expected="a JSON object", got=str(error), remedy="Correct the line.") from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        raise InputError.of(
            where, expected='an object with a string under "prompt"', got=line[:80], remedy="Correct the line."
        )
    return prompt
