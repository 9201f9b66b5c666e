"""The validation items of `proxytune tune`: read, kept apart from test data, and, where the model writes, judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.cli.answered import encode_answered, split_answers
from proxytune.cli.encoding import encode
from proxytune.cli.gold import plain
from proxytune.cli.prompts import COMPLETION, Prompt, read_prompts
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.cli.sample_run import Extract
    from proxytune.search.tuning_record import Item

__all__ = ["Judge", "flat", "is_written", "items_of", "named_file", "read_items", "refuse_other_kinds"]

_ANSWERS = (COMPLETION, "choices", "answer")


def named_file(file: Path) -> dict[str, str]:
    """A file's name and SHA-256, as a recipe keeps them."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def read_items(file: Path, test: Sequence[Path], recipe: Path | None) -> tuple[list[Prompt], list[dict[str, str]]]:
    """The validation items, and the test files with their hashes; refuses items that are test items.

    Raises:
        InputError: If the recipe names the file as a test file, or an item's prompt is in a test file.
    """
    from proxytune.recipe import Recipe

    if str(file) == "-" or file.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError.of(
            "--file", expected="a file of JSON lines, .jsonl", got=str(file), remedy="Write the items into one."
        )
    prompts = read_prompts(str(file), answers=_ANSWERS)
    own = named_file(file)
    known = [] if recipe is None else (Recipe.load(recipe).evidence or {}).get("test", [])
    if same := next((one for one in known if one["sha256"] == own["sha256"]), None):
        raise InputError.of(
            "--file",
            expected="validation items",
            got=f"{file}, which the recipe names as test data ({same['file']})",
            remedy="Tune on other items: what is chosen on test data cannot be measured on it.",
        )
    asked = {_asked(prompt): prompt for prompt in prompts}
    for path in test:
        for prompt in read_prompts(str(path), answers=_ANSWERS, option="--test"):
            if (there := asked.get(_asked(prompt))) is not None:
                raise InputError.of(
                    "--file",
                    expected=f"no item that is in --test {path}",
                    got=f"{there.where}, which is also {prompt.where}",
                    remedy="Remove it from one of them: what is chosen on test data cannot be measured on it.",
                )
    return prompts, [named_file(path) for path in test]


def _asked(prompt: Prompt) -> str:
    """What an item asks, in which spaces and capitals make no difference."""
    turns = prompt.turns(None)
    while len(turns) > 1 and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return json.dumps([(turn["role"], " ".join(str(turn["content"]).split()).lower()) for turn in turns])


def flat(prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, str | None]], list[range]]:
    """Each choice, completion or wanted answer after its prompt; and which of them are of each item."""
    pairs: list[tuple[Prompt, str | None]] = []
    spans = []
    for prompt in prompts:
        if is_written(prompt):
            own: list[tuple[Prompt, str | None]] = [(prompt, _wanted(prompt))]
        elif "choices" in prompt.line or "answer" in prompt.line:
            own = [(prompt, choice) for choice in _choices(prompt)]
        else:
            own = list(split_answers([prompt]))
            if own[0][1] is None:
                raise InputError.of(
                    prompt.where,
                    expected=f'a right "{COMPLETION}", "choices" and the right "answer", or an "answer" alone',
                    got="a prompt alone",
                    remedy="Say what is right.",
                )
        spans.append(range(len(pairs), len(pairs) + len(own)))
        pairs += own
    return pairs, spans


def _choices(prompt: Prompt) -> list[str]:
    choices, answer = prompt.line.get("choices"), prompt.line.get("answer")
    texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    if not texts or COMPLETION in prompt.line or _number_of(answer, choices) is None:
        raise InputError.of(
            prompt.where,
            expected='at least two texts under "choices", and the right one or its number, from 0, under "answer"',
            got=f"choices={_cut(choices)}, answer={_cut(answer)}",
            remedy="Correct the line.",
        )
    return list(choices)  # type: ignore[arg-type]


def _number_of(answer: Any, choices: Any) -> int | None:
    """Which of the choices is right."""
    if type(answer) is int:
        return answer if 0 <= answer < len(choices) else None
    return choices.index(answer) if answer in choices else None


def _cut(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def items_of(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Prompt, str | None]],
    spans: Sequence[range],
    *,
    chat: bool,
    system: str | None,
    views: Mapping[str, Any],
) -> list[Item]:
    """The items as token ids; `views` says how the prompts are made of members that read their own."""
    from proxytune.search.tuning_record import Item

    before, texts = encode_answered(tokenizer, pairs, chat=chat, system=system, views=views)
    items = []
    for prompt, span in zip(prompts, spans, strict=True):
        choices = [texts[i] for i in span]
        own = {role: each[span[0]] for role, each in before.items()}
        right = _number_of(prompt.line["answer"], prompt.line["choices"]) if len(span) > 1 else 0
        items.append(Item(own, choices, right or 0, prompt.where))
    return items


# --- answers that the model writes ------------------------------------------------------------------------------------


def is_written(prompt: Prompt) -> bool:
    """Whether an item has only an answer, which the model has to write."""
    return "answer" in prompt.line and "choices" not in prompt.line and COMPLETION not in prompt.line


def _wanted(prompt: Prompt) -> str:
    answer = prompt.line["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise InputError.of(
            prompt.where,
            expected='a text or a number under "answer"',
            got=_cut(answer),
            remedy="Correct the line.",
        )
    return str(answer)


def refuse_other_kinds(prompts: Sequence[Prompt], views: Mapping[str, Any]) -> None:
    """Raise InputError if not all answers are the model's to write, or a member reads a prompt of its own."""
    other = next((prompt for prompt in prompts if not is_written(prompt)), None)
    if other is not None:
        raise InputError.of(
            other.where,
            expected=f'an "answer" alone, as in {next(filter(is_written, prompts)).where}',
            got="another kind of item",
            remedy="Put the two kinds into files of their own.",
        )
    if views:
        raise InputError.of(
            "items",
            expected=f'a "{COMPLETION}" or "choices" for a recipe with members that read their own prompts',
            got=f"answers to write, and {', '.join(views)}",
            remedy="Write down right completions.",
        )


@dataclass(frozen=True)
class Judge:
    """Whether the model's greedy answers are right: `proxytune.search.tuning_record.Judge`."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    extract: Extract
    batch_size: int
    max_new_tokens: int
    chat: bool
    system: str | None

    def __call__(self, model: Any, items: Sequence[int]) -> list[bool]:
        """Ask the items with these numbers, the longest first."""
        right: dict[int, bool] = {}
        order = sorted(items, key=lambda i: -len(self.prompts[i].text))
        for first in range(0, len(order), self.batch_size):
            numbers = order[first : first + self.batch_size]
            for number, text, cut in zip(numbers, *self._write(model, numbers), strict=True):
                found, wanted = self.extract(text, cut=cut), _wanted(self.prompts[number])
                right[number] = found is not None and plain(found) == plain(wanted)
        return [right[i] for i in items]

    def _write(self, model: Any, numbers: Sequence[int]) -> tuple[list[str], list[bool]]:
        """The answers to some prompts, and whether each was cut off."""
        batch = encode(self.tokenizer, [self.prompts[i] for i in numbers], self.chat, self.system).to(model.base.device)
        ids = model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        new = ids[:, batch["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in new]
        return texts, [ends.isdisjoint(row) for row in new]
