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
"""Columns below which the table becomes lines; so does one that does not fit."""
LEAST = 0.005
"""Nats of KL below which a position did not change: it would be written as 0.00."""
SHOWN = 3
"""How many likeliest tokens of base and steered model are shown."""


def look(trace: Trace, *, text: int = 0, changed: int = 5, console: Console | None = None) -> None:
    """Print a text of a trace: its tokens coloured by KL(combined ‖ base), and the positions that changed most.

    Without colours (`NO_COLOR`, a pipe), a token that is not the base's first choice stands in brackets instead. Below
    the likeliest tokens of base and steered model, `…` is the token that stands there, if it is not among them. Of a
    plain model nothing changed: its text alone is shown.

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
    plain = len(trace.sources) <= 2
    yield _text(one, coloured)
    if not len(one):
        return
    yield Text()
    yield _legend(one, coloured, plain)
    if not whole("changed", changed) or plain:
        return
    yield Text()
    positions = [i for i in np.argsort(-one.kl, kind="stable")[:changed].tolist() if one.kl[i] >= LEAST]
    if not positions:
        yield Text(f"no position changed: every KL is below {LEAST} nats")
        return
    table = _table(trace, one, positions)
    needed = console.measure(table, options=console.options.update(width=1 << 16)).maximum
    yield table if NARROW <= console.width >= needed else _lines(trace, one, positions, console.width)


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


def _legend(one: TracedText, coloured: bool, plain: bool) -> Text:
    from rich.text import Text

    out, count = Text(), int(one.steered.sum())
    if coloured and not plain:
        out.append("KL from the base, nats: ", "dim")
        for least, colour in LEVELS:
            out.append(f"≥ {least:g} ", colour)
    out.append("underlined" if coloured else "[in brackets]", "underline" if coloured else "")
    out.append(": not its first choice" if plain else ": not the base's first choice", "dim")
    if one.said("fork") is not None:
        out.append(f" · {FORK} a fork", "dim")
    changed = "" if plain else f" changed, {nats(float(one.kl.mean()))} nats a token"
    out.append(f" · {count} of {len(one)} tokens{changed}", "dim")
    return out


def _wanted(trace: Trace, one: TracedText, position: int, source: int) -> list[str]:
    """The source's likeliest tokens, and the token that stands there."""
    mine, logprob = int(one.tokens[position]), float(one.logprobs[position])
    ids, logprobs = one.top_ids[position, source, :SHOWN].tolist(), one.top_logprobs[position, source, :SHOWN].tolist()
    out = [f"{name_of(one, token)} {share(x)}" for token, x in zip(ids, logprobs, strict=True) if token >= 0]
    if mine not in ids:
        own = logprob if source == trace.sources.index(COMBINED) else logprob - float(one.shift[position])
        out.append(f"… {name_of(one, mine)} {share(own)}")
    return out


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
        wanted = ("\n".join(_wanted(trace, one, i, source)) for source in (base, combined))
        table.add_row(str(i + 1), Text(name_of(one, int(one.tokens[i]))), nats(float(one.kl[i])), *map(Text, wanted))
    return table


def _lines(trace: Trace, one: TracedText, positions: list[int], width: int) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    base, combined = trace.sources.index("base"), trace.sources.index(COMBINED)
    out = Text("most changed\n")
    for i in positions:
        out.append(f"{i + 1}. {name_of(one, int(one.tokens[i]))}: KL {nats(float(one.kl[i]))}\n")
        for name, source in (("base", base), ("steered", combined)):
            lines = [f"   {name}:"]
            for token in _wanted(trace, one, i, source):  # none is broken before its percentage
                line = f"{lines[-1]} {token}"
                lines[-1:] = [line] if cell_len(line) < width else [lines[-1], f"     {token}"]
                lines[-1] += ","
            out.append("\n".join(lines).removesuffix(",") + "\n", "dim")
    return out
