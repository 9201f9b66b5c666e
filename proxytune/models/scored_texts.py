"""Texts to be scored: checked, with the prompts of members that read their own, and put into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from proxytune.errors import InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.long_rope import is_beyond
from proxytune.models.members.member import Member
from proxytune.models.members.text_checks import check_ids
from proxytune.models.own_prompts import roles_with_prompts
from proxytune.validation import Ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompts", "Texts", "batches", "check_texts", "encode_pair"]

Prompts = Sequence[Ids | torch.Tensor] | Mapping[str, Sequence[Ids | torch.Tensor]]
"""One prompt for each text; or role → prompts, for members that read their own."""


def check_texts(
    model: Any,
    texts: Sequence[Ids | torch.Tensor],
    *,
    prompts: Prompts | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Raise what `score` would raise for these texts before it reads one."""
    Texts(model, Ensemble.of(model).members, texts, prompts, names)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, *, is_chat: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenize a prompt and the text after it: `(prompt ids, text ids)`.

    As in lm-evaluation-harness, both are tokenized together, and what goes beyond the prompt's own tokens is the text;
    spaces at the end of the prompt are the text's, since tokens begin with them. An empty prompt gives no ids.

    `is_chat` says that a chat template wrote the prompt: its end and its special tokens stay as they are, as
    `generate()` reads them.
    """
    options = {"add_special_tokens": False} if is_chat else {}

    def ids_of(part: str) -> list[int]:
        found: list[int] = tokenizer(part, **options)["input_ids"]
        return found

    if not prompt:
        return [], ids_of(text)
    read, both = ids_of(prompt if is_chat else prompt.rstrip()), ids_of(prompt + text)
    if is_chat and both[: len(read)] != read:  # the end of the prompt would be another token
        return read, ids_of(text)
    return read, both[len(read) :]


class Texts:
    """Texts that were checked, each after its prompts.

    Attributes:
        names: What errors call them.
        rows: For each text `[T]`: the base's prompt and the text.
        own: Role → the same after the prompts of a member that reads its own.
        counts: How many tokens are scored, the last of each row.
    """

    def __init__(
        self,
        model: Any,
        members: Sequence[Member],
        texts: Sequence[Ids | torch.Tensor],
        prompts: Prompts | None,
        names: Sequence[str] | None,
    ) -> None:
        _refuse_model(model, members)
        if len(texts) == 0 or isinstance(texts, str):
            raise InputError.of(
                "texts",
                expected="at least one text, as a sequence of token ids",
                got=repr(texts) if isinstance(texts, str) else f"{len(texts)} texts",
                remedy='Pass e.g. [tokenizer("some text")["input_ids"]].',
            )
        self.names = [f"text {number}" for number in range(len(texts))] if names is None else names
        given = _prompts_by_role(prompts, len(texts), roles_with_prompts(members))
        self.counts: list[int] = []
        self.rows: list[torch.Tensor] = []
        self.own: dict[str, list[torch.Tensor]] = {role: [] for role in given if role != "base"}
        for i, (name, text) in enumerate(zip(self.names, texts, strict=True)):
            after, first = _as_ids(name, text), _as_ids(f"the prompt of {name}", given["base"][i])
            if len(after) < (1 if first else 2):
                raise InputError.of(
                    name,
                    expected="at least one token after the prompt" if first else "at least two tokens without a prompt",
                    got=f"{len(after)}",
                    remedy="Leave it out; or begin a text with the BOS token, so that its first word is scored."
                    if after
                    else "Leave it out.",
                )
            self.counts.append(len(after) - (0 if first else 1))
            self.rows.append(torch.tensor((*first, *after)))
            for role, rows in self.own.items():
                before = _as_ids(f"the {role}'s prompt of {name}", given[role][i])
                if first and not before:
                    raise InputError.of(
                        f"the {role}'s prompt of {name}",
                        expected="at least one token, from which the text's first one can be predicted",
                        got="0",
                        remedy="Begin it with the BOS token, or with a line feed.",
                    )
                rows.append(torch.tensor((*before, *after)))
            for member in members:
                _check_row(name, member, self.row(member.role, i))

    def row(self, role: str, text: int) -> torch.Tensor:
        """What a member reads of a text, and the last token, `[T]`."""
        return self.own.get(role, self.rows)[text]

    def padded(self, role: str, batch: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, width]` of a batch, padded on the left."""
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.int64).unbind()
        for i, text in enumerate(batch):
            row = self.row(role, text)
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return ids, mask


def _prompts_by_role(
    prompts: Prompts | None, count: int, roles: Sequence[str]
) -> dict[str, Sequence[Ids | torch.Tensor]]:
    """Role → as many prompts as texts; the base's, and those of `roles`, which read their own."""
    if not isinstance(prompts, Mapping):
        prompts = {"base": [()] * count if prompts is None else prompts}
    given = {"base": [()] * count, **prompts}
    if given.keys() != {"base", *roles}:
        raise InputError.of(
            "prompts",
            expected=f"role → prompts, for base, {', '.join(roles)}" if roles else "the prompts that all members read",
            got=f"prompts for {', '.join(map(str, prompts))}",
            remedy="Pass a mapping with the prompts of each member that reads its own.",
        )
    for role, each in given.items():
        if len(each) != count:
            raise InputError.of(
                "prompts" if len(given) == 1 else f"prompts[{role!r}]",
                expected=f"{count} prompts, one for each text",
                got=f"{len(each)}",
                remedy="Pass () for a text without a prompt.",
            )
    return given


def _check_row(name: str, member: Member, row: torch.Tensor) -> None:
    check_ids(row, [member], name=name)
    if member.context is not None and len(row) - 1 > member.context:
        raise InputError.of(
            name,
            expected=f"at most {member.context + 1} tokens with its prompt: the {member.role} reads all but the last, "
            f"and has max_position_embeddings={member.context}",
            got=f"{len(row)}",
            remedy="Shorten it, split it, or use a member with a longer context.",
        )


def _as_ids(name: str, ids: Ids | torch.Tensor) -> tuple[int, ...]:
    return token_ids(name, ids.tolist() if isinstance(ids, torch.Tensor) else ids, empty=True)


def batches(texts: Texts, members: Sequence[Member], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the texts of each batch: the longest first, so that memory is short at once or never.

    Texts of one batch are on one side of long-rope members' switches, and of one length if a member cannot be padded.
    """
    alike = not all(_can_pad(member) for member in members)

    def kind(text: int) -> tuple[Any, ...]:
        read = [len(texts.row(m.role, text)) - 1 for m in members]
        sides = [is_beyond(m.switch, length, None) for m, length in zip(members, read, strict=True)]
        return (*sides, *(read if alike else ()))

    order = sorted(range(len(texts.rows)), key=lambda text: -len(texts.rows[text]))
    kinds = dict.fromkeys(map(kind, order))
    for one in kinds:
        same = [text for text in order if kind(text) == one]
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


def _can_pad(member: Member) -> bool:
    try:
        member.refuse_padding(torch.tensor([[0, 1], [1, 1]]))
    except UnsupportedModeError:
        return False
    return True


def _refuse_model(model: Any, members: Sequence[Member]) -> None:
    """Refuse an encoder-decoder, and a model in training mode."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError.of(
            "the model",
            expected="a decoder-only model",
            got=f"{type(model).__name__}, an encoder-decoder",
            remedy="Take the loss of model(input_ids=source, labels=target), a mean in nats.",
        )
    if training := [m.role for m in members if m.model.training]:
        raise InputError.of(
            "the model",
            expected="a model in evaluation mode, since dropout would change the scores",
            got=f"training mode of {', '.join(training)}",
            remedy="Call model.eval().",
        )
