"""Submodules on first use, and what a wrong name of the package may mean; read from the sources, not imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["advice", "lazy_submodules"]

_LISTED = re.compile(r"^__all__ = \[(.*?)\]", re.DOTALL | re.MULTILINE)
_APART = ("cli", "throughput", "torch_impl", "validation", "json_files")


def lazy_submodules(package: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that imports its submodules on first use."""

    def load(name: str) -> Any:
        if name[0] != "_" and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load


def advice(name: str, own: Iterable[str]) -> str | None:
    """What to do about a name that `proxytune` has not, where some module has it, or a similar one; else None."""
    if name[0] == "_":  # asked for by tools, not by people
        return None
    own, elsewhere = list(own), _elsewhere()
    if name in elsewhere:
        return f"It is in {elsewhere[name]}: from {elsewhere[name]} import {name}"
    near = difflib.get_close_matches(name, [*own, *elsewhere], n=1, cutoff=0.75)
    if not near:
        return None
    return f"Did you mean {near[0] if near[0] in own else f'{elsewhere[near[0]]}.{near[0]}'}?"


def _elsewhere() -> dict[str, str]:
    """Every public name below the package → the highest module that lists it."""
    root = Path(__file__).parent
    homes: dict[str, str] = {}
    for source in root.rglob("*.py"):
        parts = source.relative_to(root.parent).with_suffix("").parts
        if any(part in _APART or (part[0] == "_" and part != "__init__") for part in parts):
            continue
        home = ".".join(part for part in parts if part != "__init__")
        listed = _LISTED.search(source.read_text(encoding="utf-8"))
        for name in re.findall(r'"(\w+)"', listed[1] if listed else ""):
            homes[name] = min(home, homes.get(name, home), key=lambda dotted: (dotted.count("."), dotted))
    return homes
