"""A command that takes prompts: what stands after `--` is one, and options that name a file are given once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from typer.core import TyperCommand

from proxytune.errors import InputError

__all__ = ["PlainText", "PromptCommand"]

# Options whose value is not to be empty, as that of an unset variable of the shell is.
_NAMING = (
    *("--base", "--expert", "--antiexpert", "--recipe", "--save-recipe"),
    *("--file", "-f", "--texts", "--out", "--answer"),
)


class PlainText(str):
    """An argument after `--`: a prompt, whatever it looks like."""

    __slots__ = ()


class PromptCommand(TyperCommand):
    """A command whose arguments after `--` are prompts, never settings; it takes one file of prompts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a call, and mark the arguments after `--`."""
        own = args[: args.index("--")] if "--" in args else args
        for word, following in pairwise([*own, "--"]):
            option = word.removesuffix("=")
            if option in _NAMING and (option != word or following == ""):
                raise InputError.of(
                    option, expected="a name", got="''", remedy="Name it; or is a variable of the shell empty?"
                )
        for names in (("--file", "-f"), ("--texts",)):
            files = [own[i : i + 2] for i, word in enumerate(own) if word.split("=")[0] in names]
            if len(files) > 1:
                raise InputError.of(
                    names[0],
                    expected="one file",
                    got=" and ".join(words[0] if "=" in words[0] else " ".join(words) for words in files),
                    remedy=f"Put all into one, or on stdin: cat FILES | proxytune … {names[0]} -",
                )
        plain = len(args) - args.index("--") - 1 if "--" in args else 0
        rest: list[str] = super().parse_args(ctx, args)
        if plain:
            name = next(p.name for p in self.params if p.param_type_name == "argument")
            given = list(ctx.params[name])
            ctx.params[name] = given[:-plain] + [PlainText(word) for word in given[-plain:]]
        return rest
