"""A text in a terminal: what the shift changed, coloured by how much, and the most changed positions in a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from proxytune.trace import Trace, TracedText
from proxytune.trace.record import COMBINED
from proxytune.validation import whole
from proxytune.view.words import check_texts, name_of, nats, pieces, share, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["LEVELS", "look"]

LEVELS = ((0.1, "green"), (0.5, "yellow"), (1.0, "dark_orange"), (2.0, "red"))
"""From how many nats of KL(combined ‖ base) a token has which colour."""
FORK = "◆"
"""Stands before a token at a fork."""
NARROW = 60
"""Columns below which the table becomes lines."""
SHOWN = 3
"""How many likeliest tokens of base and steered model are shown."""


def look(trace: Trace, *, text: int = 0, changed: int = 5, console: Console | None = None) -> None:
    """Print a text of a trace: its tokens coloured by KL(combined ‖ base), and the positions that changed most.

    Without colours (`NO_COLOR`, a pipe), a token that is not the base's first choice stands in brackets instead.

    Args:
        trace: The trace.
        text: The number of the text, from 0.
        changed: How many of the most changed positions to list; 0 for none.
        console: Where to print [the terminal].

    Raises:
        InputError: If nothing was recorded, or the trace has no such text.
    """
    from rich.console import Console

    check_texts(trace)
    here = Console(markup=False, highlight=False, emoji=False) if console is None else console
    one = trace[whole("text", text, "from the trace", most=len(trace) - 1, remedy=f"It has {len(trace)} texts.")]
    for part in _parts(trace, one, changed, here):
        here.print(part)


def _parts(trace: Trace, one: TracedText, changed: int, console: Console) -> Iterator[RenderableType]:
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    yield _text(one, coloured)
    if not len(one):
        return
    yield Text()
    yield _legend(one, coloured)
    if changed and len(trace.sources) > 2:
        yield Text()
        table = _lines if console.width < NARROW else _table
        yield table(trace, one, np.argsort(-one.kl, kind="stable")[: whole("changed", changed)].tolist())


def _text(one: TracedText, coloured: bool) -> Text:
    from rich.text import Text

    out = Text(visible(one.prompt or ""), style="dim")
    forks, steered = one.said("fork"), one.steered
    for i, piece in enumerate(pieces(one)):
        shown = visible(piece)
        if forks is not None and forks[i]:
            out.append(FORK, "not dim cyan")
        if coloured:
            out.append(shown, _style(float(one.kl[i]), bool(steered[i])))
        else:
            out.append(_bracketed(shown) if steered[i] and shown else shown, "not dim")
    return out


def _style(kl: float, steered: bool) -> str:
    colour = [name for least, name in LEVELS if kl >= least]
    return " ".join(["not dim", *colour[-1:], *(["underline"] if steered else [])])


def _bracketed(piece: str) -> str:
    bare = piece.strip()
    if not bare:
        return f"[{piece}]"
    start = piece.index(bare)
    return f"{piece[:start]}[{bare}]{piece[start + len(bare) :]}"


def _legend(one: TracedText, coloured: bool) -> Text:
    from rich.text import Text

    out = Text()
    if coloured:
        out.append("KL from the base, nats: ", "dim")
        for least, colour in LEVELS:
            out.append(f"≥ {least:g} ", colour)
        out.append("underlined", "underline")
    else:
        out.append("[in brackets]")
    out.append(": not the base's first choice", "dim")
    if one.said("fork") is not None:
        out.append(f" · {FORK} a fork", "dim")
    count, kl = int(one.steered.sum()), float(one.kl.mean())
    out.append(f" · {count} of {len(one)} tokens changed, {nats(kl)} nats a token", "dim")
    return out


def _wanted(one: TracedText, position: int, source: int) -> list[str]:
    ids, logprobs = one.top_ids[position, source], one.top_logprobs[position, source]
    found = zip(ids[:SHOWN].tolist(), logprobs[:SHOWN].tolist(), strict=True)
    return [f"{name_of(one, token)} {share(logprob)}" for token, logprob in found if token >= 0]


def _table(trace: Trace, one: TracedText, positions: list[int]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="most changed", title_justify="left")
    for name in ("token", "text", "KL"):
        table.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
    table.add_column("the base wanted", overflow="fold")
    table.add_column("steered", overflow="fold")
    base, combined = trace.sources.index("base"), trace.sources.index(COMBINED)
    for i in positions:
        wanted = ("\n".join(_wanted(one, i, source)) for source in (base, combined))
        table.add_row(str(i + 1), Text(name_of(one, int(one.tokens[i]))), nats(float(one.kl[i])), *map(Text, wanted))
    return table


def _lines(trace: Trace, one: TracedText, positions: list[int]) -> Text:
    from rich.text import Text

    base, combined = trace.sources.index("base"), trace.sources.index(COMBINED)
    out = Text("most changed\n")
    for i in positions:
        out.append(f"{i + 1}. {name_of(one, int(one.tokens[i]))}: KL {nats(float(one.kl[i]))}\n")
        for name, source in (("base", base), ("steered", combined)):
            out.append(f"   {name}: {', '.join(_wanted(one, i, source))}\n", "dim")
    return out
