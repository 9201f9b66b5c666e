"""From prompts to a batch of ids, by the chat template and the prompt views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from proxytune.cli import terminal
from proxytune.cli.prompts import Prompt
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from proxytune.formulas.prompt_view import PromptView
    from proxytune.models.model import ProxyTunedModel


__all__ = ["Views", "check_chat", "check_lengths", "encode", "own_prompt_views", "rendered_chat", "written"]


def check_chat(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], system: str | None) -> None:
    """Refuse prompts that the chat template cannot write, or of which it leaves out a system or user turn or a call.

    Raises:
        InputError: If there is no template, it fails, or what it writes has not all of these turns in it.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError.of(
            "--chat",
            expected="a tokenizer with a chat template",
            got=f"a {type(tokenizer).__name__} without one",
            remedy="No member has one. Save that which the expert was tuned with beside the expert (set "
            "tokenizer.chat_template, then tokenizer.save_pretrained(folder)), or write the prompts in its form "
            "and leave --chat away.",
        )
    for prompt in prompts:
        turns = prompt.turns(system)
        roles = ", ".join(turn["role"] for turn in turns)
        try:
            written = rendered_chat(tokenizer, turns)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError.of(
                prompt.where,
                expected="turns that the chat template takes",
                got=roles,
                remedy=f"It says: {str(error).rstrip('.')}. Change the turns, or use another template.",
            ) from error
        for turn in turns:
            said = [turn["content"]] if turn["role"] in ("system", "user") else []
            said += [call["function"]["name"] for call in turn.get("tool_calls") or ()]
            if missing := next((text for text in said if text.strip() not in written), None):
                raise InputError.of(
                    prompt.where,
                    expected="a chat template that writes all turns",
                    got=f"one that leaves out or changes that of the {turn['role']}, {missing[:60]!r}",
                    remedy="Put the text into a turn that it writes, or use another template.",
                )


Views = Mapping[str, "PromptView | None"]
"""How the prompts of members that read their own are made, by role; None if each line has to say."""


def own_prompt_views(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat: bool, system: str | None = None
) -> Views:
    """How the prompts of members that read their own are made; empty if all members read the base's.

    Raises:
        InputError: If that cannot be told of some prompt, or a line has a prompt for another member.
    """
    from proxytune.models.own_prompts import prompt_views, roles_with_prompts

    roles = roles_with_prompts(getattr(model, "members", []))
    for prompt in prompts:
        if strange := sorted(prompt.own.keys() - {*roles}):
            raise InputError.of(
                f'{prompt.where}, "prompts"',
                expected=f"prompts of members that read their own: {', '.join(roles) or 'none does'}",
                got=f"one of {strange[0]}",
                remedy="Correct the role, or remove it.",
            )
    said = bool(prompts) and all(prompt.own.keys() == {*roles} for prompt in prompts)
    try:
        views: Views = dict.fromkeys(roles) if said else prompt_views(model)
    except InputError as error:
        raise InputError.of(
            f"the {roles[0]} of {model.name_or_path}",
            expected="a prompt view, which says how its own prompt is made of the base's",
            got='"prompt": true, or none at all',
            remedy=f'Write e.g. "members": {{"{roles[0]}": {{"of": "base", "prompt": {{"drop": ["system"]}}}}}}, or '
            f'give each line its "prompts": {{"{roles[0]}": "…"}}.',
        ) from error
    for prompt in prompts:
        for role, view in views.items():
            written(tokenizer, prompt, chat, system, role, view)  # it may refuse
    return views


def written(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chat: bool,
    system: str | None = None,
    role: str = "base",
    view: PromptView | None = None,
) -> str:
    """A prompt as the text that a member reads: the base, or one that reads its own, by its view or by the line.

    Raises:
        InputError: If the view cannot be applied.
    """
    template = None if view is None else view.template
    if role in prompt.own:
        prompt, system, view = prompt.own[role], None, None
    try:
        if chat:
            turns = prompt.turns(system)
            return rendered_chat(tokenizer, turns if view is None else view.of_messages(turns), template)
        return prompt.text if view is None else view.of_text(prompt.text)
    except InputError as error:
        raise InputError(f"{prompt.where}, for the {role}: {error}") from None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None = None,
    views: Views | None = None,
) -> Any:
    """Tokenize a batch, padded on the left; with `chat`, each prompt as the turns of the chat template.

    For members that read prompts of their own it has `prompts` as well, as `generate()` takes them.
    """
    batch = _ids(tokenizer, prompts, chat, system, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    if views:
        batch["prompts"] = {
            role: _ids(tokenizer, prompts, chat, system, role, view, return_tensors="pt", padding=True)
            for role, view in views.items()
        }
    return batch


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None,
    role: str = "base",
    view: PromptView | None = None,
    **options: Any,
) -> Any:
    texts = [written(tokenizer, prompt, chat, system, role, view) for prompt in prompts]
    # The template has written the special tokens already.
    return tokenizer(texts, add_special_tokens=not chat, **options)


def check_lengths(
    model: ProxyTunedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool,
    system: str | None = None,
    *,
    views: Views | None = None,
    config: GenerationConfig | None = None,
    budget: int | None = None,
) -> None:
    """Refuse prompts without room for an answer, one of which would stop a run in the middle.

    Those that leave less room than `config` asks for are noted; those that take all of a `budget` are let through.

    Raises:
        InputError: If a prompt is longer than a member's context, or not shorter than the `max_length` of `config`.
    """
    context: int | None = getattr(model.config, "max_position_embeddings", None)
    new, longest = (None, None) if config is None else (config.max_new_tokens, config.max_length)
    limits = [] if context is None else [(context, f"at most {context} tokens, the members' context")]
    if new is None and longest is not None:
        limits.append((longest - 1, f"fewer than {longest} tokens, max_length, which counts the prompt too"))
    if not (limits and prompts):
        return
    room, expected = min(limits)
    whose = [("base", None), *(views or {}).items()]
    ids = [_ids(tokenizer, prompts, chat, system, role, view)["input_ids"] for role, view in whose]
    lengths = [(max(map(len, each)), prompt.where) for *each, prompt in zip(*ids, prompts, strict=True)]
    lengths = [(length, where) for length, where in lengths if budget is None or length < budget]
    if long := [(length, where) for length, where in lengths if length > room]:
        raise InputError.of(
            long[0][1],
            expected=expected,
            got=f"{long[0][0]}" + (f"; also too long: {_listed([where for _, where in long[1:]])}" if long[1:] else ""),
            remedy="Shorten or remove what is too long.",
        )
    if context is None or new is None:
        return
    if tight := [where for length, where in lengths if length + min(new, (budget or math.inf) - length) - 1 > context]:
        terminal.show_note(
            f"{_listed(tight)}: fewer than max_new_tokens={new} tokens are left of the members' context of {context}, "
            "and a text that does not end before would stop the run."
        )


def _listed(places: Sequence[str], most: int = 3) -> str:
    more = len(places) - most
    return "; ".join(places[:most]) + (f" and {more} more" if more > 0 else "")


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]], template: str | None = None
) -> str:
    """A conversation as a chat template writes it (the tokenizer's, unless given), up to where the answer begins."""
    more = {} if template is None else {"chat_template": template}
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **more))
