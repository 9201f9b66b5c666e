"""`proxytune tune`: a formula's strength, or another number of it, chosen on validation items."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.models import check_members, load
from proxytune.cli.options import (
    OUTPUT,
    PROMPTS,
    Alpha,
    Antiexpert,
    Base,
    Chat,
    Device,
    Dtype,
    Expert,
    RecipePath,
    System,
    Trust,
)
from proxytune.errors import InputError

if TYPE_CHECKING:
    from proxytune.search.tuning_record import Tuning

__all__ = ["tune"]

_GRID = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0)
_GRIDS = {
    "gate.entropy": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0),
    "gate.top1": (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99),
    "temperature": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5),
}
_UNITS = {"logprob": "nats per token", "accuracy": "share right"}
_WIDTH = 31
_PANEL = "Choice"


def tune(
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            "-f",
            help='Validation items, .jsonl: "prompt" or "messages" with the right "completion"; with "choices" and the '
            'right "answer"; or with an "answer" alone, which the model has to write. Never test data: what is chosen '
            "on a file cannot be measured on it.",
            rich_help_panel=PROMPTS,
        ),
    ],
    base: Base = None,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    alpha: Alpha = None,
    recipe: RecipePath = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of test items, to make sure that none is in --file; a recipe keeps its name. May be repeated.",
            rich_help_panel=PROMPTS,
            show_default=False,
        ),
    ] = None,
    chat: Chat = False,
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read at once.", rich_help_panel=PROMPTS)] = 8,
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="<regex>",
            help="Of answers that the model writes: how to find them in its text; the last match, and of it group 1 "
            '(default: what follows "The answer is", else the last number).',
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer that the model writes.", rich_help_panel=PROMPTS)
    ] = 256,
    knob: Annotated[
        str | None,
        typer.Option(
            help="What to choose (default: the formula's strength, alpha): another number of the formula, gate.entropy "
            "(nats of the base above which the shift applies), gate.top1, or temperature.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(help="Values to choose from: 0,0.5,1 or 0:2:0.25 (from, to, step).", rich_help_panel=_PANEL),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the items' order.", rich_help_panel=_PANEL)] = 0,
    write: Annotated[
        bool, typer.Option("--write", help="Write value and evidence into the recipe.", rich_help_panel=OUTPUT)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the curve into this file (.png, .svg, .pdf).", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the curve.", rich_help_panel=OUTPUT)
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = None,
) -> None:
    """Choose alpha, or another number of the formula, on validation items.

    For example: proxytune tune --recipe FOLDER --chat --file validation.jsonl --test test.jsonl --write

    The members read each item once, for all values; but answers that the model has to write are written anew for each.
    Values that fall clearly behind are dropped on the way. Of the values within one standard error of the best, the one
    that changes the base least is chosen.
    """
    from proxytune.cli.answered import check_answered
    from proxytune.cli.encoding import check_lengths, own_prompt_views
    from proxytune.cli.plot_file import refuse_plot
    from proxytune.cli.sample_run import extractor
    from proxytune.cli.tune_items import (
        Judge,
        flat,
        is_written,
        items_of,
        named_file,
        read_items,
        refuse_other_kinds,
    )

    check_members(base, expert, antiexpert, recipe, [])
    if plot is not None:
        refuse_plot(plot)
    _check_write(recipe, alpha, knob, write=write)
    prompts, held_out = read_items(file, test or [], recipe)
    pairs, spans = flat(prompts)
    chat = check_answered(pairs, chat=chat, system=system)
    given = None if values is None else _values(values)
    extract = extractor(answer)
    terminal.quiet()

    from transformers import GenerationConfig

    from proxytune.recipe import write_tuned
    from proxytune.search import tuning
    from proxytune.search.knobs import knob_of

    model, tokenizer = load(base, expert, antiexpert, alpha, recipe, device, dtype, chat=chat, trust=trust)
    chosen = knob_of(model.formula, knob)
    if given is None:
        given = _default_values(chosen)
    views = own_prompt_views(model, tokenizer, [prompt for prompt, _ in pairs], chat, system)
    with terminal.Bar("items") as bar:
        bar.show("reading", 0, len(prompts))
        how: dict[str, Any] = {"knob": chosen, "seed": seed}
        how["advance"] = lambda done: bar.show("reading", done, len(prompts))
        if any(map(is_written, prompts)):
            refuse_other_kinds(prompts, views)
            check_lengths(
                model, tokenizer, prompts, chat, system, config=GenerationConfig(max_new_tokens=max_new_tokens)
            )
            judge = Judge(tokenizer, prompts, extract, batch_size, max_new_tokens, chat=chat, system=system)
            found = tuning.tune_by(model, judge, len(prompts), given, **how)
        else:
            items = items_of(tokenizer, prompts, pairs, spans, chat=chat, system=system, views=views)
            found = tuning.tune(model, items, given, batch_size=batch_size, **how)
    evidence = {**found.to_json(), "file": named_file(file)}
    written = None
    if write and recipe is not None:
        written = str(write_tuned(recipe, found.formula, chosen.name, evidence, held_out))
        _note_fork_threshold(recipe, found)
    if plot is not None:
        draw(found, plot)
    if as_json:
        typer.echo(json.dumps({"knob": chosen.name, **evidence, "test": held_out, "written": written}))
    else:
        _print(found, written)


# --- what is given ----------------------------------------------------------------------------------------------------


def _check_write(recipe: Path | None, alpha: float | None, knob: str | None, *, write: bool) -> None:
    """Refuse what a recipe could not keep, before any model is loaded."""
    if alpha is not None and knob in (None, "alpha"):
        raise InputError.of(
            "--alpha",
            expected="no α where it is what is chosen",
            got=f"{alpha:g}",
            remedy="Pass --values, or another --knob.",
        )
    if not write:
        return
    if recipe is None:
        raise InputError.of(
            "--write", expected="--recipe, the recipe to write into", got="none", remedy="Save one, or use --json."
        )
    if knob == "temperature":
        raise InputError.of(
            "--write",
            expected="a number of the formula, which a recipe keeps",
            got="--knob temperature",
            remedy="Drop --write, and pass temperature=… to generate.",
        )
    from proxytune.recipe import Recipe

    own = Recipe.load(recipe).alpha
    if alpha not in (None, own):
        raise InputError.of(
            "--write",
            expected=f"the recipe's own α, {own}: what is chosen belongs to it",
            got=f"--alpha {alpha:g}",
            remedy="Drop --alpha, or change it in the recipe first.",
        )


def _values(text: str) -> list[float]:
    """The numbers of `0,0.5,1` or `0:2:0.25`."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = math.floor((stop - start) / step + 1e-9) + 1
            found = [round(start + i * step, 12) for i in range(count)]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not 2 <= len(found) <= 1000 or not all(map(math.isfinite, found)):
        raise InputError.of(
            "--values",
            expected="2 to 1000 numbers: 0,0.5,1 or 0:2:0.25 (from, to, step)",
            got=repr(text),
            remedy="Correct it.",
        )
    return found


def _default_values(knob: Any) -> list[float]:
    if (grid := _GRIDS.get(knob.name)) is not None:
        return list(grid)
    if knob.name in ("share", "top_p"):
        raise InputError.of(
            "--values",
            expected=f"values of {knob.name} to choose from",
            got="none",
            remedy="Pass e.g. --values 0.1,0.5.",
        )
    return [knob.neutral + value for value in _GRID]


def _note_fork_threshold(recipe: Path, found: Tuning) -> None:
    from proxytune.recipe import Recipe

    threshold = Recipe.load(recipe).fork_threshold
    if threshold is not None and threshold.alpha not in (None, found.formula.alpha):
        terminal.show_note(
            f"the recipe's fork threshold was calibrated at α = {threshold.alpha:g}: run proxytune calibrate again."
        )


# --- the curve --------------------------------------------------------------------------------------------------------


def _print(found: Tuning, written: str | None) -> None:
    console = terminal.output()
    for line in curve_lines(found):
        console.print(line, soft_wrap=True)
    for line in summary_lines(found, written):
        console.print(line, soft_wrap=True)


def curve_lines(found: Tuning) -> list[str]:
    """The curve as text: a line for each value, its interval drawn to scale; `◂` where it is left of the picture."""
    points = found.points
    ends = [p for p in points if p.items == found.items and math.isfinite(p.score.value)]  # those that matter
    low, high = min(p.score.low for p in ends), max(p.score.high for p in ends)
    scale = (_WIDTH - 1) / (high - low) if high > low else 0.0

    def column(value: float) -> int:
        return min(_WIDTH - 1, max(-1, round((value - low) * scale)))

    gated = any(point.open is not None for point in points)
    name = f"{found.knob.name:>12}"
    lines = [f"{name}  {_UNITS[found.metric]:>14} [95 %]{'':8} {'items':>6}{'   open  bytes' if gated else ''}"]
    for point in points:
        row = [" "] * _WIDTH
        if math.isfinite(point.score.value):
            first, at, last = map(column, (point.score.low, point.score.value, point.score.high))
            for place in range(max(0, first), last + 1):
                row[place] = "├" if place == first else "┤" if place == last else "─"
            row[max(0, at)] = "●" if at >= 0 else "◂"
            told = f"{point.score.value:>10.4f} [{point.score.low:.4f}, {point.score.high:.4f}]"
        else:
            told = f"{'-inf':>10}"
        share = f" {point.open:>6.1%} {point.bytes:>5.2f}×" if point.open is not None else " " * 14 if gated else ""
        mark = "chosen" if point.value == found.chosen else "best" if point.value == found.best else ""
        mark = mark or ("dropped" if point.items < found.items else "")
        lines.append(f"{point.value:>12g}  {told:<28} {point.items:>6}{share}  {''.join(row)} {mark}".rstrip())
    return lines


def summary_lines(found: Tuning, written: str | None) -> list[str]:
    """What was chosen, and why."""
    chosen, best = found.point(found.chosen), found.point(found.best)
    unit = _UNITS[found.metric]
    lines = [f"chosen    {found.knob.name} = {found.chosen:g}: {chosen.score.value:.4f} {unit}"]
    if found.chosen != found.best:
        behind = best.score.value - chosen.score.value
        lines.append(
            f"best      {found.best:g}: {best.score.value:.4f}; the chosen one is {behind:.4f} behind, within the "
            f"standard error {found.error:.4f}, and changes the base less"
        )
    if chosen.open is not None:
        lines.append(
            f"gate      open at {chosen.open:.1%} of the tokens: {chosen.bytes:.2f} × the base's bytes per token"
        )
    if (gap := found.gap(found.chosen)) is not None:
        ends = f"the base ({found.base:.4f}) to the shift everywhere ({found.ungated:.4f})"
        lines.append(f"gap       {gap:.0%} closed, from {ends}")
    first, *_, last = (point.value for point in found.points)
    if len({point.score.value for point in found.points}) == 1:
        lines.append(f"note      {found.knob.name} makes no difference on these items")
    elif found.best in (first, last) and found.best != found.knob.neutral:
        lines.append(f"note      the best is at the end of the values: try some beyond {found.best:g}")
    once = f"{found.tokens} tokens in {found.items} items, each read once for all values"
    lines.append(
        f"measured  {once if found.tokens else f'{found.items} items, whose answers were written for each value'}"
    )
    if written is not None:
        lines.append(f"written to {written}")
    return lines


def draw(found: Tuning, path: Path) -> None:
    """Draw the curve with its intervals; OSError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    shown = [point for point in found.points if math.isfinite(point.score.value)]
    for points, colour, label in (
        ([p for p in shown if p.items == found.items], "#4c78a8", f"{found.items} items, 95 % interval"),
        ([p for p in shown if p.items < found.items], "#bbbbbb", "dropped earlier"),
    ):
        if not points:
            continue
        values = [p.score.value for p in points]
        errors = [[p.score.value - p.score.low for p in points], [p.score.high - p.score.value for p in points]]
        style = "o-" if colour != "#bbbbbb" else "o"
        axes.errorbar([p.value for p in points], values, yerr=errors, fmt=style, color=colour, capsize=3, label=label)
    axes.axvline(found.chosen, color="#e45756", linewidth=1, label=f"chosen: {found.chosen:g}")
    axes.set_xlabel(found.knob.name)
    axes.set_ylabel(_UNITS[found.metric])
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
