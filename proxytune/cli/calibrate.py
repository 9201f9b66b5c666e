"""`proxytune calibrate`: the entropy above which a token of this model counts as a fork, measured on its own text."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.models import check_members, load, load_plain
from proxytune.cli.options import (
    METAVAR,
    OUTPUT,
    PROMPTS,
    Alpha,
    Antiexpert,
    BaseAlone,
    Chat,
    Device,
    Dtype,
    EndTokensOption,
    Expert,
    PromptFile,
    RecipePath,
    System,
    Trust,
    given,
)
from proxytune.cli.prompts import Prompt, check_prompts, read_prompts
from proxytune.cli.settings import check_settings, split_arguments
from proxytune.errors import InputError

if TYPE_CHECKING:
    from proxytune.methods.forks.calibrate import Entropies

__all__ = ["calibrate"]


_PANEL = "Measurement"


def calibrate(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR,
            help="Prompts to continue, each in quotes; then max_new_tokens=… or temperature=…, which are options too.",
            show_default=False,
        ),
    ] = None,
    base: BaseAlone = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    file: PromptFile = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Measure these texts instead of samples; a file of the same form as --file.", rich_help_panel=PROMPTS
        ),
    ] = None,
    chat: Chat = False,
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.", rich_help_panel=PROMPTS)] = 8,
    share: Annotated[
        float,
        typer.Option(help="Share of tokens that are to be forks: 0.2 is a fifth.", rich_help_panel=_PANEL),
    ] = 0.2,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the samples; entropies are always at 1.", rich_help_panel=_PANEL)
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Samples per prompt.", rich_help_panel=_PANEL)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per sample.", rich_help_panel=_PANEL)] = 128,
    seed: Annotated[
        int, typer.Option(min=0, max=(1 << 32) - 1, help="Seed of the samples.", rich_help_panel=_PANEL)
    ] = 0,
    write: Annotated[
        bool, typer.Option("--write", help="Write the threshold into the recipe.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=OUTPUT)
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    end_tokens: EndTokensOption = None,
    trust: Trust = None,
) -> None:
    """Measure the entropies of a model's tokens, and find the threshold above which a given share of them lies.

    For example: proxytune calibrate --recipe FOLDER --chat --file prompts.txt --write

    The model continues prompts (from the arguments, --file, or stdin), or reads --texts. Entropies are those of the
    combined distribution at temperature 1 over the whole vocabulary, in nats, before any penalty or truncation.
    """
    plain = base is not None and not (expert or antiexpert or recipe)
    words, flags = split_arguments(arguments or [])
    if not plain:
        check_members(base, expert, antiexpert, recipe, words)
    flags = _check_flags(context, flags)
    max_new_tokens, temperature = (flags.get(n, context.params[n]) for n in ("max_new_tokens", "temperature"))
    _check_settings(share, temperature, alpha, end_tokens, recipe, plain=plain, write=write)
    prompts = [] if not words and file is None and texts is not None else read_prompts(file, words)
    read = [] if texts is None else read_prompts(texts, option="--texts")
    chat = check_prompts(prompts, chat=chat, system=system)
    _check_texts(context, read, samples=bool(prompts))
    terminal.quiet()

    from transformers import GenerationConfig, set_seed

    from proxytune.cli.encoding import check_chat, check_lengths, encode, own_prompt_views
    from proxytune.methods.forks.calibrate import forced_entropies, report, sampled_entropies
    from proxytune.recipe import ForkCalibration, write_fork_threshold

    if plain:
        model, tokenizer = load_plain(str(base), device, dtype, trust)
    else:
        model, tokenizer = load(
            base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat, end_tokens=end_tokens, trust=trust
        )
    if chat:
        check_chat(tokenizer, prompts, system)
    views = own_prompt_views(model, tokenizer, prompts, chat, system)
    if views and read:
        raise InputError.of(
            "--texts",
            expected="a recipe whose members all read the same text",
            got=f"one whose {', '.join(views)} reads a prompt of its own",
            remedy="Measure samples: give prompts, with --file.",
        )
    if not plain:
        asked = GenerationConfig(max_new_tokens=max_new_tokens)
        check_lengths(model, tokenizer, prompts, chat, system, views=views, config=asked)
        check_lengths(model, tokenizer, read, chat=False)
    set_seed(seed)
    found: list[Entropies] = []
    with terminal.Bar("texts") as bar:
        whole = len(prompts) + len(read)
        for first in range(0, len(prompts), batch_size):
            bar.show("sampling", first, whole)
            batch = prompts[first : first + batch_size]
            encoded = encode(tokenizer, batch, chat, system, views).to(model.device)
            found += sampled_entropies(model, encoded, temperature, samples=samples, max_new_tokens=max_new_tokens)
        if read:
            bar.show("reading", len(prompts), whole)
            steps = count(len(prompts) + 1)
            plain_texts = [text.text for text in read]
            found += forced_entropies(model, tokenizer, plain_texts, lambda _: bar.show("reading", next(steps), whole))
    summary = report(found, share)
    calibration = ForkCalibration(
        share=share,
        nats=summary["nats"],
        tokens=summary["tokens"],
        temperature=temperature if prompts else None,
        alpha=None if plain or not isinstance(model.alpha, int | float) else float(model.alpha),
    )
    written = str(write_fork_threshold(recipe, calibration)) if write and recipe is not None else None
    if as_json:
        typer.echo(json.dumps({"fork_threshold": asdict(calibration), **summary, "written": written}))
    else:
        _print(summary, share, written)


def _check_flags(context: typer.Context, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings given as `key=value`: two, which are options too."""
    checked = check_settings(flags, [parameter.name or "" for parameter in context.command.params])
    for name, value in checked.items():
        if name not in ("max_new_tokens", "temperature") or value is None:
            raise InputError.of(
                f"generation setting {name!r}",
                expected="max_new_tokens or temperature: entropies are those of the whole distribution",
                got=f"{name}={value!r}",
                remedy="Leave it out.",
            )
        if given(context, name):
            raise InputError.of(
                f"generation setting {name!r}",
                expected="one value",
                got=f"two, {context.params[name]!r} and {value!r}",
                remedy="Remove one of them.",
            )
    return checked


def _check_texts(context: typer.Context, texts: list[Prompt], *, samples: bool) -> None:
    """Refuse conversations as texts, and options of samples where there are none."""
    for text in texts:
        if text.is_chat or "system" in text.line:
            raise InputError.of(
                text.where,
                expected='a text under "prompt": texts are read as they are',
                got="a conversation",
                remedy="Write the conversation as text, in the form of the model's template.",
            )
    check_prompts(texts, chat=False)
    for name in ("samples", "temperature", "max_new_tokens", "chat", "system", "seed", "end_tokens"):
        if texts and not samples and given(context, name):
            raise InputError.of(
                f"--{name.replace('_', '-')}",
                expected="prompts with it, to draw samples from",
                got="--texts alone, which are read as they are",
                remedy="Leave it out: it would change nothing.",
            )


def _check_settings(
    share: float,
    temperature: float,
    alpha: float | None,
    end_tokens: str | None,
    recipe: Path | None,
    *,
    plain: bool,
    write: bool,
) -> None:
    """Refuse invalid settings before any model is loaded."""
    from proxytune.recipe import Recipe
    from proxytune.validation import finite, proper_share

    proper_share(share)
    finite("temperature", temperature, above=0.0)
    for option, value in (("--alpha", alpha), ("--end-tokens", end_tokens)):
        if plain and value is not None:
            raise InputError.of(
                option,
                expected="an expert and an antiexpert",
                got="--base alone",
                remedy=f"Name them, or drop {option}.",
            )
    if not write:
        return
    if recipe is None:
        raise InputError.of(
            "--write", expected="--recipe, the recipe to write into", got="none", remedy="Save one, or use --json."
        )
    own = Recipe.load(recipe).alpha
    if alpha not in (None, own):
        raise InputError.of(
            "--write",
            expected=f"the recipe's own α, {own}: a threshold belongs to its α",
            got=f"--alpha {alpha:g}",
            remedy="Drop --alpha, or change it in the recipe first.",
        )


def _print(summary: dict[str, Any], share: float, written: str | None) -> None:
    from rich import box
    from rich.table import Table

    def between(interval: list[float] | None, scale: float, digits: str) -> str:
        return "" if interval is None else " [" + ", ".join(f"{x * scale:{digits}}" for x in interval) + "]"

    table = Table("quantile", "nats", box=box.SIMPLE, pad_edge=False)
    for level, nats in summary["quantiles"].items():
        table.add_row(f"{float(level) * 100:g} %", f"{nats:.4f}")
    console = terminal.output()
    console.print(table)
    lines = [
        f"threshold  {summary['nats']:.4f}{between(summary['interval'], 1, '.4f')} nats",
        f"forks      {summary['realised_share']:.1%}{between(summary['share_interval'], 100, '.1f')} of tokens, "
        f"{share:.1%} wanted",
        f"measured   {summary['tokens']} tokens in {summary['texts']} texts; mean entropy {summary['mean']:.4f} nats",
    ]
    if written is not None:
        lines.append(f"written to {written}")
    for line in lines:
        console.print(line, soft_wrap=True)
