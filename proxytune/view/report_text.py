"""A report, written down: as one inert HTML page, as Markdown, and as a few lines for the terminal.

The page loads nothing and runs nothing: no script, one style sheet, and a content security policy that allows that
alone. Whatever a model, a prompt or a file's name says is shown as text.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path

from proxytune.diagnostics.losses import LOSSES, MARKS, Loss
from proxytune.diagnostics.prompts import said
from proxytune.errors import InputError
from proxytune.view.inert import inert
from proxytune.view.plots import COLOURS, svg
from proxytune.view.report import Part, Report
from proxytune.view.words import visible

__all__ = ["html", "markdown", "summary", "write"]

_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Signs that turn the direction of what follows them."""


def html(report: Report, *, title: str | None = None) -> str:
    """The report as one HTML page that needs nothing else."""
    title = title or f"What {'this policy has' if len(report.runs) == 1 else 'these policies have'} lost"
    sheet = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#part{i}">{_safe(part.title)}</a> ' for i, part in enumerate(report.parts))
    sizes = " · ".join(f"{name}: {size}" for name, size in report.runs.items())
    body = [
        f'<section class="lead"><h2>In short</h2>{"".join(f"<p>{_safe(text)}</p>" for text in report.lost)}'
        f"{_todo_html(report)}</section>",
        f"<section><h2>{_side_title(report)}</h2>{_losses_html(report)}{_orders_html(report)}</section>",
        *(_part_html(report, part, i) for i, part in enumerate(report.parts)),
    ]
    if report.examples:
        shown = "".join(
            f"<h3>{_safe(name)}</h3>{''.join(f'<pre>{_safe(text)}</pre>' for text in texts)}"
            for name, texts in report.examples.items()
        )
        body.append(f"<section><h2>Degenerate texts, as they were written</h2>{shown}</section>")
    head = (
        f'<header><h1>{_safe(title)}</h1><p class="quiet">{_safe(sizes)}</p>'
        f'<nav aria-label="Diagnoses">{links}</nav></header>'
    )
    return inert(_shown(title), f"{head}\n<main>\n{''.join(body)}\n</main>", sheet)


def _shown(text: str) -> str:
    return _BIDI.sub("\ufffd", visible(text))


def _safe(text: str) -> str:
    return escape(_shown(text))


def _todo_html(report: Report) -> str:
    if not report.todo:
        return ""
    items = "".join(
        f"<li><b>{_safe(name)}</b>. At decoding time: "
        + "; ".join(f"{_safe(what)} <span class='quiet'>({_safe(page)})</span>" for what, page in decoding)
        + f". By training only: {_safe(training)}.</li>"
        for name, decoding, training in report.todo
    )
    return f"<p>What to do:</p><ul>{items}</ul>"


def _side_title(report: Report) -> str:
    return "The runs side by side, those with the most losses first" if len(report.runs) > 1 else "The losses"


def _cell(loss: Loss) -> str:
    return "–" if loss.value is None else said(loss.value, percent=loss.name != "drift")


def _losses_html(report: Report) -> str:
    head = "".join(f"<th scope='col'>{_safe(name)}</th>" for name in LOSSES)
    rows = "".join(
        f"<tr><th scope='row'>{_safe(name)}</th>"
        + "".join(
            f"<td{' class=told' if found[loss].told else ''}>{_safe(_cell(found[loss]))}"
            f"{' ▲' if found[loss].told else ''}</td>"
            for loss in LOSSES
        )
        + "</tr>"
        for name, found in report.losses.items()
    )
    return (
        f"<div class='scroll'><table><thead><tr><th>run</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class='quiet'>{_safe(_KEY)}</p>"
    )


_KEY = (
    "Larger is worse. ▲: told, the whole interval lies above the mark: "
    + ", ".join(f"{name} {MARKS[name]:g}{' nats' if name == 'drift' else ''}" for name in LOSSES)
    + ". –: the trace cannot say. proxytune.diagnostics.losses has the definitions."
)
_ORDER = "Worst first. >: told apart; ~: cannot be told apart."


def _orders_html(report: Report) -> str:
    if not report.orders:
        return ""
    items = "".join(
        f"<li><b>{_safe(order.name)}</b>: {_safe(order.says)}</li>" for order in report.orders if order.runs
    )
    return f"<p class='quiet'>{_safe(_ORDER)}</p><ul>{items}</ul>"


def _part_html(report: Report, part: Part, number: int) -> str:
    out = [f'<section id="part{number}"><h2>{_safe(part.title)}</h2>']
    if part.plot is not None:
        out.append(svg(part.plot))
        runs = [one.name for one in part.plot.series]
        if len(runs) > 1:
            keys = " ".join(f'<span class="key run{i % COLOURS}"></span>{_safe(name)} ' for i, name in enumerate(runs))
            out.append(f'<p class="quiet">{keys}</p>')
    for name, says in part.said.items():
        who = f"<b>{_safe(name)}</b>: " if len(report.runs) > 1 else ""
        figures = "; ".join(f"{figure.name} {figure.shown}" for figure in part.figures[name])
        out.append(f"<p>{who}{_safe(says)}</p><p class='quiet'>{_safe(figures)}</p>")
    for names, why in _refusals(part):
        who = f"<b>{_safe(names)}</b>: " if len(report.runs) > 1 else ""
        out.append(f"<p class='quiet'>{who}no figure. {_safe(why)}</p>")
    if part.said:
        out.append(f"<p><i>What it means.</i> {_safe(part.means)} <i>What not.</i> {_safe(part.means_not)}</p>")
    return "".join(out) + "</section>"


def _refusals(part: Part) -> list[tuple[str, str]]:
    """The names of the runs that are refused for one reason, and the reason."""
    return [
        (", ".join(name for name, one in part.refused.items() if one == why), why)
        for why in dict.fromkeys(part.refused.values())
    ]


def markdown(report: Report) -> str:
    """The report as Markdown, without plots."""
    out = ["# What was lost", "", *_lines(report), "", "| run | " + " | ".join(LOSSES) + " |"]
    out.append("|---|" + "--:|" * len(LOSSES))
    for name, found in report.losses.items():
        cells = (f"**{_cell(found[loss])}**" if found[loss].told else _cell(found[loss]) for loss in LOSSES)
        out.append(f"| {_plain(name)} | {' | '.join(cells)} |")
    out += ["", _KEY.replace("▲", "Bold")]
    if report.orders:
        out += ["", _ORDER, "", *(f"- {one.name}: {_plain(one.says)}" for one in report.orders if one.runs)]
    for part in report.parts:
        out += ["", f"## {part.title}", ""]
        for name, says in part.said.items():
            figures = "; ".join(f"{figure.name} {figure.shown}" for figure in part.figures[name])
            out.append(f"- {_plain(name)}: {_plain(says)} {_plain(figures)}")
        out += [f"- {_plain(names)}: no figure. {_plain(why)}" for names, why in _refusals(part)]
        if part.said:
            out += ["", f"*What it means.* {part.means} *What not.* {part.means_not}"]
    return "\n".join(out) + "\n"


def _plain(text: str) -> str:
    """Text on one line that Markdown does not read as anything else."""
    line = " ".join(_BIDI.sub("\ufffd", visible(text)).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _lines(report: Report) -> list[str]:
    out = [f"{_plain(text)}\n" for text in report.lost]
    for name, decoding, training in report.todo:
        ways = "; ".join(f"{what} ({page})" for what, page in decoding)
        out.append(f"- **{name}**. At decoding time: {ways}. By training only: {training}.")
    return out


def summary(report: Report, *, width: int = 80) -> str:
    """The report in a few lines of at most `width` columns, for a terminal."""

    def wrapped(text: str, first: str = "", then: str = "") -> str:
        return textwrap.fill(
            visible(text),
            max(width, 20),
            initial_indent=first,
            subsequent_indent=then,
            break_long_words=False,
            break_on_hyphens=False,
        )

    out = ["\n\n".join(map(wrapped, report.lost))]
    for name, decoding, training in report.todo:
        out += ["", f"{name}, at decoding time:"]
        out += [wrapped(f"{what} ({page})", "- ", "  ") for what, page in decoding]
        out += [f"{name}, by training only:", wrapped(training, "- ", "  ")]
    if report.orders:
        out += ["", wrapped(_ORDER)]
        out += [wrapped(f"{order.name}: {order.says}", "- ", "  ") for order in report.orders if order.runs]
    return "\n".join(out)


def write(report: Report, file: str | Path) -> Path:
    """Write a report to NAME.html or NAME.md, over a file that is there. Returns the file.

    Raises:
        InputError: If the name ends in neither, or its folder does not exist.
    """
    path = Path(file)
    kinds = {".html": html, ".htm": html, ".md": markdown}
    if path.suffix not in kinds:
        raise InputError.of(
            "the report's name", expected="NAME.html or NAME.md", got=str(file), remedy=f"Write {path.stem}.html."
        )
    if not path.parent.is_dir():
        raise InputError.of(
            "the report's folder", expected="a folder that exists", got=str(path.parent), remedy="Make it first."
        )
    path.write_text(kinds[path.suffix](report), encoding="utf-8", newline="\n")
    return path
