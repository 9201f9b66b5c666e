"""Prompts with what comes after them, as token ids: what `score` and `tune` read.

A line of JSON lines has a `"prompt"` and a `"completion"`, or `"messages"` that end with the assistant's turn. A text
alone has no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxytune.cli.models import check_chat, rendered_chat
from proxytune.cli.prompts import COMPLETION, Prompt, check_prompts
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.validation import Ids

__all__ = ["check_answered", "encode_answered", "split_answers"]


def split_answers(prompts: Sequence[Prompt]) -> list[tuple[Prompt, str | None]]:
    """Each prompt without what comes after it, and that: None for a text without a prompt.

    Raises:
        InputError: If some have it and others do not, or it is empty or no text.
    """
    pairs = [_split(prompt) for prompt in prompts]
    for (_, first), (prompt, answer) in zip([pairs[0]] * len(pairs), pairs, strict=True):
        if (answer is None) != (first is None):
            raise InputError.of(
                prompt.where,
                expected="lines of one kind",
                got=f"{_kind(answer)}, unlike {prompts[0].where}",
                remedy=f'Give each line a "{COMPLETION}", or none.',
            )
    return pairs


def _kind(answer: str | None) -> str:
    return f"a line without a {COMPLETION!r}" if answer is None else f"one with a {COMPLETION!r}"


def _split(prompt: Prompt) -> tuple[Prompt, str | None]:
    if COMPLETION in prompt.line:
        answer = prompt.line[COMPLETION]
    elif prompt.is_chat:
        last = prompt.line["messages"][-1]
        if last["role"] != "assistant":
            raise InputError.of(
                prompt.where,
                expected="a conversation that ends with the assistant's turn, the text to score",
                got=f"one that ends with the {last['role']}'s",
                remedy=f'Add that turn, or a "{COMPLETION}".',
            )
        answer = prompt.turns(None)[-1]["content"]
        prompt = replace(prompt, line={**prompt.line, "messages": prompt.line["messages"][:-1]})
    else:
        return prompt, None
    if not isinstance(answer, str) or not answer:
        raise InputError.of(
            prompt.where,
            expected=f'a text under "{COMPLETION}", or as the last turn',
            got=repr(answer),
            remedy="Correct the line.",
        )
    return prompt, answer


def check_answered(pairs: Sequence[tuple[Prompt, str | None]], *, chat: bool, system: str | None) -> bool:
    """Refuse prompts as `check_prompts` does, and texts without a prompt in a chat. Returns whether it is a chat."""
    chat = check_prompts([prompt for prompt, _ in pairs], chat=chat, system=system)
    for prompt, answer in pairs:
        if chat and answer is None:
            raise InputError.of(
                "--chat",
                expected=f'lines with a "{COMPLETION}", which is scored as the answer to the prompt',
                got=f"{prompt.where} without one",
                remedy="Write JSON lines with both, or drop --chat.",
            )
    return chat


def encode_answered(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str | None]],
    *,
    chat: bool,
    system: str | None,
) -> list[tuple[Ids, Ids]]:
    """Each pair as `(prompt ids, ids of the text after it)`; no prompt ids for a text without one."""
    from proxytune.models.scoring import encode_pair

    if chat:
        check_chat(tokenizer, [prompt for prompt, _ in pairs], system)
    options: dict[str, Any] = {"add_special_tokens": False} if chat else {}  # the template has written them
    encoded = []
    for prompt, answer in pairs:
        if answer is None:
            encoded.append(encode_pair(tokenizer, "", prompt.text))
        else:
            before = rendered_chat(tokenizer, prompt.turns(system)) if chat else prompt.text
            encoded.append(encode_pair(tokenizer, before, answer, **options))
    return encoded
