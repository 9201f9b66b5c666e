"""Settings of `generate()` on the command line, as `--max-new-tokens 64` or `max_new_tokens=64`, and their values."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from proxytune.cli import terminal
from proxytune.cli.prompt_command import PlainText
from proxytune.cli.setting_table import SETTINGS, Setting
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = [
    "ELSEWHERE",
    "SETTINGS_PANEL",
    "check_settings",
    "merged_settings",
    "parse_value",
    "resolved",
    "split_arguments",
    "with_settings",
]

ELSEWHERE = "Pass a prompt of this form with --file, on stdin, or after --."

_FLAG = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)
_BARE_FRACTION = re.compile(r"[+-]?\.\d+")
_WORDS = {"true": True, "false": False, "none": None}
_YES_NO = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}
# Objects of Python, and what would change nothing here: there is no assistant model, and no encoder.
_NOT_SETTABLE = (
    *("transformers_version", "cache_config", "compile_config", "continuous_batching_config", "is_assistant"),
    *(
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
    ),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "low_memory", "decoder_start_token_id"),
    "encoder_no_repeat_ngram_size",
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)
# Modes that transformers would load from the hub, as code.
_REMOTE = ("penalty_alpha", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids", "dola_layers")
SETTINGS_PANEL = "Settings of generate()"

# The setting that others need to have an effect; those; what is said where they are given without it.
_NEEDED = (
    (
        "do_sample",
        ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
        "do_sample=true with settings of sampling",
        "Greedy decoding would ignore {}. Add do_sample=true, or remove them.",
    ),
    (
        "num_beams",
        ("length_penalty", "early_stopping"),
        "num_beams of at least 2 with settings of beam search",
        "Without beams, {} would be ignored. Add e.g. num_beams=4, or remove them.",
    ),
    (
        "prompt_lookup_num_tokens",
        ("max_matching_ngram_size",),
        "prompt_lookup_num_tokens with settings of prompt lookup",
        "Without it, {} would be ignored. Add e.g. prompt_lookup_num_tokens=3, or remove them.",
    ),
)


def with_settings(command: Callable[..., None], **said: str) -> Callable[..., None]:
    """A command whose `arguments` also hold the settings that were given as options, as `key=value`.

    `said` is setting → what `--help` says of it for this command; empty: nothing.
    """
    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                bool | None if setting.metavar is None else str | None,
                typer.Option(
                    *_names(name, setting),
                    metavar=setting.metavar,
                    help=said.get(name, setting.help),
                    hidden=not said.get(name, setting.help),
                    rich_help_panel=SETTINGS_PANEL,
                    show_default=False,
                ),
            ],
        )
        for name, setting in SETTINGS.items()
    ]

    @wraps(command)
    def called(**given: Any) -> None:
        flags = {name: given.pop(name) for name in SETTINGS}
        options = [f"{name}={value}" for name, value in flags.items() if value is not None]
        command(**given | {"arguments": [*(given["arguments"] or []), *options]})

    called.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    called.__annotations__ = get_type_hints(command, include_extras=True) | {p.name: p.annotation for p in added}
    del called.__wrapped__  # the options would be read from there
    return called


def _names(name: str, setting: Setting) -> tuple[str, ...]:
    option = name.replace("_", "-")
    return (f"--{option}",) if setting.metavar else (f"--{option}/--no-{option}",)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate prompts from the `key=value` settings after them; a setting given twice is refused.

    Only the last arguments can be settings. A prompt that looks like one is safe before another prompt; on its own it
    has to come from a file, from stdin, or after `--`. Hyphens count as underscores where that makes a setting's name.

    Raises:
        InputError: If a setting is given twice, or a known one stands before a prompt.
    """
    end = len(arguments)
    while end and _setting_of(arguments[end - 1]):
        end -= 1
    prompts = arguments[:end]
    for number, prompt in enumerate(prompts):
        found = _setting_of(prompt)
        if found and found[0] in SETTINGS and " " not in prompt and not isinstance(prompts[-1], PlainText):
            raise InputError.of(
                f"generation setting {found[0]!r}",
                expected="the prompts before the settings",
                got=f"{prompt} before {prompts[number + 1]!r}",
                remedy=f"Move it to the end. {ELSEWHERE}",
            )
    flags: dict[str, Any] = {}
    for argument in arguments[end:]:
        key, value = _setting_of(argument) or ("", "")
        if key in flags:
            raise InputError.of(
                f"generation setting {key!r}",
                expected="one value",
                got=f"two, {flags[key]!r} and {parse_value(value)!r}",
                remedy="Remove one of them.",
            )
        flags[key] = parse_value(value)
    return list(prompts), flags


def _setting_of(argument: str) -> tuple[str, str] | None:
    """The key and the value of an argument that is read as a setting."""
    match = None if isinstance(argument, PlainText) else _FLAG.fullmatch(argument)
    if match is None:
        return None
    key = match[1].replace("-", "_")
    if "-" in match[1] and not difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.85):
        return None
    return key, match[2]


def parse_value(text: str) -> Any:
    """The value of a setting: JSON, or Python's True, False and None, or else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # JSON requires a digit before the point.
        return float(text) if _BARE_FRACTION.fullmatch(text) else text


# --- their values -----------------------------------------------------------------------------------------------------


def check_settings(flags: Mapping[str, Any], options: Sequence[str] = ()) -> dict[str, Any]:
    """Check names and values before any model is loaded; a flag may also be yes, no, on, off, 1 or 0.

    Args:
        flags: The settings.
        options: The names of the command's own options, with underscores.

    Raises:
        InputError: If a name is not a field of `GenerationConfig`, or a value is not one of its values.
    """
    checked: dict[str, Any] = {}
    for name, value in flags.items():
        setting = SETTINGS.get(name)
        if setting is None:
            _check_name(name, value, options)
            checked[name] = value
            continue
        if setting.metavar is None:
            value = _YES_NO.get(str(value).lower(), value)
        if value is not None and not setting.fits(value):
            prose = f" {ELSEWHERE}" if isinstance(value, str) and " " in value else ""
            raise InputError.of(
                f"generation setting {name!r}",
                expected=setting.expected,
                got=f"{value!r}",
                remedy=_remedy(name, value) + prose,
            )
        # transformers takes temperature=2.0, and refuses temperature=2 when it samples.
        checked[name] = float(value) if setting.metavar == "<float>" and value is not None else value
        if name == "stop_strings" and (escape := re.search(r"\\[nrt]", str(value))):
            terminal.show_note(
                f"{escape[0]!r} in stop_strings is a backslash and a letter; a line feed is written as JSON, "
                """stop_strings='["\\n"]'."""
            )
    shortest, longest = checked.get("min_new_tokens"), checked.get("max_new_tokens")
    if shortest is not None and longest is not None and shortest > longest:
        _refuse(checked, "min_new_tokens of at most max_new_tokens", "Lower the one, or raise the other.")
    if longest is not None and checked.get("max_length") is not None:
        _refuse(checked, "max_new_tokens, or max_length, which counts the prompt too", "Leave one of them out.")
    return checked


def _remedy(name: str, value: Any) -> str:
    if name == "temperature" and value == 0:
        return "For the likeliest tokens, leave it out, and pass do_sample=false."
    if name == "eos_token_id" and value == -1:
        return "For texts that stop at no token, pass eos_token_id=none."
    if name == "stop_strings" and value in ("", []):
        return "Leave it out: every text ends with an empty one."
    if name == "stop_strings":
        return f"Write it as JSON text, e.g. {name}='{json.dumps([str(value)])}'."
    return "Correct the value." if SETTINGS[name].metavar else f"Pass e.g. {name}=true."


def _check_name(name: str, value: Any, options: Sequence[str]) -> None:
    """Refuse a name that is not a field of `GenerationConfig`."""
    from transformers import GenerationConfig

    fields = [name for name in GenerationConfig().to_dict() if name[0] != "_"]
    known = sorted(set(fields).difference(_NOT_SETTABLE, _REMOTE))
    if name in known:
        return
    if name in fields:
        raise InputError.of(
            f"generation setting {name!r}",
            expected="a mode that needs no code from the hub" if name in _REMOTE else "a setting of the answers",
            got=f"{name}={value!r}",
            remedy="Leave it out.",
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    prose = isinstance(value, str) and " " in value
    if name in options and not prose:
        remedy = f"It is an option of its own: pass --{name.replace('_', '-')}, before the settings."
    elif prose or not near:
        remedy = f"Arguments of the form key=value at the end are read as settings. {ELSEWHERE}"
    else:
        remedy = f"Did you mean {', '.join(near)}?"
    raise InputError.of(
        f"generation setting {name!r}",
        expected="a field of transformers' GenerationConfig",
        got=f"{name}={value}" if prose else f"{name}={value!r}",
        remedy=remedy,
    )


def merged_settings(
    defaults: GenerationConfig, flags: Mapping[str, Any], vocabulary: int | None = None
) -> GenerationConfig:
    """The model's own settings, overridden by those of the command line; `defaults` is not changed.

    Raises:
        InputError: If `GenerationConfig` refuses a value, a setting of sampling or beams is given without them, or a
            token id is not below the size of the `vocabulary`.
    """
    merged = copy.deepcopy(defaults)
    for length, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if flags.get(length) is not None:
            setattr(merged, new, None)  # the model's own would take precedence
    draws, beams = flags.get("do_sample", merged.do_sample), flags.get("num_beams", merged.num_beams) or 1
    if not draws and (flags.get("num_return_sequences") or 1) > beams:
        expected = "do_sample=true with several num_return_sequences"
        _refuse(flags, expected, "Without draws there are no more answers than beams. Add do_sample=true.")
    try:
        merged.update(**flags)
        merged.validate()
    except (ValueError, TypeError) as error:
        _refuse(flags, "values that GenerationConfig accepts", f"transformers says: {error}", error)
    there = {"do_sample": merged.do_sample, "num_beams": (merged.num_beams or 1) > 1}
    there["prompt_lookup_num_tokens"] = merged.prompt_lookup_num_tokens is not None
    for needed, names, expected, remedy in _NEEDED:
        idle = [name for name in names if flags.get(name) is not None]
        if idle and not there[needed]:
            _refuse(flags, expected, remedy.format(", ".join(idle)))
    most = merged.max_new_tokens or (20 if merged.max_length is None else None)  # generate()'s own default
    if most is not None and (flags.get("min_new_tokens") or 0) > most:
        _refuse(flags, f"min_new_tokens of at most max_new_tokens, which is {most}", "Raise max_new_tokens.")
    if merged.token_healing and merged.bos_token_id is None:  # transformers compares with it
        _refuse(flags, "a model with a bos_token_id for token_healing", "Leave it out, or pass bos_token_id.")
    for name, value in flags.items():
        beyond = [i for i in _ids_in(name, value) if vocabulary is not None and i >= vocabulary]
        if beyond:
            _refuse(flags, f"token ids below {vocabulary}, the size of the vocabulary", f"Correct {name}.")
    return merged


def _ids_in(name: str, value: Any) -> list[int]:
    """The token ids in the value of a setting."""
    if name == "sequence_bias" and value is not None:  # pairs of ids and nats
        return [i for ids, _ in value for i in ids]
    if not name.endswith(("_token_id", "suppress_tokens", "bad_words_ids")):
        return []
    if isinstance(value, list):
        return [i for part in value for i in _ids_in(name, part)]
    return [value] if type(value) is int else []


def resolved(config: GenerationConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, as JSON values."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {name: value for name, value in settings.items() if name not in _NOT_SETTABLE}


def _refuse(flags: Mapping[str, Any], expected: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    given = ", ".join(f"{name}={value!r}" for name, value in flags.items())
    raise InputError.of("generation settings", expected=expected, got=given, remedy=remedy) from cause
