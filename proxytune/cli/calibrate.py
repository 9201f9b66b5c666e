"""`proxytune calibrate`: the entropy above which a token of this model counts as a fork, measured on its own text."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.models import DTYPES, check_device, check_members, encode, load, load_tokenizer
from proxytune.cli.options import Alpha, Antiexpert, Chat, Device, Dtype, Expert, PromptFile, RecipePath
from proxytune.cli.prompts import read_prompts, refuse_empty
from proxytune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.methods.forks.calibrate import Entropies

__all__ = ["calibrate"]


def calibrate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to continue.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="The large model: a hub id or a folder; works alone too.")] = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    file: PromptFile = None,
    texts: Annotated[
        str | None, typer.Option(help="Measure these texts instead of samples; a file of the same form as --file.")
    ] = None,
    chat: Chat = False,
    share: Annotated[float, typer.Option(help="Target share of tokens that count as forks.")] = 0.2,
    temperature: Annotated[float, typer.Option(help="Temperature of the samples; entropies are always at 1.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per sample.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Write the threshold into the recipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure the entropies of a model's tokens, and find the threshold above which a given share of them lies.

    The model continues prompts (from the arguments, --file, or stdin), or reads --texts. Entropies are those of the
    combined distribution at temperature 1 over the whole vocabulary, in nats, before any penalty or truncation.
    """
    plain = base is not None and not (expert or antiexpert or recipe)
    if not plain:
        check_members(base, expert, antiexpert, recipe)
    _check_settings(share, temperature, alpha, recipe, plain=plain, write=write)
    given = list(prompts or [])
    if file is not None or texts is None:
        given += read_prompts(file, prompts_given=bool(given))
    read = [] if texts is None else read_prompts(texts, prompts_given=False, option="--texts")
    refuse_empty(given)
    refuse_empty(read)
    terminal.quiet()

    from transformers import set_seed

    from proxytune.methods.forks.calibrate import forced_entropies, report, sampled_entropies
    from proxytune.recipe import ForkCalibration, write_fork_threshold

    if plain:
        model, tokenizer = _load_plain(str(base), device, dtype)
    else:
        model, tokenizer = load(base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat)
    set_seed(seed)
    found: list[Entropies] = []
    with terminal.Bar("texts") as bar:
        whole = len(given) + len(read)
        for first in range(0, len(given), batch_size):
            bar.show("sampling", first, whole)
            batch = given[first : first + batch_size]
            encoded = encode(tokenizer, batch, chat).to(model.device)
            found += sampled_entropies(model, encoded, temperature, samples=samples, max_new_tokens=max_new_tokens)
        if read:
            bar.show("reading", len(given), whole)
            steps = count(len(given) + 1)
            found += forced_entropies(model, tokenizer, read, lambda _: bar.show("reading", next(steps), whole))
    summary = report(found, share)
    calibration = ForkCalibration(
        share=share,
        nats=summary["nats"],
        tokens=summary["tokens"],
        temperature=temperature if given else None,
        alpha=None if plain else float(model.alpha),
    )
    written = str(write_fork_threshold(recipe, calibration)) if write and recipe is not None else None
    if as_json:
        typer.echo(json.dumps({"fork_threshold": asdict(calibration), **summary, "written": written}))
    else:
        _print(summary, share, written)


def _check_settings(
    share: float, temperature: float, alpha: float | None, recipe: Path | None, *, plain: bool, write: bool
) -> None:
    """Refuse invalid settings before any model is loaded."""
    from proxytune.recipe import Recipe
    from proxytune.validation import finite, proper_share

    proper_share(share)
    finite("temperature", temperature, above=0.0)
    if plain and alpha is not None:
        raise InputError.of(
            "--alpha", expected="an expert and an antiexpert", got="--base alone", remedy="Name them, or drop --alpha."
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
            expected=f"the recipe's own α, {own:g}: a threshold belongs to its α",
            got=f"--alpha {alpha:g}",
            remedy="Drop --alpha, or change it in the recipe first.",
        )


def _load_plain(base: str, device: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model without companions, and its tokenizer."""
    import torch

    from proxytune.models.loading import open_members
    from proxytune.recipe import MemberRef
    from proxytune.validation import choice

    choice("--dtype", dtype, DTYPES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    with terminal.Bar("models"):
        models, _ = open_members({"base": base}, check_vocabulary=False, dtype=dtype, device_map=device)
    return models["base"].eval(), load_tokenizer([MemberRef(base)])


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
