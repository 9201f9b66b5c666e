"""Prompts from arguments, files or stdin: text, or JSON lines with a prompt or a conversation.

A line of JSON lines is an object with one of

- `"prompt"`: a text;
- `"messages"`: a conversation, `[{"role": "user", "content": "…"}, …]`, whose last turn is the user's, or a tool's. It
  is always written in the chat template. A content may be a list of text parts, and null beside `"tool_calls"`;

and, if it likes, `"system"`, a system prompt of its own, `"prompts"`, what members that read a prompt of their own read
(role → a text or a conversation), and other keys, such as `"id"`, which are repeated in the output. Keys that the
output has itself, misspelt ones and settings are refused.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from proxytune.cli import terminal
from proxytune.cli.prompt_command import PlainText
from proxytune.cli.setting_table import SETTINGS
from proxytune.cli.settings import ELSEWHERE
from proxytune.errors import InputError

__all__ = ["COMPLETION", "Prompt", "check_prompts", "read_prompts"]

COMPLETION = "completion"
"""The key of what comes after a prompt."""

_KEYS = ("prompt", "messages", "system")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_JSON_LINES = (".jsonl", ".ndjson")
# Read line by line, their prompts would be wrong without a word.
_OTHER_FORMS = (".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx", ".docx", ".pdf", ".gz")
_OTHER_NAMES = {
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat"),
    "system": ("system_prompt", "system_message"),
}
_OTHER_PROMPTS = ("text", "question", "instruction", "input", "query", "content", "problem")
_SETTINGS = (*SETTINGS, "alpha", "seed", "max_tokens", "tools")
_DASH = re.compile(r"[–—−]{1,2}[a-z][a-z-]*")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        line: What its line says, or just `{"prompt": …}`: what the output repeats.
        where: Where it stands, for messages: "prompt 1" of the arguments, or a line of a file.
    """

    line: Mapping[str, Any]
    where: str = field(default="the prompt", compare=False)

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation, which has no form without a chat template."""
        return "messages" in self.line

    @property
    def text(self) -> str:
        """The prompt, or the last turn of its conversation."""
        return str(self.turns(None)[-1]["content"])

    def turns(self, system: str | None) -> list[dict[str, Any]]:
        """The prompt as a conversation, with the line's own system prompt, else the one given."""
        turns = self.line["messages"] if self.is_chat else [{"role": "user", "content": self.line["prompt"]}]
        turns = list(map(_for_templates, turns))
        system = self.line.get("system", system)
        if system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return turns

    @property
    def own(self) -> dict[str, Prompt]:
        """The prompts that the line has for members that read their own, by role."""
        return {
            role: Prompt(
                {"prompt" if isinstance(said, str) else "messages": said}, f"{self.where}, the {role}'s prompt"
            )
            for role, said in self.line.get("prompts", {}).items()
        }


def read_prompts(
    file: str | None,
    given: Sequence[str] = (),
    *,
    settings: Sequence[str] = (),
    option: str = "--file",
    reserved: Sequence[str] = (),
    answers: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts given as arguments, and those of a file; `-` is stdin, and so is None if no prompt was given.

    Args:
        file: The file.
        given: The prompts that were given as arguments.
        settings: The arguments that were read as settings, for the message where there is no prompt.
        option: The option that named the file.
        reserved: The keys of the output, which a line must not have.
        answers: The keys of what comes after a prompt, for a command that reads it too. A conversation without one of
            them may end with the assistant's turn.

    Raises:
        InputError: If there is no prompt at all, the file cannot be read or is not UTF-8, or a line of JSON lines is
            not of the form that the module describes.
    """
    _look_at(given)
    prompts = [Prompt({"prompt": str(prompt)}, f"prompt {number}") for number, prompt in enumerate(given, 1)]
    taken = f", and {', '.join(map(repr, settings))} read as settings" if settings and file is None else ""
    elsewhere = f" {ELSEWHERE}" if taken else ""
    if file is None:
        if given:
            return prompts
        if terminal.is_terminal(sys.stdin):
            raise InputError.of(
                "prompts",
                expected="at least one",
                got=f"none{taken}",
                remedy=f"Give them as arguments, with --file, or on stdin.{elsewhere}",
            )
        file = "-"
    name = "stdin" if file == "-" else file
    text = _text_of(file, name, option)
    if not text:
        raise InputError.of(
            f"prompts from {name}",
            expected="at least one line",
            got=f"nothing{taken}",
            remedy=f"Write one prompt per line.{elsewhere}",
        )
    lines = text.removesuffix("\n").split("\n")  # splitlines() would also break at U+2028 and others
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    as_json = Path(file).suffix.lower() in _JSON_LINES
    if not as_json and (found := _object_in(lines[0])):
        as_json = not {"prompt", "messages"}.isdisjoint(found)
        read = 'the "prompt" or "messages" of each line is read.'
        terminal.show_note(
            f"{name} holds JSON lines: " + (read if as_json else 'without "prompt", they are read as text.')
        )
    if not as_json:
        return prompts + [Prompt({"prompt": line}, f"{name}, line {number}") for number, line in enumerate(lines, 1)]
    wheres = (f"{name}, line {number}" for number in range(1, len(lines) + 1))
    return prompts + [_prompt_of(line, where, reserved, answers) for line, where in zip(lines, wheres, strict=True)]


def check_prompts(prompts: Sequence[Prompt], *, chat: bool, system: str | None = None) -> bool:
    """Refuse prompts that are empty, and system prompts without a chat template. Returns whether that is needed.

    Raises:
        InputError: If a prompt is empty or blank, of which most tokenizers make no token, or is not text; if a system
            prompt is given twice, or without `chat`; if some prompts only are conversations, without `chat`.
    """
    every = chat or any(prompt.is_chat for prompt in prompts)
    for prompt in prompts:
        for theirs in prompt.own.values():
            if not theirs.text.strip():
                _refuse(theirs, "some text", repr(theirs.text), "Remove it, or give it some text.")
            if theirs.is_chat and not every:
                _refuse(theirs, "--chat with a conversation", "one without it", "Add --chat, or write a text.")
        own = prompt.line.get("system", system)
        first = prompt.turns(None)[0]
        if not prompt.text.strip():
            _refuse(prompt, "some text", repr(prompt.text), "Remove it, or give it some text.")
        if re.search("[\ud800-\udfff]", json.dumps(prompt.line, ensure_ascii=False)):
            remedy = "Write it in UTF-8; in JSON, the two \\u… of such a character stand together."
            _refuse(prompt, "text", f"{prompt.text!r}, with half of a character", remedy)
        if prompt.is_chat != prompts[0].is_chat and not chat:
            kinds = "a prompt" if prompts[0].is_chat else "a conversation"
            remedy = "Pass --chat, which makes each prompt a user turn; or run the two kinds apart."
            _refuse(prompt, "lines of one kind", f"{kinds}, unlike {prompts[0].where}", remedy)
        if own is not None and not (chat or prompt.is_chat):
            remedy = "Add --chat, or write the text before the prompt."
            _refuse(prompt, "--chat with a system prompt, a turn of the chat template", f"{own!r} without it", remedy)
        if system is not None and first["role"] == "system":
            _refuse(prompt, "one system prompt", f"--system {system!r} and {first!r}", "Remove one of them.")
    return every


def _refuse(prompt: Prompt, expected: str, got: str, remedy: str) -> NoReturn:
    raise InputError.of(prompt.where, expected=expected, got=got, remedy=remedy)


def _look_at(given: Sequence[str]) -> None:
    """Refuse an option with a typographic dash, and note what is likely to be no prompt, or a part of one."""
    for prompt in given:
        if isinstance(prompt, PlainText):
            continue
        if _DASH.fullmatch(prompt):
            raise InputError.of(
                f"option {prompt!r}",
                expected="two hyphens, --",
                got=f"U+{ord(prompt[0]):04X}, a dash, so that it would be a prompt",
                remedy=f"Type the hyphens. {ELSEWHERE}",
            )
        word = re.split(r"[:=]", prompt, maxsplit=1)[0].replace("-", "_")
        if word in (*SETTINGS, "alpha", "seed"):
            option = f"--{word.replace('_', '-')}"
            terminal.show_note(f"{prompt!r} is taken as a prompt; for the setting, pass {option} VALUE.")
        elif prompt.lower() in ("yes", "no", "true", "false", "on", "off"):
            terminal.show_note(f"{prompt!r} is taken as a prompt; a switch has no value: --do-sample, --no-do-sample.")
        elif "\n" not in prompt and len(prompt) < 256 and Path(prompt).is_file():
            terminal.show_note(f"{prompt!r} is taken as a prompt; for the prompts in that file, pass --file {prompt}.")
        elif re.fullmatch(r"\S+", prompt) and Path(prompt).suffix.lower() in (".txt", *_JSON_LINES, *_OTHER_FORMS):
            terminal.show_note(f"{prompt!r} is taken as a prompt; there is no file of that name.")
    one = all(re.fullmatch(r"\S+", prompt) and not isinstance(prompt, PlainText) for prompt in given)
    if one and sum(len(word) > 1 for word in given) > 1 and not any(word[-1] in ".?!" for word in given[:-1]):
        terminal.show_note(
            f"{len(given)} prompts of one word each; a text of several words is quoted: {' '.join(given)!r}"
        )


def _text_of(file: str, name: str, option: str) -> str:
    """The whole text of a file, or of stdin."""
    if Path(file).suffix.lower() in _OTHER_FORMS:
        raise InputError.of(
            option,
            expected="a file of lines: text with a prompt each, or .jsonl, JSON lines",
            got=file,
            remedy='Write a line {"prompt": "…"} for each prompt into a file that ends in .jsonl.',
        )
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        content = error.object
        line = content.count(b"\n", 0, error.start) + 1
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        source = "UTF-16" if wide else "ISO-8859-1"
        raise InputError.of(
            f"prompts from {name}",
            expected="text in UTF-8",
            got=f"byte {content[error.start]:#04x} at offset {error.start}, in line {line}",
            remedy=f"Convert it, e.g. with iconv -f {source} -t UTF-8"
            + ("." if file == "-" else f" {file} > {Path(file).stem}.utf8{Path(file).suffix}"),
        ) from error
    except OSError as error:
        raise InputError.of(
            option,
            expected="a file of prompts that can be read",
            got=f"{file}: {(error.strerror or str(error)).lower()}",
            remedy="Correct the path, or its permissions.",
        ) from error
    return text.removeprefix("\ufeff")  # which some editors put before UTF-8


def _object_in(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _prompt_of(line: str, where: str, reserved: Sequence[str], answers: Sequence[str]) -> Prompt:
    def refuse(expected: str, got: str, remedy: str) -> InputError:
        error = InputError.of(where, expected=expected, got=got, remedy=remedy)
        assert isinstance(error, InputError)
        return error

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise refuse("each key once", f"{twice!r} twice", "Remove one of them.")
        return dict(pairs)

    def number(word: str) -> None:
        raise refuse("JSON", f"{word}, which is no number there", "Write null, or a text.")

    try:
        found = json.loads(line, object_pairs_hook=once, parse_constant=number)
    except (json.JSONDecodeError, RecursionError) as error:
        got = _cut(line) if line.strip() else "an empty line"
        what = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
        raise refuse("a JSON object", f"{got} ({what})", "Correct the line, or remove it.") from None
    if not isinstance(found, dict):
        raise refuse('an object with a string under "prompt"', _cut(line), 'Write {"prompt": "…"}.')
    answered = not found.keys().isdisjoint(answers)
    missing = [*(_KEYS if {"prompt", "messages"}.isdisjoint(found) else ("system",)), *(() if answered else answers)]
    for key in found:
        near = next((known for known in missing if _means(key, known)), None)
        if near is not None:
            raise refuse(f'the key "{near}"', f'"{key}"', f'Rename it to "{near}"; to carry it along, to another name.')
        if key in reserved:
            raise refuse(
                f'no "{key}", which is a key of the output',
                _cut(line),
                f'Rename it, e.g. to "own_{key}"; other keys are repeated in the output.',
            )
        if key in _SETTINGS:
            raise refuse(
                "settings that hold for all prompts",
                f'"{key}" in one line',
                f'Pass it as an option; to carry it along, rename it, e.g. to "own_{key}".',
            )
    if ("prompt" in found) == ("messages" in found):
        other = next((f'"{name}"' for name in _OTHER_PROMPTS if name in found), "the text's key")
        if "prompt" in found:
            raise refuse('"prompt" or "messages"', "both", "Remove one of them.")
        raise refuse(
            'an object with a string under "prompt", or with "messages"',
            _cut(line),
            f'Rename {other} to "prompt".',
        )
    for key in ("prompt", "system"):
        if key in found and not isinstance(found[key], str):
            chat = ' A conversation stands under "messages".' if isinstance(found[key], list) else ""
            raise refuse(f'a string under "{key}"', _cut(json.dumps(found[key])), f"Correct the line.{chat}")
    if "messages" in found:
        _check_messages(found["messages"], refuse, may_end=bool(answers) and not answered)
        if "system" in found and found["messages"][0]["role"] == "system":
            raise refuse("one system prompt", 'a "system" and a system turn', "Remove one of them.")
    if "prompts" in found:
        own = found["prompts"]
        if not isinstance(own, dict) or not all(isinstance(said, str | list) for said in own.values()):
            raise refuse(
                'under "prompts", role → a text or turns, of members that read a prompt of their own',
                _cut(json.dumps(own, ensure_ascii=False)),
                'Write e.g. "prompts": {"no_context": "…"}; to carry something else along, rename the key.',
            )
        for said in own.values():
            if isinstance(said, list):
                _check_messages(said, refuse, may_end=False)
    return Prompt(found, where)


def _check_messages(messages: Any, refuse: Any, *, may_end: bool) -> None:
    form = '[{"role": "user", "content": "…"}]'
    if not isinstance(messages, list) or not messages:
        raise refuse(f'turns under "messages", {form}', _cut(json.dumps(messages)), "Correct the line.")
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not _has_content(turn):
            sharegpt = (
                ' ("from" is "role" here, "value" is "content".)' if isinstance(turn, dict) and "from" in turn else ""
            )
            raise refuse(
                f"turns of the form {form}, with the roles {', '.join(_ROLES)}",
                _cut(json.dumps(turn, ensure_ascii=False)),
                f"Correct the turn.{sharegpt}",
            )
    if may_end and messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise refuse("a user's turn before the assistant's", "the assistant's alone", "Add it.")
        messages = messages[:-1]
    if messages[-1]["role"] not in ("user", "tool"):
        raise refuse(
            "a conversation that ends with the user's turn",
            f"one that ends with {_cut(json.dumps(messages[-1], ensure_ascii=False))}",
            "Remove that turn: the answer is what the model writes.",
        )


def _has_content(turn: Mapping[str, Any]) -> bool:
    """Whether a turn says something: text, text parts, or calls of functions."""
    content, calls = turn.get("content"), turn.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(one, dict) and _function(one).get("name") for one in calls):
        return False
    if isinstance(content, list):
        return bool(content) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content)
    return isinstance(content, str) or (content is None and bool(calls) and turn["role"] == "assistant")


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    found = call.get("function")
    return found if isinstance(found, dict) else {}


def _for_templates(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with its text parts as one text, and the arguments of its calls as objects instead of JSON."""
    if isinstance(turn.get("content"), list):
        turn = turn | {"content": "\n".join(part["text"] for part in turn["content"])}
    if not turn.get("tool_calls"):
        return turn
    functions = [_function(call) for call in turn["tool_calls"]]
    for i, function in enumerate(functions):
        with suppress(KeyError, TypeError, ValueError):
            functions[i] = function | {"arguments": json.loads(function["arguments"])}
    calls = [call | {"function": function} for call, function in zip(turn["tool_calls"], functions, strict=True)]
    return {"content": None} | turn | {"tool_calls": calls}


def _means(key: str, known: str) -> bool:
    """Whether a key is likely to be a misspelt one, or another name of it."""
    if key == known:
        return False
    lower = key.lower()
    return lower in _OTHER_NAMES.get(known, ()) or bool(difflib.get_close_matches(lower, [known], n=1, cutoff=0.82))


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
