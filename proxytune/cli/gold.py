"""The right answers of `proxytune report --gold`, and the grades that they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.cli.prompts import read_prompts
from proxytune.errors import InputError

if TYPE_CHECKING:
    from proxytune.trace import TracedText

__all__ = ["Grader", "plain", "read_gold"]


def read_gold(file: Path) -> dict[str, str]:
    """Prompt → its right answer, both plain.

    Raises:
        InputError: If a line has no prompt or no answer, or a prompt has two answers.
    """
    found: dict[str, str] = {}
    for prompt in read_prompts(str(file), answers=("answer",), option="--gold"):
        answer = prompt.line.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise InputError.of(
                prompt.where,
                expected='a "prompt", and a text or a number under "answer"',
                got=repr(answer),
                remedy="Correct the line.",
            )
        key, wanted = plain(prompt.text), plain(str(answer))
        if found.setdefault(key, wanted) != wanted:
            raise InputError.of(
                prompt.where,
                expected="one right answer of a prompt",
                got=f"{wanted!r}, and {found[key]!r} before",
                remedy="Remove one of the lines.",
            )
    return found


class Grader:
    """Grades texts of a run by the answers to their prompts."""

    def __init__(self, right: Mapping[str, str], run: str) -> None:
        self._right, self._run, self._known = right, run, dict[str, str]()

    def __call__(self, text: TracedText) -> float:
        """1 for the right answer, else 0.

        Raises:
            InputError: If the gold answers do not have its prompt.
        """
        return float(text.answer is not None and plain(text.answer) == self._wanted(text))

    def _wanted(self, text: TracedText) -> str:
        """The right answer: of its own prompt, or of the longest one that stands in it, as in a chat template."""
        asked = plain(text.prompt or "")
        if asked not in self._known:
            inside = [prompt for prompt in self._right if prompt in asked] if asked else []
            if not inside:
                raise InputError.of(
                    "--gold",
                    expected="an answer to each prompt of the runs",
                    got=f"none to {text.prompt!r} of {self._run}"
                    if asked
                    else f"a text without a prompt in {self._run}",
                    remedy="Add its line; the prompts of a run are recorded where a tokenizer is at hand.",
                )
            self._known[asked] = self._right[max(inside, key=len)]
        return self._known[asked]


def plain(text: str) -> str:
    """A text in which spaces and capitals make no difference."""
    return " ".join(text.split()).lower()
