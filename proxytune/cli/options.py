"""The options that several commands share: models, prompts, device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Alpha", "Antiexpert", "Base", "Chat", "Device", "Dtype", "Expert", "PromptFile", "RecipePath"]

Base = Annotated[str | None, typer.Option(help="The large model: a hub id or a folder.")]
Expert = Annotated[str | None, typer.Option(help="The small tuned model.")]
Antiexpert = Annotated[str | None, typer.Option(help="The small model that the expert was tuned from.")]
Alpha = Annotated[float | None, typer.Option(help="Strength of the shift (default: the recipe's, else 1.0).")]
RecipePath = Annotated[Path | None, typer.Option(help="A folder or proxytune_config.json that names the three models.")]
PromptFile = Annotated[
    str | None, typer.Option("--file", "-f", help='Prompts, one per line, or .jsonl with "prompt"; - is stdin.')
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the chat template, as a user turn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, auto, … (default: cuda if available, else cpu).")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
