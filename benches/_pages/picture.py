"""The README's picture, an SVG: what base and steered model write, with the tokens that the shift changed marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import quoteattr

__all__ = ["drawn"]

WIDTH, LEFT, LINE = 888, 24, 24
COLUMN = 8.43
"""The width of a letter, which `textLength` asks for whatever font there is."""
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
STYLE = f"""\
text {{ font: 14px {FONT}; fill: #1f2328; white-space: pre; }}
.ask {{ font-weight: 600; }} .dim {{ fill: #59636e; }} .new {{ fill: #0a5c2b; font-weight: 600; }}
.mark {{ fill: #c9f0d5; }} .page {{ fill: #ffffff; stroke: #d1d9e0; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }} .dim {{ fill: #9198a1; }} .new {{ fill: #7ee2a0; }}
.mark {{ fill: #12402a; }} .page {{ fill: #0d1117; stroke: #3d444d; }}
}}"""


def drawn(record: dict[str, Any]) -> str:
    """The SVG of the answers in the demo's record, in colours for light and for dark pages."""
    rows, y = [], 36
    for one in record["answers"]:
        prompt, _ = one["prompt"].split("\n", 1)
        rows += _row(y, "", [(f"{prompt}  ", "ask"), (f"(right: {one['gold']})", "dim")])
        rows += _row(y + LINE, "base", [(_one_line(one["base"]), "")])
        sign = "✓" if one["proxy"].strip().endswith(f"answer is {one['gold']}.") else "✗"
        rows += _row(y + 2 * LINE, "steered", [*_tokens(one["tokens"]), (f"  {sign}", "dim")])
        y += round(3.8 * LINE)
    rows += _row(y, "", [(f"steered = base + {record['alpha']:g} · (expert − antiexpert); ", "dim"), ("marked", "new")])
    rows += _row(y + LINE, "", [("where the base, after the same text, would have written another token", "dim")])
    height = y + LINE + 20
    said = "; ".join(
        f"{one['prompt'].splitlines()[0]} Base: {_one_line(one['base'])} Steered: {one['proxy'].strip()}"
        for one in record["answers"]
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label={quoteattr(said)}>',
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *rows,
            "</svg>\n",
        ]
    )


def _tokens(steps: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The steered text in pieces; the end of the text is shown where it was changed."""
    first = True
    for step in steps:
        text = step["token"]
        if text.startswith("<|") and not step["changed"]:
            continue
        kind = "new" if step["changed"] else ""
        if first:
            text = text.removeprefix(" ") or "␣"
        elif text.startswith(" "):
            yield " ", ""
            text = text[1:]
        yield text, kind
        first = False


def _row(y: int, name: str, pieces: Any) -> list[str]:
    out, x = [], float(LEFT)
    if name:
        out.append(_text(x, y, "dim", name))
        x += 10 * COLUMN
    for text, kind in pieces:
        if kind == "new":
            wide = len(text) * COLUMN
            out.append(f'<rect class="mark" x="{x - 1:.1f}" y="{y - 15}" width="{wide + 2:.1f}" height="20" rx="3"/>')
        if text.strip():
            out.append(_text(x, y, kind, text))
        x += len(text) * COLUMN
    return out


def _text(x: float, y: int, kind: str, text: str) -> str:
    shown = text.rstrip(" ")
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" textLength="{len(shown) * COLUMN:.1f}">{escaped}</text>'


def _one_line(text: str) -> str:
    return text.strip().replace("\n", "⏎")
