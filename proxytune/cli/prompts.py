"""What `proxytune generate` is given: prompts from arguments, files or stdin, and `key=value` generation settings."""

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
_NOT_SETTABLE = ("transformers_version",)
# What does nothing without sampling.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Tell prompts from the `key=value` settings after them.

    Only the last arguments can be settings, so a prompt that looks like one is safe before another prompt; alone it
    belongs into a file or stdin.

    Args:
        arguments: Everything on the command line that is no option.

    Returns:
        The prompts, and the parsed settings.

    Raises:
        InputError: If a setting is given twice.
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
    """Read the value of a setting: JSON, or Python's True, False and None, or else the text itself.

    Args:
        text: What stands after `=`.

    Returns:
        A number, a boolean, None, a list, a dictionary or a string.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # JSON wants a digit before the point, people do not.
        return float(text) if _BARE_FRACTION.fullmatch(text) else text


def check_names(flags: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist, before any model is loaded.

    Args:
        flags: Settings by name.

    Raises:
        InputError: If a name is no field of `GenerationConfig`.
    """
    from transformers import GenerationConfig

    known = sorted(name for name in GenerationConfig().to_dict() if name[0] != "_" and name not in _NOT_SETTABLE)
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise InputError.of(
                f"generation setting {name!r}",
                expected="a field of transformers' GenerationConfig",
                got=f"{name}={flags[name]!r}",
                remedy=f"Did you mean {', '.join(near)}?"
                if near
                else "A prompt of this form belongs into --file or stdin.",
            )


def merged_settings(defaults: GenerationConfig, flags: Mapping[str, Any]) -> GenerationConfig:
    """The settings of a run: the model's own, and those of the command line over them.

    Args:
        defaults: The model's; not changed.
        flags: Settings by name.

    Returns:
        The settings.

    Raises:
        InputError: If `GenerationConfig` refuses a value, or a setting of sampling is given where nothing is sampled.
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


def read_prompts(file: str | None, *, prompts_given: bool) -> list[str]:
    """Read prompts from a file or stdin.

    Args:
        file: The file; `-` is stdin; None reads stdin if no prompt was given and stdin is no terminal.
        prompts_given: Whether the command line has prompts already.

    Returns:
        The prompts, one per line.

    Raises:
        InputError: If there is no prompt at all, or a line is empty or no object with a `"prompt"`.
    """
    if file is None:
        if prompts_given:
            return []
        if terminal.is_terminal(sys.stdin):
            raise InputError.of(
                "prompts",
                expected="at least one",
                got="none",
                remedy="Give them as arguments, with --file, or on stdin.",
            )
        file = "-"
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    name = "stdin" if file == "-" else file
    if not text:
        raise InputError.of(
            f"prompts from {name}", expected="at least one line", got="nothing", remedy="Write one prompt per line."
        )
    lines = text.removesuffix("\n").split("\n")  # not splitlines(), which also breaks at U+2028 and its like
    as_json = file.endswith(".jsonl")
    return [_prompt_of_line(line, f"{name}, line {number}", as_json) for number, line in enumerate(lines, 1)]


def refuse_empty(prompts: Sequence[str]) -> None:
    """Refuse prompts without text: most tokenizers make no token of them, and the rest would complete nothing at all.

    Args:
        prompts: All prompts.

    Raises:
        InputError: If one of them is empty or blank.
    """
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
