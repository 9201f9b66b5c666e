"""`proxytune bench`: the cost of steering on this machine, compared with a tuned model of the base's size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["bench"]

TABLE_WIDTH = 80
BAR = 46
HEADINGS = ("", "tokens\n/s", "first\nms", "ms per\ntoken", "× tuned\n[95 %]", "bytes\nalone", "accep-\nted")


def bench(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the bars into this file (.png, .svg, .pdf).")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Longer texts and more rounds: most of an hour, not five to ten minutes.")
    ] = False,
    alpha: Annotated[
        float | None, typer.Option(help="Strength of the shift in the family (default: the recorded one).")
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The folder of your own family, see benches/README.md in the repository (default: the bundled one).",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Measure what a token costs on this CPU: base, tuned model, every steering method, and their byte floors."""
    if plot is not None:
        from proxytune.cli.plot_file import refuse_plot

        refuse_plot(plot)  # before the minutes that it would be about
    terminal.quiet()
    import torch

    from proxytune.throughput.run import cpu_plans, measure

    torch.set_num_threads(threads)
    with terminal.Bar("rounds", still=True) as bar:  # nothing may run beside what is timed
        record = measure(cpu_plans("full" if full else "quick", family, alpha), report=bar.show)
    if plot is not None:
        draw(record, plot)
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
        return
    show(record)


def show(record: Mapping[str, Any]) -> None:
    """Print the tables, bars and verdicts of what `proxytune.throughput.run.measure` returned."""
    from proxytune.throughput.report import NAMES, cheapest, drafts, verdicts

    wide = terminal.output()
    wide.width = max(wide.width, TABLE_WIDTH)  # a narrow terminal wraps the lines; cut columns would show wrong numbers
    console = terminal.output()
    for family in record["families"]:
        tables = [
            _methods(family),
            _bars(family),
            _counts(family),
            _protocol(family, "over_tuned", "time per token, tuned = 1"),
            _protocol(family, "over_members", "whole generation, the members' own passes = 1"),
            *([_drafts(family)] if drafts(family) else []),
        ]
        for table in tables:
            wide.print(table, crop=False)
            console.print()
        if drafts(family):
            best = family["drafting"]["best"]
            console.print(f"- best of these draft lengths: {best['predicted']} predicted, {best['measured']} measured")
        for text in verdicts(family):
            console.print(f"- {text}")
        console.print()
    of = record["machine"]
    console.print(
        "× tuned: time per token after the first, divided by the tuned model's in the same round. Bytes alone: the "
        "same ratio of the bytes read (│ in the bars). Planted: random weights, made so that expert and composition "
        "agree at this rate."
    )
    console.print(f"{NAMES}.")
    console.print(
        f"{of['processor']}, {of['cores']} cores (load at the start: {of['load']}), threads: {of['threads']}, "
        f"torch {of['torch']}, transformers {of['transformers']}. Took {record['seconds']:.0f} s."
    )
    console.print()
    for family in record["families"]:
        console.print(f"- {cheapest(family)}")


def _methods(family: Mapping[str, Any]) -> Table:
    """The first cell of the protocol."""
    from proxytune.throughput.report import cell_name, lines

    cell = family["cells"][0]
    table = _table(f"{family['name']}, {family['dtype']}: {cell_name(cell)}")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for line in lines(cell):
        table.add_row(*line)
    return table


def _bars(family: Mapping[str, Any]) -> Table:
    """The first cell's times per token as bars."""
    from proxytune.throughput.report import bar

    ran = {name: found for name, found in family["cells"][0]["methods"].items() if found["status"] == "run"}
    most = max(found["over_tuned"]["value"] for found in ran.values())
    table = _table("time per token, tuned = 1; │ bytes alone")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, found in ran.items():
        value = found["over_tuned"]["value"]
        table.add_row(name, bar(value, found["floor_over_tuned"], most, BAR), f"{value:.2f}")
    return table


def _counts(family: Mapping[str, Any]) -> Table:
    """Passes and bytes in the first cell."""
    from proxytune.throughput.report import COUNTED, counted

    table = _table("passes of base, expert, antiexpert; megabytes per token")
    for i, heading in enumerate(COUNTED):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for line in counted(family["cells"][0]):
        table.add_row(*line)
    return table


def _protocol(family: Mapping[str, Any], key: str, title: str) -> Table:
    """One ratio in all cells of the protocol."""
    from proxytune.throughput.report import cell_name

    cells = family["cells"]
    table = _table(title)
    table.add_column("", no_wrap=True)
    for cell in cells:
        table.add_column(cell_name(cell).replace(", ", "\n"), justify="right", no_wrap=True)
    for name, first in cells[0]["methods"].items():
        if key == "over_members" and first.get("kind") == "alone":
            continue
        found = [cell["methods"].get(name, {}) for cell in cells]
        if any(key in one for one in found):
            table.add_row(name, *(f"{one[key]['value']:.2f}" if key in one else "" for one in found))
    return table


def _drafts(family: Mapping[str, Any]) -> Table:
    from proxytune.throughput.report import DRAFTS, drafts

    table = _table("cost model, predicted · measured")
    for heading in DRAFTS:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in drafts(family):
        table.add_row(*line)
    return table


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)


# --- the plot --------------------------------------------------------------------------------------------------------


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the first line of the protocol of each family: time per token beside the tuned model's, with byte floors.

    Args:
        record: What `proxytune.throughput.run.measure` returned.
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    # A figure of its own instead of pyplot: no display is asked for, and none of its state is changed.
    from matplotlib.figure import Figure

    from proxytune.throughput.report import cell_name

    families = record["families"]
    figure = Figure(figsize=(8, 0.9 + 3.0 * len(families)), layout="constrained")
    for axes, family in zip(figure.subplots(len(families), 1, squeeze=False)[:, 0], families, strict=True):
        cell = family["cells"][0]
        ran = {name: found for name, found in cell["methods"].items() if found["status"] == "run"}
        ratios = [found["over_tuned"] for found in ran.values()]
        values = [ratio["value"] for ratio in ratios]
        errors = [
            [ratio["value"] - ratio["low"] for ratio in ratios],
            [ratio["high"] - ratio["value"] for ratio in ratios],
        ]
        places = range(len(ran))
        axes.barh(places, values, xerr=errors, color="#4c78a8", ecolor="#555555", label="measured, 95 % interval")
        floors = [found["floor_over_tuned"] for found in ran.values()]
        axes.plot(floors, places, "|", color="#e45756", markersize=14, markeredgewidth=2, label="bytes alone")
        axes.axvline(1.0, color="#999999", linewidth=0.8)
        axes.set_yticks(places, list(ran))
        axes.invert_yaxis()
        axes.set_title(f"{family['name']}: {cell_name(cell)}", loc="left", fontsize=10)
        axes.set_xlabel("time per token, tuned model = 1")
    figure.axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path)
