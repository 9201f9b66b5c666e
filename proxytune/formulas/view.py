"""One model in two roles: with another prompt, or with another state of its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from proxytune.errors import InputError
from proxytune.formulas.prompt_view import PromptView

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """A member that is another member's model once more; the weights are held once.

    `View(prompt=True)` is the base with a prompt of its own, which `generate(prompts={role: …})` gives.
    `View("expert", adapter=False)` is the expert without its adapters.

    Attributes:
        of: The role whose model it is.
        prompt: Whether it reads a prompt of its own; a `PromptView` says how to make it from chat messages or a text,
            for pipelines and the command line.
        adapter: The state of a PEFT model's adapters: None as in the role that it is a view of, False for all off, or
            an adapter's name.
    """

    of: str = "base"
    prompt: bool | PromptView = False
    adapter: str | Literal[False] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.of, str) or not self.of:
            raise _refusal("of", "the name of a role, such as 'base'", self.of)
        if not isinstance(self.prompt, bool | PromptView):
            raise _refusal("prompt", "True, False or a PromptView", self.prompt)
        if self.adapter is not None and self.adapter is not False and not isinstance(self.adapter, str):
            raise _refusal("adapter", "an adapter's name, False for none, or None", self.adapter)

    @property
    def own_prompt(self) -> bool:
        """Whether it reads a prompt of its own."""
        return self.prompt is not False

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        prompt = self.prompt.to_json() if isinstance(self.prompt, PromptView) else self.prompt
        return {
            "of": self.of,
            **({} if prompt is False else {"prompt": prompt}),
            **({} if self.adapter is None else {"adapter": self.adapter}),
        }

    @classmethod
    def from_json(cls, value: Any) -> View:
        """Read what `to_json` gives; InputError if it has another form."""
        prompt = value.get("prompt", False)
        return cls(
            value["of"], prompt if isinstance(prompt, bool) else PromptView.from_json(prompt), value.get("adapter")
        )


def _refusal(name: str, expected: str, got: Any) -> InputError:
    got = repr(got).partition("\n")[0]  # a model prints all its layers
    error = InputError.of(f"View({name}=)", expected=expected, got=got, remedy="Pass e.g. View('base', prompt=True).")
    assert isinstance(error, InputError)
    return error
