"""The record of the families (`tests/families/matrix.py`) as a table: which are right, in which role and mode."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from _pages.records import ROOT

__all__ = ["families_block"]

FOLDER = ROOT / "tests" / "families" / "results"
ROLES = ("base", "companion", "attached base", "attached companion")
# What a mode asks of a cache, in the order of the table.
NEEDS: dict[str, tuple[str, ...]] = {
    "append": ("greedy", "fused", "chunked"),
    "reorder": ("beams", "forks", "siblings"),
    "repeat": ("repeat",),
    "crop": ("assisted", "lookup", "speculation", "expert-drafts"),
    "static": ("static",),
}
FIRST = ("append", "reorder", "repeat")
OWN = "transformers: "


def families_block() -> str:
    """A table of the newest supported transformers, and how many names of the oldest are right."""
    newest, *older = sorted(
        (json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("transformers-*.json")),
        key=lambda record: [int(part) for part in record["transformers"].split(".")],
        reverse=True,
    )
    rows: dict[str, list[str]] = defaultdict(list)
    for name, result in plain_names(newest).items():
        rows[summary(result)].append(f"{name}*" if is_unpadded(result) else name)
    lines = [
        f"Of transformers {newest['transformers']}, {counted(newest)}. *: prompts of one length alone; left padding is "
        "refused, because the model is wrong there by itself.",
        "",
        "| what is right | families |",
        "|---|---|",
    ]
    for what in sorted(rows, key=lambda w: (not w.startswith("everything"), -len(rows[w]), w)):
        lines.append(f"| {what} ({len(rows[what])}) | {', '.join(rows[what])} |")
    for record in older:
        lines += ["", f"Of transformers {record['transformers']}, {counted(record)}."]
    return "\n".join(lines)


def plain_names(record: Any) -> dict[str, Any]:
    """The names of the mapping, without settings of them."""
    return {name: result for name, result in record["names"].items() if "/" not in name}


def counted(record: Any) -> str:
    names = plain_names(record)
    built = {name: result for name, result in names.items() if "roles" in result}
    good = [
        name
        for name, result in built.items()
        if all(need in right_in(result, role) for role in ROLES for need in FIRST)
    ]
    whole = [name for name in good if all(set(right_in(built[name], role)) == set(NEEDS) for role in ROLES)]
    none = [name for name, result in built.items() if not any(right_in(result, role) for role in ROLES)]
    return (
        f"{len(good)} of {len(names)} names are right in all four roles for what appends to a cache, reorders it or "
        f"repeats it, {len(whole)} of these in every mode; {len(none)} are refused in every role, and "
        f"{len(names) - len(built)} cannot be built alone"
    )


def modes(result: Any, role: str, *outcomes: str) -> set[str]:
    """The modes of a role with one of these outcomes."""
    found = set()
    for outcome in outcomes:
        for named in result["roles"][role].get(outcome, {}).values():
            found |= asked_of(role) if named == "all" else set(named.split())
    return found


def asked_of(role: str, needs: tuple[str, ...] = tuple(NEEDS)) -> set[str]:
    """The modes that a role is asked for."""
    return {m for need in needs for m in NEEDS[need] if m != "expert-drafts" or not role.startswith("attached")}


def right_in(result: Any, role: str) -> list[str]:
    """What of a cache a family is right with, in a role; what transformers refuses by itself does not count."""
    cells = result["roles"][role]
    right = modes(result, role, "right", "unpadded")
    theirs = {m for why, named in cells.get("refused", {}).items() if why.startswith(OWN) for m in named.split()}
    return [need for need in NEEDS if right & (asked := asked_of(role, (need,))) and asked <= right | theirs]


def is_unpadded(result: Any) -> bool:
    return "roles" in result and any(modes(result, role, "unpadded") for role in ROLES)


def summary(result: Any) -> str:
    """What a family is right in, in words."""
    if "roles" not in result:
        return "cannot be built alone: " + ("another package is needed" if "Import" in result["built"] else "fails")
    rights = {role: right_in(result, role) for role in ROLES}
    if not any(rights.values()):
        if result["roles"]["base"].keys() & {"wrong", "crashed"}:
            return "nothing: wrong or failing by itself"
        return f"refused: {reason(next(iter(result['roles']['base']['refused'])))}"
    missing: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for role, right in rights.items():
        missing[tuple(need for need in NEEDS if need not in right)].append(role)
    if set(missing) == {()}:
        return "everything"
    parts = []
    for needs, roles in missing.items():
        if needs:
            where = "" if len(roles) == len(ROLES) else f" as {' and '.join(roles)}"
            parts.append(f"nothing{where}" if len(needs) == len(NEEDS) else f"no {', '.join(needs)}{where}")
    return "everything but: " + "; ".join(parts)


def reason(why: str) -> str:
    """What was refused and why, without the model's class and figures."""
    what, _, got = why.partition(": ")
    got = re.sub(r" by …%| \(allowed.*", "", re.sub(r", in a \S+$", "", got))
    return re.sub(r"^an? \w+ (\([\w-]+\) )?", "", got) if what == "the base" else f"{what}, {got}"
