"""Answer counts as a JSON file.

```json
{"format_version": 1, "prompts": [{"prompt": "What is 2 + 2?", "answers": [["4", 12], [null, 3]]}]}
```

A prompt is a text or a list of token ids. An answer is a text, a number, true, false, null (no answer), or a list of
those, which stands for a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.errors import InputError
from proxytune.json_files import check_form, exchange, read, refuse_unknown
from proxytune.search.keyed_noise import PromptKey, prompt_key
from proxytune.validation import whole

__all__ = ["FORMAT_VERSION", "read_counts", "write_counts"]

FORMAT_VERSION = 1
_WHAT = "answer history"
_KEYS = ("prompt", "answers")

Counts = Mapping[PromptKey, Mapping[Hashable | None, int]]


def write_counts(file: Path, counts: Counts) -> Path:
    """Write counts (prompt → answer → N) atomically; `InputError` if that fails, or an answer has no JSON form."""
    prompts = [
        {"prompt": prompt, "answers": [[_to_json(answer), n] for answer, n in answers.items()]}
        for prompt, answers in counts.items()
    ]
    return exchange(file, {"format_version": FORMAT_VERSION, "prompts": prompts}, _WHAT)


def read_counts(file: Path) -> dict[PromptKey, dict[Hashable | None, int]]:
    """Read counts (prompt → answer → N, at least 1) strictly; errors as in `AnswerHistory.load`."""
    found = read(file, _WHAT, remedy="Give the file that AnswerHistory.save() wrote.")
    data = check_form(
        found,
        _WHAT,
        version=FORMAT_VERSION,
        keys=("format_version", "prompts"),
        see="proxytune.search.answer_history_file",
    )
    prompts = data["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(p, dict) and set(_KEYS) <= set(p) for p in prompts):
        raise _refusal("key 'prompts'", f"objects with {' and '.join(_KEYS)}", prompts)
    out: dict[PromptKey, dict[Hashable | None, int]] = {}
    for entry in prompts:
        prompt = entry["prompt"]
        where = f"of the prompt {str(prompt)[:40]!r}"
        refuse_unknown(entry, _KEYS, f"{_WHAT} {where}")
        if not isinstance(prompt, str):
            if not isinstance(prompt, list):
                raise _refusal("prompt", "a text or a list of token ids", prompt)
            prompt = prompt_key(prompt)
        if prompt in out:
            raise _refusal("prompts", "each prompt once", f"{str(prompt)[:40]!r} twice")
        out[prompt] = _counts(entry["answers"], where)
    return out


def _counts(answers: Any, where: str) -> dict[Hashable | None, int]:
    if not isinstance(answers, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in answers):
        raise _refusal(f"answers {where}", "pairs of an answer and its count", answers)
    out: dict[Hashable | None, int] = {}
    for found, count in answers:
        answer = _from_json(found, where)
        if answer in out:
            raise _refusal(f"answers {where}", "each answer once", f"{answer!r} twice")
        out[answer] = whole(f"{_WHAT}: count of {answer!r} {where}", count, "of texts", least=1)
    return out


def _to_json(answer: Any) -> Any:
    if isinstance(answer, np.integer | np.bool_):
        answer = answer.item()
    if isinstance(answer, tuple):
        return [_to_json(part) for part in answer]
    if answer is None or isinstance(answer, str | int) or (isinstance(answer, float) and math.isfinite(answer)):
        return answer
    raise InputError.of(
        f"{_WHAT}: an answer",
        expected="a text, a finite number, None, or a tuple of those",
        got=f"{answer!r} of type {type(answer).__name__}",
        remedy="Record what it says as a text instead.",
    )


def _from_json(value: Any, where: str) -> Hashable | None:
    if isinstance(value, list):
        return tuple(_from_json(part, where) for part in value)
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise _refusal(f"answers {where}", "texts, finite numbers, true, false, null, or lists of those", value)
    return value


def _refusal(what: str, expected: str, got: Any) -> Exception:
    return InputError.of(
        f"{_WHAT}: {what}",
        expected=expected,
        got=got if isinstance(got, str) else repr(got)[:80],
        remedy="See proxytune.search.answer_history_file for the form.",
    )
