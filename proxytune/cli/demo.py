"""`proxytune demo`: the bundled family answers held-out problems; base, proxy and directly tuned model compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.demo.measure import measure

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


__all__ = ["demo"]

HEADINGS = {"chain": "chain\narithmetic", "qa": "QA about\nnew people", "countdown": "\nCountdown"}
TABLE_WIDTH = 80


def demo(
    problems: Annotated[int, typer.Option(min=1, help="Most problems per task.")] = 150,
    alpha: Annotated[float | None, typer.Option(help="Strength of the shift (default: the recorded one).")] = None,
    family: Annotated[
        Path | None, typer.Option(help="A folder written by `python -m lab train` (default: the bundled family).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Steer a small bundled family on the CPU: accuracy with 95 % intervals, speed, and three answers side by side."""
    terminal.quiet()
    import torch

    from proxytune.demo.bundle import bundled_family, read_record

    # Models this small gain nothing from a second thread, and lose a lot where the cores are busy.
    torch.set_num_threads(1)
    folder = family or bundled_family()
    strength = float(read_record(folder)["alpha"]) if alpha is None else alpha
    with terminal.errors().status("loading") as status:
        record = measure(folder, strength, problems, status.update)
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    console = terminal.output()
    wide = terminal.output()
    wide.width = max(wide.width, TABLE_WIDTH)  # a narrow terminal wraps the lines; cut columns would show wrong numbers
    wide.print(_table(record), crop=False)
    console.print("\n".join(_notes(record)))
    for answer in record["answers"]:
        console.print()
        for text in _side_by_side(answer):
            console.print(text)


def _table(record: dict[str, Any]) -> Table:
    """The table, within 80 columns: two lines per row, strict above lenient."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tasks = list(record["gap_closed"])
    totals = " + ".join(str(record["rows"][0]["scores"][task]["strict"]["problems"]) for task in tasks)
    table = Table(
        title=f"% right [95 % interval] on {totals} held-out problems",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("", ""):
        table.add_column(heading, no_wrap=True)
    for task in tasks:
        table.add_column(HEADINGS[task], justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for row in record["rows"]:
        scores = [row["scores"][task] for task in tasks]
        table.add_row(
            row["name"],
            "strict\nlenient",
            *(
                "\n".join(_percent(of["rate"], of["interval"]) for of in (score["strict"], score["lenient"]))
                for score in scores
            ),
            f"{row['tokens_per_second']:,}",
            end_section=row is record["rows"][-1],
        )
    gaps = [record["gap_closed"][task] for task in tasks]
    table.add_row(
        "gap closed, %",
        "strict\nlenient",
        *("\n".join(_percent(of["closed"], of["interval"]) for of in (gap["strict"], gap["lenient"])) for gap in gaps),
        "",
    )
    return table


def _percent(rate: float | None, interval: Sequence[float] | None) -> str:
    if rate is None or interval is None:
        return "no gap"
    return f"{100 * rate:.0f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _notes(record: dict[str, Any]) -> list[str]:
    return [
        "strict: exactly the taught form; lenient: the right content in any form. Gap: from base, 0-shot, to tuned; "
        "no gap: tuning gained nothing measurable.",
        f"Greedy, CPU threads: {record['threads']}; tokens/s in batches of {record['speed']['batch']}. "
        f"Took {record['seconds']:.0f} s.",
    ]


def _one_line(text: str) -> str:
    return terminal.safe(text).replace("\n", "⏎")


def _side_by_side(answer: dict[str, Any]) -> list[Text]:
    """One prompt and its three answers; changed tokens are in brackets, to be visible without colours too."""
    from rich.text import Text

    steered = Text()
    for step in answer["tokens"]:
        shown = _one_line(step["token"])
        bare = shown.lstrip(" ")
        if step["changed"]:
            steered.append(shown[: len(shown) - len(bare)]).append(f"[{bare or '␣'}]", style="bold green")
        else:
            steered.append(shown)
    changed = sum(step["changed"] for step in answer["tokens"])
    legend = f"{changed} of {len(answer['tokens'])} tokens changed by the shift, in brackets"
    return [
        Text.assemble((answer["prompt"], "bold"), (f"   (right: {answer['gold']})", "dim")),
        Text.assemble(("base   ", "dim"), _one_line(answer["base"].strip())),
        Text.assemble(("proxy  ", "dim"), steered, (f"   ({legend})", "dim")),
        Text.assemble(("tuned  ", "dim"), _one_line(answer["tuned"].strip())),
    ]
