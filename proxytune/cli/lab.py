"""`proxytune lab`: train the small family of the synthetic world, and set its figures side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# torch and transformers are imported inside the commands, so that `--help` is quick.

app = typer.Typer(help="A synthetic world with verifiers, and four small models trained on it.", no_args_is_help=True)

_HEADINGS = {"chain": "chain", "qa": "QA, new people", "countdown": "countdown"}


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the family and its checkpoints.")] = Path("lab-family"),
    seed: Annotated[int, typer.Option(help="Training seed; world and hold-out do not depend on it.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoints in the folder.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the work, one thread each.")] = 2,
    problems: Annotated[int, typer.Option(min=1, help="Problems per task at most.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
) -> None:
    """Train the four models from nothing, choose alpha on the validation split, and print the test table."""
    from transformers.utils import logging

    from proxytune.lab.family import train_family
    from proxytune.lab.report import measure_family

    logging.disable_progress_bar()
    training = train_family(out, seed=seed, resume=resume, processes=processes)
    record = measure_family(out, seed=seed, training=training, count=problems)
    if as_json:
        typer.echo(json.dumps(record))
        return
    seconds = sum(report.seconds for report in training.values())
    _print_table(record["test"], f"test split, seed {seed}, alpha {record['alpha']:g} (chosen on validation)")
    typer.echo(f"Trained in {seconds / 60:.1f} minutes. The family is in {out}.")


@app.command()
def table(
    family: Annotated[Path | None, typer.Option(help="A folder written by `lab train` [the bundled family].")] = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Where the problems come from.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="Problems per task at most.")] = 300,
    alpha: Annotated[float | None, typer.Option(help="Strength of the proxy [the recorded one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask the family held-out problems and print one row per way of answering."""
    from transformers.utils import logging

    from proxytune.lab.bundle import bundled_family, read_record
    from proxytune.lab.evaluation import family_rows, table_record
    from proxytune.lab.family import load_family

    logging.disable_progress_bar()
    folder = family or bundled_family()
    models, tokenizer = load_family(folder)
    strength = float(read_record(folder)["alpha"]) if alpha is None else alpha
    record = table_record(family_rows(models, tokenizer, strength, split=split, count=problems))
    if as_json:
        typer.echo(json.dumps({"split": split, "alpha": strength, **record}))
        return
    _print_table(record, f"{split} split, alpha {strength:g}")


def _print_table(record: dict[str, Any], title: str) -> None:
    """Print the rows, and below them the gap closed, in a terminal of any width."""
    from rich.console import Console
    from rich.table import Table

    tasks = list(record["gap_closed"])
    grid = Table(title=f"{title}; greedy; share right with 95 % interval, lenient and strict", title_justify="left")
    grid.add_column("")
    for task in tasks:
        count = record["rows"][0]["scores"][task]["lenient"]["problems"]
        grid.add_column(f"{_HEADINGS[task]}\n{count}, lenient")
        grid.add_column("strict")
    for row in record["rows"]:
        grid.add_row(
            row["name"],
            *(_cell(row["scores"][task][criterion]) for task in tasks for criterion in ("lenient", "strict")),
        )
    grid.add_section()
    gaps = [record["gap_closed"][task][criterion] for task in tasks for criterion in ("lenient", "strict")]
    grid.add_row("gap closed", *map(_gap_cell, gaps))
    Console().print(grid)


def _cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['rate']:.3f}\n[dim]{low:.2f}–{high:.2f}[/dim]"


def _gap_cell(gap: dict[str, Any]) -> str:
    if gap["closed"] is None:
        return "none to close"
    low, high = gap["interval"]
    return f"{gap['closed']:.3f}\n[dim]{low:.2f}–{high:.2f}[/dim]"
