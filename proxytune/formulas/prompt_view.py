"""How a member's own prompt is made from a conversation or a text, for pipelines and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxytune.errors import InputError
from proxytune.validation import shown

__all__ = ["Conversation", "PromptView"]

Conversation = Sequence[Mapping[str, Any]]
"""Chat messages, each with a role and a content."""


@dataclass(frozen=True, kw_only=True)
class PromptView:
    """What a member reads in place of the base's prompt.

    Changes are made in the order of the attributes, each if it is given.

    Attributes:
        drop: Messages with these roles are left out, e.g. `("system",)`.
        without: Everything from the first marker to the second is left out of every text, with the markers, e.g.
            `("<context>", "</context>")`: the context of context-aware decoding.
        system: The system message, in place of the conversation's own.
        text: The whole prompt, in place of the conversation's last message: a negative prompt.
        template: A chat template (Jinja) in place of the tokenizer's own.
    """

    drop: tuple[str, ...] = ()
    without: tuple[str, str] | None = None
    system: str | None = None
    text: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        expected = {
            "drop": "roles, such as ('system',)",
            "without": "two markers, neither of them empty",
            "system": "a text",
            "text": "a text that is not empty",
            "template": "a chat template",
        }
        for name, what in expected.items():
            value = getattr(self, name)
            if name == "drop" or (name == "without" and value is not None):
                right = isinstance(value, list | tuple) and all(map(_is_text, value))
                right = right and (name == "drop" or len(value) == 2)
                if right:
                    object.__setattr__(self, name, tuple(value))
            else:
                right = value is None or _is_text(value) or (name == "system" and value == "")
            if not right:
                raise InputError.of(
                    f"PromptView({name}=)",
                    expected=what,
                    got=shown(value, 80),
                    remedy="Pass e.g. PromptView(without=('<context>', '</context>')).",
                )
        if not self.to_json():
            raise InputError.of(
                "PromptView",
                expected=f"one of {', '.join(expected)}",
                got="none, so that the member would read what the base reads",
                remedy="Pass e.g. PromptView(without=('<context>', '</context>')).",
            )

    def of_text(self, text: str) -> str:
        """The member's prompt for a prompt that is a plain text.

        Raises:
            InputError: If it changes messages alone, or a marker of `without` opens and does not close.
        """
        if self.text is None and self.without is None:
            raise InputError.of(
                "a prompt",
                expected=f"messages, which are what {self!r} changes",
                got=f"a text, {shown(text, 80)}",
                remedy="Pass messages, or give the PromptView a text= or without=.",
            )
        return self._shortened(text) if self.text is None else self.text

    def of_messages(self, messages: Conversation) -> list[dict[str, Any]]:
        """The member's conversation for a conversation.

        Raises:
            InputError: If no message is left, or a marker of `without` opens and does not close.
        """
        kept = [dict(m) for m in messages if m.get("role") not in self.drop]
        if self.system is not None:
            kept = [m for m in kept if m.get("role") != "system"]
            kept.insert(0, {"role": "system", "content": self.system})
        for message in kept:
            if isinstance(message.get("content"), str):
                message["content"] = self._shortened(message["content"])
        if self.text is not None and kept:
            kept[-1] = {**kept[-1], "content": self.text}
        if not kept:
            raise InputError.of(
                "a PromptView",
                expected="a conversation of which some message is left",
                got=f"roles {', '.join(str(m.get('role')) for m in messages)}, of which drop={self.drop} leaves none",
                remedy="Give it a text=, or keep the user's message.",
            )
        return kept

    def _shortened(self, text: str) -> str:
        if self.without is None:
            return text
        start, end = self.without
        while (opened := text.find(start)) >= 0:
            closed = text.find(end, opened + len(start))
            if closed < 0:
                raise InputError.of(
                    "a prompt",
                    expected=f"{end!r} after {start!r}, between which is what another member must not read",
                    got=shown(text[opened:], 80),
                    remedy="Close it, or change `without` of the PromptView.",
                )
            text = text[:opened] + text[closed + len(end) :]
        return text

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None and v != ()}

    @classmethod
    def from_json(cls, value: Any) -> PromptView:
        """Read what `to_json` gives; InputError if it has another form."""
        known = tuple(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or not value.keys() <= set(known):
            raise InputError.of(
                "a PromptView",
                expected=f"an object with keys out of {', '.join(known)}",
                got=shown(value, 80),
                remedy='Write e.g. {"without": ["<context>", "</context>"]}.',
            )
        return cls(**value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
