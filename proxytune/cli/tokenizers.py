"""The tokenizer of a run, and the chat template that it may borrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxytune.cli import terminal
from proxytune.errors import InputError, MemberError, MemberNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.recipe import MemberRef
from proxytune.cli.encoding import rendered_chat

__all__ = ["borrow_template", "load_tokenizer"]


def borrow_template(
    tokenizer: PreTrainedTokenizerBase, lenders: Sequence[tuple[str, MemberRef]], trusted: Sequence[str]
) -> None:
    """Give a tokenizer without a chat template that of the first member that has one."""
    from proxytune.models.member_tokenizers import find_tokenizer

    if tokenizer.chat_template is not None:
        return
    for role, reference in lenders:
        lender = find_tokenizer(reference, trust_remote_code=role in trusted)
        if lender is None or lender.chat_template is None:
            continue
        template = str(lender.get_chat_template())
        # The template means its own special tokens, also where those of the base have other roles.
        names = {name: str(token) for name, token in lender.special_tokens_map.items() if name in template}
        _refuse_missing_tokens(tokenizer, lender, role)
        tokenizer.chat_template = (
            "".join(f"{{%- set {name} = {token!r} -%}}" for name, token in names.items()) + template
        )
        terminal.show_note(f"--chat: the base's tokenizer has no chat template; the {role}'s is used.")
        return


def _refuse_missing_tokens(tokenizer: PreTrainedTokenizerBase, lender: PreTrainedTokenizerBase, role: str) -> None:
    """Refuse a template that writes special tokens which the other tokenizer would take apart."""
    rendered = rendered_chat(lender, [{"role": "user", "content": "x"}])
    missing = [
        token
        for token, number in sorted(lender.get_added_vocab().items())
        if token in rendered and tokenizer(token, add_special_tokens=False)["input_ids"] != [number]
    ]
    if missing:
        raise InputError.of(
            "--chat",
            expected=f"a base whose tokenizer has the special tokens of the {role}'s chat template",
            got=f"one without {', '.join(missing)}",
            remedy="Use a base of the same family, add these tokens to its tokenizer, or write the prompts in a form "
            "that both know and leave --chat away.",
        )


def load_tokenizer(references: Sequence[MemberRef], trusted: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left, from the first reference; `MemberError` if there is none to be had.

    It may run code of its own if the base is `trusted`.
    """
    from proxytune.models.checkpoints import tokenizer_code
    from proxytune.models.member_tokenizers import find_tokenizer

    reference = references[0]
    tokenizer: PreTrainedTokenizerBase | None = find_tokenizer(reference, trust_remote_code="base" in trusted)
    if tokenizer is None:
        if "base" not in trusted and (code := tokenizer_code(reference)):
            raise MemberError.of(
                "the base's tokenizer",
                expected="a tokenizer whose class is transformers' own",
                got=f"{reference.id!r}, which would run {code} of its own",
                remedy="Read that file first. If you trust it, pass --trust base.",
            )
        raise MemberNotFoundError.of(
            "the base's tokenizer",
            expected="tokenizer files beside the base",
            got=f"none that opens at {reference.id!r}",
            remedy="Save it there with tokenizer.save_pretrained(folder).",
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
