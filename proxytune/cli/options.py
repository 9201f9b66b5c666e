"""The options that several commands share: models, prompts, output; and the panels of `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "METAVAR",
    "MODELS",
    "OUTPUT",
    "PROMPTS",
    "Alpha",
    "Antiexpert",
    "Base",
    "BaseAlone",
    "Chat",
    "Device",
    "Dtype",
    "EndTokensOption",
    "Expert",
    "Out",
    "Overwrite",
    "PromptFile",
    "RecipePath",
    "Resume",
    "System",
    "Trust",
    "Vote",
    "given",
]

Vote = Literal["majority", "weighted", "confidence", "deepconf"]
"""How an answer is chosen among samples."""

METAVAR = "PROMPT|KEY=VALUE"
MODELS, PROMPTS, OUTPUT = "Models", "Prompts", "Output"

Base = Annotated[str | None, typer.Option(help="The large model: a hub id or a folder.", rich_help_panel=MODELS)]
BaseAlone = Annotated[
    str | None,
    typer.Option(help="The large model: a hub id or a folder; works alone too.", rich_help_panel=MODELS),
]
Expert = Annotated[str | None, typer.Option(help="The small tuned model.", rich_help_panel=MODELS)]
Antiexpert = Annotated[
    str | None, typer.Option(help="The small model that the expert was tuned from.", rich_help_panel=MODELS)
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Strength of the shift (default: the recipe's, else 1.0).", rich_help_panel=MODELS),
]
RecipePath = Annotated[
    Path | None,
    typer.Option(
        help="Instead of the three: a folder that --save-recipe or model.save_pretrained wrote.", rich_help_panel=MODELS
    ),
]
EndTokensOption = Annotated[
    Literal["union", "base", "expert"] | None,
    typer.Option(
        "--end-tokens",
        help="Whose end tokens stop a text (default: the recipe's, else union: those of base and expert, which is said "
        "where they differ).",
        rich_help_panel=MODELS,
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<role>",
        help="Run the code that this member (base, expert, antiexpert or all) brings along, which you have read. It "
        "may be repeated.",
        rich_help_panel=MODELS,
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, auto, … (default: cuda if available, else cpu).", rich_help_panel=MODELS),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODELS)]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        "-f",
        help='Prompts, one per line, or .jsonl with "prompt" or "messages"; - is stdin.',
        rich_help_panel=PROMPTS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Wrap each prompt in the chat template, as a user turn.", rich_help_panel=PROMPTS),
]
System = Annotated[
    str | None,
    typer.Option(help="With --chat: a system prompt before each prompt.", rich_help_panel=PROMPTS),
]
Out = Annotated[
    Path | None, typer.Option(help="Write the JSON lines to this file, batch by batch.", rich_help_panel=OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue a stopped run that wrote to --out; repeat the same call.", rich_help_panel=OUTPUT
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.", rich_help_panel=OUTPUT)]


def given(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
