"""What two small models say of a few built-in texts: how far the shift moves the base, and who ends a turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from proxytune.costs.model_size import cached_values
from proxytune.errors import UnsupportedModeError
from proxytune.models.end_tokens import ends_of
from proxytune.models.members.composite_cache import empty_cache, stored
from proxytune.models.members.layer_kinds import Ability, lacking
from proxytune.models.members.member import Member

__all__ = ["QUANTISED_ROWS", "Shift", "Text", "built_in_texts", "cached", "lacks_of", "measured", "rendered"]

QUANTISED_ROWS = "its logits depend on the other rows and on later tokens of a pass (LLM.int8): use no speculation"

_ASKED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Start with 17, plus 7, minus 8. What is the result?", "17 + 7 = 24, and 24 - 8 = 16. The answer is 16."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Name three colours.", "Red, green and blue."),
)
_ENDS = 0.3
"""Mean probability of an end token after a finished answer, of a model that was tuned to chat; one of 135M has .6."""
_GOES_ON = 0.02
"""The most of a model that does not end its turns."""


@dataclass(frozen=True)
class Text:
    """A question and its answer as token ids; the answer's begin at `start`. `chat`: in the chat template."""

    ids: tuple[int, ...]
    start: int
    chat: bool


@dataclass(frozen=True)
class Shift:
    """What the members' own predictions tell, over the tokens of the built-in answers.

    Attributes:
        tokens: How many predictions were compared.
        steered: KL(steered ‖ base) in nats per token, at the α that was asked for; None without the base.
        pair: KL(expert ‖ antiexpert) in nats per token.
        changed: Share of the tokens whose most likely next token is another one than the base's; None without the base.
        turn_ends: Role → mean probability of an end token after a finished answer; empty without a chat template.
        swapped: Whether the antiexpert alone ends its turns, as a model does that was tuned to chat.
    """

    tokens: int
    steered: float | None
    pair: float
    changed: float | None
    turn_ends: Mapping[str, float]
    swapped: bool = False


def rendered(tokenizer: Any, question: str, answer: str | None = None) -> str | None:
    """A question in the chat template, up to where its answer begins, or ends; None if there is no such form."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except (TemplateError, TypeError, ValueError):
        return None
    if answer is None:
        return text
    place = text.rfind(answer)
    return None if place < 0 else text[: place + len(answer)]


def built_in_texts(tokenizer: Any, most: int, usable: int) -> list[Text]:
    """The built-in texts, at most `most` ids below `usable` of each, in the chat template if there is one."""
    texts = []
    for question, answer in _ASKED:
        whole, prompt = rendered(tokenizer, question, answer), rendered(tokenizer, question)
        chat = whole is not None and prompt is not None
        if whole is None or prompt is None:
            prompt = f"Question: {question}\nAnswer:"
            whole = f"{prompt} {answer}"
        ids, before = (tokenizer(text, add_special_tokens=not chat)["input_ids"][:most] for text in (whole, prompt))
        if ids and max(ids) < usable:
            texts.append(Text(tuple(ids), max(min(len(before), len(ids)), 1), chat and len(ids) < most))
    return texts


def measured(
    texts: Sequence[Text],
    logits: Mapping[str, Sequence[torch.Tensor]],
    weights: Sequence[float],
    ends: Collection[int],
) -> Shift | None:
    """The figures of the shift; None without expert, antiexpert or any text.

    Args:
        texts: The texts.
        logits: Role → for each text, the member's logits `[N, V]` at the answer's tokens, the last prompt token first.
        weights: The weights of expert and antiexpert; the base's is 1.
        ends: Ids that end a turn.
    """
    if not texts or not {"expert", "antiexpert"} <= logits.keys():
        return None
    width = min(rows.shape[-1] for found in logits.values() for rows in found)
    pair = steered = changed = 0.0
    tokens = 0
    turns: dict[str, list[float]] = {"expert": [], "antiexpert": []}
    known = sorted(i for i in ends if i < width)
    for number, text in enumerate(texts):
        rows = {role: found[number][:, :width].double() for role, found in logits.items()}
        tokens += len(rows["expert"])
        pair += _divergence(rows["expert"], rows["antiexpert"])
        if "base" in rows:
            moved = rows["base"] + weights[0] * rows["expert"] + weights[1] * rows["antiexpert"]
            steered += _divergence(moved, rows["base"])
            changed += float((moved.argmax(-1) != rows["base"].argmax(-1)).sum())
        if text.chat and known:
            for role, found in turns.items():
                found.append(float(rows[role][-1].softmax(-1)[known].sum()))
    whole = "base" in logits
    means = {role: sum(found) / len(found) for role, found in turns.items() if found}
    return Shift(
        tokens,
        steered / tokens if whole else None,
        pair / tokens,
        changed / tokens if whole else None,
        means,
        bool(turns["expert"]) and means["antiexpert"] > _ENDS and max(turns["expert"]) < _GOES_ON,
    )


def turn_ends(models: Sequence[Any], tokenizer: Any) -> set[int]:
    """The ids that may end a turn: the models' own, and what the chat template writes after an answer."""
    found = {i for model in models for i in ends_of(model)}
    if isinstance(end := getattr(tokenizer, "eos_token_id", None), int):
        found.add(end)
    question, answer = _ASKED[0]
    if (head := rendered(tokenizer, question, answer)) is not None:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False))[len(head) :]
        after = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        found |= set(after) & set(tokenizer.get_added_vocab().values())
    return found


def _divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sum over the rows `[N, V]` of KL(one ‖ other), of logits, in nats; where one is 0 it counts nothing."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())


def lacks_of(member: Member) -> dict[Ability, str]:
    """What a member cannot do, and why: by its layers, and by its self-test if that was made."""
    found: dict[Ability, str] = {}
    faults: dict[Ability, str | None] = {"static": member.whole_text}
    faults |= {"pad": member.verdict.padding, "move": member.verdict.moved}
    for ability, fault in faults.items():
        if strange := lacking(member.config, ability):
            found[ability] = f"{', '.join(strange)} layers"
        elif fault is not None:
            found[ability] = fault
    if "static" not in found:
        try:
            member.refuse_static_cache(0)
        except UnsupportedModeError as error:
            found["static"] = str(error).partition(" with ")[2].partition(". ")[0]
    return found


def cached(member: Member) -> float:
    """How many values the cache of a text of 1,000 tokens holds: of a pass without weights, else by the config."""
    length, dtype = min(1000, member.context or 1000), member.model.dtype
    held = 0
    member.model.to(torch.bfloat16)  # without weights, torch knows experts in no other dtype
    with suppress(Exception), torch.no_grad():
        cache = empty_cache(member.config)
        member.forward(torch.zeros(1, length, dtype=torch.long, device="meta"), cache=cache, logits_to_keep=1)
        states = [state for layer in stored(cache) for state in vars(layer).values()]
        tensors = [x for state in states for x in (state.values() if isinstance(state, dict) else [state])]
        held = sum(x.numel() for x in tensors if isinstance(x, torch.Tensor))
    member.model.to(dtype)
    return held * 1000.0 / length if held else 1000.0 * cached_values(member.config)
