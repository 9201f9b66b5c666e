"""The committed records, and how text made of them is wrapped."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

from proxytune.demo.bundle import MEMBERS

__all__ = ["RESULTS", "ROOT", "WIDTH", "keep", "load", "weights", "wrapped"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benches" / "results"
WIDTH = 118


def load(name: str) -> Any:
    """A record."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def keep(name: str, record: Any) -> None:
    """Write a record."""
    (RESULTS / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def weights() -> dict[str, str]:
    """The hashes of the bundled family, since the demo's figures belong to these weights."""
    folder = ROOT / "proxytune" / "demo" / "weights"
    return {
        member: hashlib.sha256((folder / member / "model.safetensors").read_bytes()).hexdigest()
        for member in sorted(MEMBERS)
    }


def wrapped(text: str) -> str:
    """Text with its long lines wrapped; tables are left as they are."""
    return "\n".join(
        textwrap.fill(line, WIDTH, break_on_hyphens=False) if line and not line.startswith("|") else line
        for line in text.split("\n")
    )
