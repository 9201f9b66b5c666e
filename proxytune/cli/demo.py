"""`proxytune demo`: the bundled family answers held-out problems; base, proxy and directly tuned model compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


__all__ = ["demo"]

HEADINGS = {"chain": "chain\narithmetic", "qa": "QA about\nnew people", "countdown": "\nCountdown"}
TABLE_WIDTH = 80
ROWS = """\
base, 0-shot    the large model, asked as it is
base, 3-shot    the same, with three solved problems before each question
expert alone    the small model, tuned
proxy           the large model + α (expert − the small model before tuning)
tuned directly  the large model, tuned itself: what the proxy stands in for
gap closed      the proxy's share of the way from base, 0-shot, to tuned"""
TASKS = {"chain": "chain arithmetic", "qa": "QA", "countdown": "Countdown"}
APART = {
    "tuned or base": "the tuned model from the base on {}: there may be no gap to close",
    "proxy or base": "the proxy from the base on {}",
    "proxy or either": "the proxy from the base or from the tuned model on {}",
    "proxy or tuned": "the proxy from the tuned model on {}: both were right on the same problems",
}
NEXT = (
    "Next: steer a model of your own by two small ones with its vocabulary.",
    '  proxytune generate "A prompt" --base LARGE --expert TUNED --antiexpert SMALL',
    '  model = proxytune.wrap("LARGE", expert="TUNED", antiexpert="SMALL", alpha=1.0)',
    "LARGE, TUNED and SMALL: hub ids or folders; SMALL is what TUNED was tuned from.",
    "When it helps and when not: README.md; the way to everything else: GUIDE.md.",
)


def demo(
    problems: Annotated[int, typer.Option(min=1, help="Most problems per task.")] = 150,
    alpha: Annotated[float | None, typer.Option(help="Strength of the shift (default: the recorded one).")] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The folder of your own family, see benches/README.md in the repository (default: the bundled one).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Steer a small bundled family on the CPU: accuracy with 95 % intervals, speed, and three answers side by side."""
    terminal.quiet()
    import torch

    from proxytune.demo.bundle import bundled_family, read_record
    from proxytune.demo.measure import measure

    # Models this small gain nothing from a second thread, and lose a lot where the cores are busy.
    torch.set_num_threads(1)
    folder = family or bundled_family()
    strength = float(read_record(folder)["alpha"]) if alpha is None else alpha
    with terminal.Bar("answers") as bar:
        record = measure(folder, strength, problems, bar.show)
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    console = terminal.output()
    wide = terminal.output()
    wide.width = max(wide.width, TABLE_WIDTH)  # a narrow terminal wraps the lines; cut columns would show wrong numbers
    wide.print(_table(record), crop=False)
    if warning := _too_few(record, problems):
        console.print("\n".join(warning), "\n", style="yellow", sep="")
    console.print("\n".join(_notes(record)))
    for answer in record["answers"]:
        console.print()
        for text in _side_by_side(answer):
            console.print(text)
    console.print()
    console.print("\n".join(NEXT), soft_wrap=True)  # commands are copied, so no line is broken


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
    if interval[0] == interval[1]:  # a bootstrap of problems that all agree: it says nothing of how sure that is
        return f"{100 * rate:.0f} [?]"
    return f"{100 * rate:.0f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _too_few(record: dict[str, Any], asked: int) -> list[str]:
    """What the table cannot tell apart with so few problems, a line each, and what to do about it."""
    from proxytune.demo.undecided import undecided

    found: dict[str, dict[str, list[str]]] = {}
    for one in undecided(record):
        found.setdefault(one.question, {}).setdefault(one.task, []).append(one.criterion)
    lines = []
    for question, tasks in found.items():
        # Both criteria as a rule; one of them is named.
        named = [TASKS[task] + (f" ({of[0]})" if len(of) == 1 else "") for task, of in tasks.items()]
        lines.append(f"Too few problems to tell {APART[question].format(_listed(named))}.")
    if lines:
        counts = {task: record["rows"][0]["scores"][task]["strict"]["problems"] for task in record["gap_closed"]}
        all_used = [task for task, count in counts.items() if count < asked]
        if {task for tasks in found.values() for task in tasks} <= set(all_used):
            lines.append("These are all the problems there are.")
        else:
            rest = "".join(f"; {TASKS[task]} has no more than {counts[task]}" for task in all_used)
            lines.append(f"Raise --problems, which is {asked} here{rest}.")
    return lines


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _notes(record: dict[str, Any]) -> list[str]:
    return [
        ROWS,
        "",
        "strict: exactly the taught form; lenient: the right content in any form. no gap: tuning gained nothing "
        "measurable.",
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
