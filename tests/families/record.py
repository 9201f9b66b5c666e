"""Results of the matrix as a record: one line a name, without what changes from machine to machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers

__all__ = ["FOLDER", "compact", "modes_of", "read", "write"]

FOLDER = Path(__file__).parent / "results"


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A name's results, its modes grouped by outcome and reason."""
    if "built" in result:
        return {"built": result["built"]}
    roles = {}
    for role, cells in result["roles"].items():
        # Outcome → reason → modes.
        grouped: dict[str, dict[str, list[str]]] = {}
        for mode, cell in cells.items():
            grouped.setdefault(cell["is"], {}).setdefault(reason(cell), []).append(mode)
        roles[role] = {
            outcome: {why: "all" if len(modes) == len(cells) else " ".join(modes) for why, modes in groups.items()}
            for outcome, groups in grouped.items()
        }
    return {"kinds": result["kinds"], "alone": sorted(result.get("alone", {})), "roles": roles}


def modes_of(cells: dict[str, dict[str, str]], mode: str) -> tuple[str, str]:
    """The outcome of one mode of a role, and why; "" for a mode that was not run."""
    for outcome, groups in cells.items():
        for why, modes in groups.items():
            if modes == "all" or mode in modes.split():
                return outcome, why
    return "", ""


def reason(cell: dict[str, str]) -> str:
    """Why, in short: what was refused and what came, of a message "what: expected …; got …. remedy"."""
    why = cell.get("why", "")
    if cell["is"] in ("refused", "unpadded"):
        if cell.get("kind") == "transformers":
            return f"transformers: {why.split(', such as')[0]}"
        found = re.match(r"(?P<what>[^:]*): expected .*?; got (?P<got>.*?)\. [A-Z]", f"{why} X")
        why = f"{found['what']}: {found['got']}" if found else why
    return re.sub(r"\d[\d.]*%", "…%", why)


def write(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Write a record of uncompacted results; names already in the file and not in these stay."""
    held = read(file)["names"] if file.exists() else {}
    held |= {name: compact(result) for name, result in results.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(held[name], ensure_ascii=False)}" for name in sorted(held)]
    head = f' "transformers": {json.dumps(transformers.__version__)},\n "names": {{\n'
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + head + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    """A record."""
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return held
