"""Prompts with what comes after them, as token ids: what `score` and `tune` read.

A line of JSON lines has a `"prompt"` and a `"completion"`, or `"messages"` that end with the assistant's turn. A text
alone has no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from proxytune.cli.encoding import Views, check_chat, written
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
    views: Views | None = None,
) -> tuple[dict[str, list[Ids]], list[Ids]]:
    """The prompts by role, and what comes after them, as the token ids that `proxytune.models.scoring.score` takes.

    A text alone has an empty prompt. `views` says how the prompts of members that read their own are made.
    """
    from proxytune.models.scored_texts import encode_pair

    if chat:
        check_chat(tokenizer, [prompt for prompt, _ in pairs], system)
    prompts: dict[str, list[Ids]] = {role: [] for role in ("base", *(views or {}))}
    texts: list[Ids] = []
    for prompt, answer in pairs:
        if answer is None:
            if views:
                raise InputError.of(
                    prompt.where,
                    expected=f'a "prompt" and a "{COMPLETION}", since the {", ".join(views)} reads another prompt',
                    got="a text alone",
                    remedy="Give both.",
                )
            before, after = encode_pair(tokenizer, "", prompt.text)
        else:
            before, after = encode_pair(tokenizer, written(tokenizer, prompt, chat, system), answer, is_chat=chat)
        prompts["base"].append(before)
        texts.append(after)
        for role, view in (views or {}).items():
            own = written(tokenizer, prompt, chat, system, role, view)
            prompts[role].append(encode_pair(tokenizer, own, "", is_chat=chat)[0])
    return prompts, texts
