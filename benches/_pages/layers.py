"""The tables of what modes need of a cache, and which layers can do it, from the code that refuses by them."""

from __future__ import annotations

from typing import get_args

from proxytune.models.members.layer_kinds import ABLE, NEEDS, REWOUND, Ability

__all__ = ["layers_block"]


def layers_block() -> str:
    """Two tables: layer kind × ability, and mode → abilities."""
    abilities = get_args(Ability)
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, able in ABLE.items():
        shown = tuple(
            "no" if a not in able else "by kept states" if a == "crop" and kind in REWOUND else "yes" for a in abilities
        )
        alike.setdefault(shown, []).append(f"`{kind}`")
    lines = ["| layers | " + " | ".join(abilities) + " |", "|---|" + "---|" * len(abilities)]
    lines += [f"| {', '.join(kinds)} | " + " | ".join(shown) + " |" for shown, kinds in alike.items()]
    lines += ["", "| mode | needs |", "|---|---|"]
    lines += [f"| {mode} | {', '.join(needs)} |" for mode, needs in NEEDS.items()]
    return "\n".join(lines)
