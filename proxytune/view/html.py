"""A trace as one HTML page that needs nothing else: no network, no other file, no library.

The page's own sheet and script are `page.css` and `page.js` beside this module. Whatever a model or a prompt wrote is
in the packed string alone (`proxytune.view.packing`), and the script shows it as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from proxytune.errors import InputError
from proxytune.trace import Trace
from proxytune.validation import whole
from proxytune.view.inert import inert
from proxytune.view.packing import ALPHABET, packed
from proxytune.view.words import check_texts

__all__ = ["page", "write_page"]

PRECISIONS = ((250, 2000, 0.0, None), (60, 200, 1e-3, None), (30, 100, 5e-3, None), (30, 100, 5e-3, 3))
"""What is kept until a page is small enough: grains of lists and of numbers, least probability, likeliest tokens."""
LINEAR = re.compile(r"(?:ProxyTuning|EmulatedFineTuning)\(alpha=([-+.0-9e]+)\)")
"""Formulas whose combined scores are a straight line in alpha."""


def page(
    trace: Trace,
    *,
    title: str | None = None,
    trees: Sequence[Mapping[str, Any]] = (),
    top: int = 5,
    most_bytes: int = 1_000_000,
) -> str:
    """One HTML page that shows a trace: texts coloured, each source's likeliest tokens, lines along the text, trees.

    Args:
        trace: The trace.
        title: What the page is called [the model's name].
        trees: Fork trees, each a node: `{"text": …, "weight": …, "entropy": …, "tokens": …, "leaf": …, "finished": …,
            "children": [nodes]}`, all optional (`ForkTree.nested` makes one).
        top: How many likeliest tokens of each source a tooltip lists, if the trace has them.
        most_bytes: Above this size, log-probabilities are rounded and improbable tokens left out, in three steps; the
            page says so. The last step is taken even if it does not suffice.

    Raises:
        InputError: If the trace has no texts, or a tree is no mapping.
    """
    check_texts(trace)
    for i, tree in enumerate(trees):
        if not isinstance(tree, Mapping):
            raise InputError.of(
                f"trees[{i}]",
                expected="a node as nested mappings",
                got=type(tree).__name__,
                remedy="Pass tree.nested(tokenizer.decode).",
            )
    whole("top", top, "of tokens", least=1)
    linear = LINEAR.fullmatch(str(trace.about.get("formula", "")))
    name = str(trace.about.get("model", "")).rstrip("/").rpartition("/")[2]
    title = title or f"{name or 'a trace'}: {len(trace)} {'text' if len(trace) == 1 else 'texts'}"
    head = {
        "title": title,
        "about": dict(trace.about),
        "alpha": float(linear[1]) if linear else None,
        "trees": [dict(tree) for tree in trees],
    }
    made = ""
    for grain, numbers, least, kept in PRECISIONS:
        data = packed(trace, head, top=min(top, kept or top), grain=grain, numbers=numbers, least=least)
        made = _page(title, data)
        if len(made.encode()) <= most_bytes:
            break
    return made


def write_page(trace: Trace, file: str | Path, **options: Any) -> Path:
    """Write `page(trace, **options)` to a file, over one that is there. Returns the file.

    Raises:
        InputError: As `page`; if the name does not end in .html, or its folder does not exist.
    """
    path = Path(file)
    if path.suffix not in (".html", ".htm"):
        raise InputError.of("the page's name", expected="NAME.html", got=str(file), remedy=f"Write {path.stem}.html.")
    if not path.parent.is_dir():
        raise InputError.of(
            "the page's folder", expected="a folder that exists", got=str(path.parent), remedy="Make it first."
        )
    path.write_text(page(trace, **options), encoding="utf-8", newline="\n")
    return path


def framed(trace: Trace, *, most_texts: int = 20, height: int = 640) -> str:
    """A page inside another one: what a notebook shows. Of a long trace, the first texts."""
    inner = page(replace(trace, texts=trace.texts[:most_texts]))
    return (
        f'<iframe sandbox="allow-scripts" title="{escape(repr(trace))}" style="width:100%;height:{height}px;border:0"'
        f' srcdoc="{escape(inner)}"></iframe>'
    )


def _page(title: str, data: str) -> str:
    folder = Path(__file__).parent
    sheet, script, body = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    script = script.replace('"ALPHABET"', f'"{ALPHABET}"')
    packed = f'<script type="application/octet-stream" id="packed">{data}</script>'
    return inert(title, f"{body}\n{packed}", sheet, script)
