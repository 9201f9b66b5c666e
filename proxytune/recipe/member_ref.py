"""Where a member is loaded from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proxytune.errors import RecipeError
from proxytune.json_files import refuse_unknown

__all__ = ["LOAD_KEYS", "ROLES", "MemberRef"]

ROLES = ("base", "expert", "antiexpert")
_COMMIT = re.compile(r"[0-9a-f]{40}")

LOAD_KEYS: Mapping[str, type] = {
    "quantization_config": Mapping,
    "gguf_file": str,
    "subfolder": str,
    "variant": str,
    "code_revision": str,
    "trust_remote_code": bool,
}
"""The arguments of `from_pretrained` that a recipe keeps for a member, with their types in JSON."""


@dataclass(frozen=True)
class MemberRef:
    """Where to load one member from.

    Attributes:
        id: A hub id or a folder.
        revision: A branch, tag or commit on the hub; None for the default one, and for folders.
        load: What else decides which model it is: arguments of `from_pretrained`. A recipe keeps `LOAD_KEYS` only.
        adapter: A folder or hub id of a PEFT adapter that it carries; None for none.
    """

    id: str
    revision: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adapter: str | None = None

    @classmethod
    def from_json(cls, value: Any, role: str) -> MemberRef:
        """Read a member from a string or `{"id": …, "revision": …, "load": …}`, the last two optional.

        Raises:
            RecipeError: If it has another form or unknown keys.
        """
        if isinstance(value, str):
            value = {"id": value}
        if not isinstance(value, Mapping):
            raise RecipeError.of(
                f"recipe key {role!r}",
                expected="a string or an object with an id",
                got=type(value).__name__,
                remedy='Write e.g. {"id": "org/model", "revision": null}.',
            )
        refuse_unknown(value, ("id", "revision", "load", "adapter"), f"recipe key {role!r}", error=RecipeError)
        name, revision, adapter = value.get("id"), value.get("revision"), value.get("adapter")
        others = all(x is None or isinstance(x, str) for x in (revision, adapter))
        if not isinstance(name, str) or not name or not others:
            raise RecipeError.of(
                f"recipe key {role!r}",
                expected="a non-empty string as id, and a string or null as revision",
                got=f"id={name!r}, revision={revision!r}" + (f", adapter={adapter!r}" if adapter else ""),
                remedy="Name a hub id or a folder.",
            )
        load, where = value.get("load") or {}, f"recipe key 'load' of {role!r}"
        if not isinstance(load, Mapping):
            raise RecipeError.of(
                where, expected="an object", got=type(load).__name__, remedy='Write e.g. {"gguf_file": "large.gguf"}.'
            )
        refuse_unknown(load, tuple(LOAD_KEYS), where, error=RecipeError)
        for key, given in load.items():
            if not isinstance(given, LOAD_KEYS[key]):
                kind = "an object" if LOAD_KEYS[key] is Mapping else f"a {LOAD_KEYS[key].__name__}"
                raise RecipeError.of(
                    f"{key!r} in {where}", expected=kind, got=repr(given), remedy="Correct it, or remove the key."
                )
        return cls(name, revision, dict(load), adapter)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        load = {"load": dict(self.load)} if self.load else {}
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {"id": self.id, "revision": self.revision, **load, **adapter}

    def not_kept(self) -> str | None:
        """An argument in `load` that a recipe cannot keep; None if it can keep all."""
        for key, value in self.load.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                return key
            if key not in LOAD_KEYS:
                return key
        return None

    def beside(self, folder: Path | None) -> MemberRef:
        """The reference with absolute folders, if there are such folders in the recipe's `folder`, else itself."""
        found = self
        # For a name that cannot be a path, e.g. one too long, os.path.isdir is False, whereas Path.is_dir raises.
        if folder is not None and os.path.isdir(folder / self.id):
            found = replace(found, id=str((folder / self.id).resolve()), revision=None)
        if folder is not None and self.adapter is not None and os.path.isdir(folder / self.adapter):
            found = replace(found, adapter=str((folder / self.adapter).resolve()))
        return found

    def trusted(self, recipe: bool) -> MemberRef:
        """The reference as the reader of a recipe may use it, who trusts the recipe's repository or does not.

        `trust_remote_code` stays where that trust covers it: if the recipe pins the very code, by a commit on the hub.
        """
        load = dict(self.load)
        named = load.pop("trust_remote_code", False)
        # Code from another repository has a revision of its own; the member's pins it only if there is such a commit.
        revisions = (self.revision or "", load.get("code_revision") or self.revision or "")
        if named and recipe and all(map(_COMMIT.fullmatch, revisions)):
            load |= {"trust_remote_code": True, "code_revision": revisions[1]}
        return replace(self, load=load)

    def seen_from(self, folder: Path) -> MemberRef:
        """The reference with relative folders, `./…` or `../…`, where they lie in or beside `folder`."""
        adapter = None if self.adapter is None else _seen_from(folder, self.adapter)
        return replace(self, id=_seen_from(folder, self.id), adapter=adapter)


def _seen_from(folder: Path, place: str) -> str:
    if not os.path.isabs(place) or not Path(place).is_relative_to(folder.parent):
        return place
    relative = Path(os.path.relpath(place, folder)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"
