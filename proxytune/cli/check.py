"""`proxytune check`: do three models fit together, and what do they cost? Everything that is wrong, before a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli import terminal
from proxytune.cli.options import Alpha, Device, Dtype, EndTokensOption, RecipePath, Trust
from proxytune.errors import InputError

if TYPE_CHECKING:
    from proxytune.models.pair_report import PairReport
    from proxytune.recipe import Recipe

__all__ = ["check", "show"]

_ROLES = ("BASE", "EXPERT", "ANTIEXPERT")


def check(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="The large model: a hub id or a folder.")] = None,
    expert: Annotated[str | None, typer.Argument(metavar="EXPERT", help="The small tuned model.")] = None,
    antiexpert: Annotated[
        str | None, typer.Argument(metavar="ANTIEXPERT", help="The small model that the expert was tuned from.")
    ] = None,
    recipe: RecipePath = None,
    alpha: Alpha = None,
    end_tokens: EndTokensOption = None,
    trust: Trust = None,
    device: Device = None,
    dtype: Dtype = "auto",
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Load the members, one after the other, or read files alone.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say whether three models fit together, what is wrong with them, and what a token will cost.

    Exits with 1 if there is a problem.
    """
    _refuse_call((base, expert, antiexpert), recipe)
    terminal.quiet()
    from proxytune.cli.models import DTYPES, check_device, chosen_device, trusted_roles
    from proxytune.formulas.proxy_tuning import ProxyTuning
    from proxytune.models.pair_check import check_pair
    from proxytune.recipe import ROLES, Recipe
    from proxytune.validation import choice, validate_alpha

    if alpha is not None:
        validate_alpha(alpha)
    choice("--dtype", dtype, DTYPES)
    device = chosen_device(device)
    check_device(device)
    steered, sources = True, dict[str, Any](zip(ROLES, (base, expert, antiexpert), strict=True))
    if recipe is not None:
        read = Recipe.load(recipe)
        sources = _sources_of(read)
        steered = read.formula == ProxyTuning.name and set(sources) == set(ROLES)
        if not steered:
            terminal.show_note(
                f"Of {read.formula!r} the members, their token ids and memory are checked: expert and antiexpert are "
                "compared for proxy-tuning alone. A member that reads another prompt as well is counted once."
            )
        if "gate" in read.settings:
            terminal.show_note("The cost of a token is that without the gate.")
        if alpha is None and isinstance(read.alpha, float):
            alpha = read.alpha
        end_tokens = end_tokens or read.end_tokens
    with terminal.Bar("members") as bar:
        report = check_pair(
            sources,
            alpha=1.0 if alpha is None else alpha,
            end_tokens=end_tokens,
            trusted=trusted_roles(trust),
            dtype=dtype,
            device=device,
            weights=weights,
            steered=steered,
            progress=lambda role, number: bar.show(role, number, len(sources)),
        )
    if as_json:
        typer.echo(json.dumps({"ok": report.ok, "verdict": _verdict(report, weights), **asdict(report)}, indent=2))
    else:
        show(report, weights)
    if not report.ok:
        raise typer.Exit(1)


def _sources_of(recipe: Recipe) -> dict[str, Any]:
    """The members of a recipe as `check_pair` takes them: an adapter of the antiexpert as "lora:…"."""
    from dataclasses import replace

    sources: dict[str, Any] = {role: reference.trusted(False) for role, reference in recipe.members.items()}
    expert, antiexpert = recipe.everyone.get("expert"), recipe.everyone.get("antiexpert")
    adapter = getattr(expert, "adapter", None)
    if adapter is not None and "expert" in sources and antiexpert is not None:
        below = replace(sources["expert"], adapter=None)
        sources |= {"expert": f"lora:{adapter}", "antiexpert": sources.get("antiexpert", below)}
    return sources


def _refuse_call(members: Sequence[str | None], recipe: Path | None) -> None:
    """Refuse anything but three models, or a recipe."""
    present = [name for name, value in zip(_ROLES, members, strict=True) if value is not None]
    if (recipe is None) == (len(present) == len(_ROLES)):
        return
    word = members[0]
    meant = recipe is None and len(present) == 1 and word and (Path(word[:255]) / "proxytune_config.json").exists()
    raise InputError.of(
        "members",
        expected=f"{', '.join(_ROLES)}, or --recipe",
        got=f"--recipe and {', '.join(present)}" if recipe is not None else ", ".join(present) or "none of them",
        remedy=f"Pass --recipe {word}."
        if meant
        else "Drop one."
        if recipe is not None
        else "Name three models: the antiexpert is what the expert was tuned from.",
    )


def _verdict(report: PairReport, weights: bool) -> str:
    count = len(report.problems)
    if count:
        return f"{count} problem{'s' * (count > 1)}"
    seen = (
        "" if report.weights else "; weights were not looked at" if not weights else "; not all weights were looked at"
    )
    return f"nothing wrong was found{seen}"


def show(report: PairReport, weights: bool = True) -> None:
    """Print a report: the verdict, what is wrong with what to do, then the figures."""
    from rich.text import Text

    from proxytune.cli.wording import as_options

    console = terminal.output()
    console.print(Text(_verdict(report, weights), style="bold green" if report.ok else "bold red"))
    styles = {"problem": "bold red", "note": "dim"}
    for found in report.findings:
        text = terminal.safe(as_options(" ".join(found.text.split())))
        console.print(
            Text(f"{found.kind}: ", style=styles[found.kind]).append(text, style="not bold not dim"), soft_wrap=True
        )
    console.print()
    if report.members:
        _print_members(report)
    for name, text in _lines(report):
        console.print(f"{name:11}{text}", soft_wrap=True)


def _print_members(report: PairReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for member in report.members:
        table.add_column(member.role, justify="right", overflow="fold")
    whole = len(report.members) > 1
    if whole:
        table.add_column("all", justify="right", no_wrap=True)

    def row(name: str, values: Sequence[str], total: str = "") -> None:
        table.add_row(name, *values, *([total] if whole else []))

    members = report.members
    row("model", [terminal.safe(Path(one.id).name) for one in members])
    row("family", [one.kind.partition(" (")[2].rstrip(")") for one in members])
    row("parameters", [_count(one.parameters) for one in members], _count(sum(one.parameters for one in members)))
    row("saved as", [one.dtype for one in members])
    row("context", ["any" if one.context is None else f"{one.context:,}" for one in members])
    for name in members[0].weights:
        sizes = [one.weights[name] for one in members]
        row(f"weights, {name}", [_bytes(size) for size in sizes], _bytes(sum(sizes)))
    for name in ("float32", "bfloat16"):
        sizes = [one.cache[name] for one in members]
        row(f"cache, {name}", [_bytes(size) for size in sizes], _bytes(sum(sizes)))
    terminal.output().print(table)
    terminal.output().print("(cache: of one text of 1,000 tokens; 8 and 4 bits: estimates, embeddings in 16)")


def _lines(report: PairReport) -> list[tuple[str, str]]:
    """The figures below the table, by name."""
    lines = []
    if report.vocabulary is not None:
        lines.append(("vocabulary", report.vocabulary))
    if report.ends:
        lines.append(("stops at", ", ".join(f"{terminal.safe(token)} (id {i})" for i, token in report.ends.items())))
    if report.cost is not None:
        cost = report.cost
        lines.append(("a token", f"{cost.bytes:.2f} × the bytes of the base alone"))
        times = (
            f"{_time(cost.seconds[kind])} on a {name} (the base alone {_time(cost.base_seconds[kind])})"
            for kind, name in (("cpu", "CPU"), ("cuda", "GPU"))
        )
        lines.append(("", f"roughly {', '.join(times)}"))
    if report.shift is not None:
        shift = report.shift
        lines.append(("shift", f"KL(expert ‖ antiexpert) {shift.pair:.3g} nats per token"))
        if shift.steered is not None and shift.changed is not None:
            more = f"another first choice at {shift.changed:.0%} of {shift.tokens} tokens of built-in texts"
            lines.append(("", f"KL(steered ‖ base) {shift.steered:.3g}, {more}"))
        if shift.turn_ends:
            said = ", ".join(f"{role} {value:.2f}" for role, value in shift.turn_ends.items())
            lines.append(("ends turns", f"{said} (probability of an end token after a finished answer)"))
    if report.members:
        lines.append(("refused", "; ".join(f"{mode} ({why})" for mode, why in report.refused.items()) or "no mode"))
    return lines


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,.0f}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(size: float) -> str:
    for unit, one in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= one:
            return f"{size / one:.2f} {unit}"
    return f"{size / 1024:.0f} KiB"
