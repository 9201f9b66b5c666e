"""The adapter as a small JSON file: which models, which formula, which α. It never holds weights.

```json
{
  "format_version": 1,
  "base": {"id": "org/large", "revision": null},
  "expert": {"id": "org/small-tuned", "revision": "v2"},
  "antiexpert": {"id": "org/small", "revision": null},
  "formula": "proxy-tuning",
  "alpha": 0.5
}
```

`proxytune calibrate` adds a `fork_threshold` (`ForkCalibration`):
`{"share": 0.2, "nats": 0.41, "tokens": 20000, "temperature": 1.0, "measure": "raw", "alpha": 0.5}`. Where expert
and base end their texts with different tokens, `end_tokens` says whose stop the composition: "union", "base" or
"expert".

An `id` is a hub id or a folder. A relative folder is first looked for next to the recipe, so that a folder with a
recipe and its models can be moved; `save_pretrained` writes folders in or beside the recipe's as relative ones. Unknown
keys are refused, so that a misspelt one is not ignored.

A member may have a `load`: the arguments of `from_pretrained` that decide which model it is (`LOAD_KEYS`), e.g.
`{"id": "models", "revision": null, "load": {"gguf_file": "large.Q4_K_M.gguf"}}`. Its `trust_remote_code` says that the
member has code of its own; that code runs only as `ProxyTunedModel.from_pretrained` tells.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import InputError, RecipeError
from proxytune.json_files import check_form, exchange, read, refuse_unknown
from proxytune.validation import choice, finite, proper_share, whole

__all__ = [
    "FORMAT_VERSION",
    "LOAD_KEYS",
    "MEASURES",
    "RECIPE_FILE",
    "ROLES",
    "EndTokens",
    "ForkCalibration",
    "Measure",
    "MemberRef",
    "Recipe",
    "read_json",
    "write_fork_threshold",
]

FORMAT_VERSION = 1
RECIPE_FILE = "proxytune_config.json"
ROLES = ("base", "expert", "antiexpert")
_KEYS = ("format_version", *ROLES, "formula", "alpha")
_OPTIONAL = ("fork_threshold", "end_tokens")
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
    """

    id: str
    revision: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict, hash=False)

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
        refuse_unknown(value, ("id", "revision", "load"), f"recipe key {role!r}", error=RecipeError)
        name, revision = value.get("id"), value.get("revision")
        if not isinstance(name, str) or not name or not (revision is None or isinstance(revision, str)):
            raise RecipeError.of(
                f"recipe key {role!r}",
                expected="a non-empty string as id, and a string or null as revision",
                got=f"id={name!r}, revision={revision!r}",
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
        return cls(name, revision, dict(load))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        return {"id": self.id, "revision": self.revision, **({"load": dict(self.load)} if self.load else {})}

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
        """The reference with an absolute folder, if there is such a folder in the recipe's `folder`, else itself."""
        # For a name that cannot be a path, e.g. one too long, os.path.isdir is False, whereas Path.is_dir raises.
        if folder is not None and os.path.isdir(folder / self.id):
            return replace(self, id=str((folder / self.id).resolve()), revision=None)
        return self

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
        """The reference with a relative folder, `./…` or `../…`, if it lies in or beside `folder`; else itself."""
        if not os.path.isabs(self.id) or not Path(self.id).is_relative_to(folder.parent):
            return self
        relative = Path(os.path.relpath(self.id, folder)).as_posix()
        return replace(self, id=relative if relative.startswith("..") else f"./{relative}")


EndTokens = Literal["union", "base", "expert"]
"""Whose end tokens stop a text: those of base and expert, or of one of them alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter: members, formula and α.

    Attributes:
        base: The frozen large model.
        expert: The small tuned model.
        antiexpert: The small model that the expert was tuned from.
        formula: The name of the formula (`proxytune.formulas.registry.FORMULAS`).
        alpha: Strength of the shift; finite.
        fork_threshold: The calibrated entropy above which a token of this adapter is a fork; None if not calibrated.
        end_tokens: Whose end tokens stop a text; None where that makes no difference.
    """

    base: MemberRef
    expert: MemberRef
    antiexpert: MemberRef
    formula: str = "proxy-tuning"
    alpha: float = 1.0
    fork_threshold: ForkCalibration | None = None
    end_tokens: EndTokens | None = None

    @property
    def members(self) -> dict[str, MemberRef]:
        """The members by role, base first."""
        return {role: getattr(self, role) for role in ROLES}

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads, with the format version."""
        members = {role: ref.to_json() for role, ref in self.members.items()}
        threshold = {} if self.fork_threshold is None else {"fork_threshold": asdict(self.fork_threshold)}
        ends = {} if self.end_tokens is None else {"end_tokens": self.end_tokens}
        formula = {"formula": self.formula, "alpha": self.alpha}
        return {"format_version": FORMAT_VERSION, **members, **formula, **threshold, **ends}

    @classmethod
    def from_json(cls, data: Any, *, folder: Path | None = None) -> Recipe:
        """Read a recipe from parsed JSON.

        Args:
            data: The parsed file.
            folder: The file's folder, against which relative member folders are resolved.

        Raises:
            RecipeError: If keys are missing or unknown, the format is newer than this version reads, or a value has the
                wrong form.
        """
        from proxytune.formulas.registry import FORMULAS
        from proxytune.validation import validate_alpha

        data = check_form(
            data,
            "recipe",
            version=FORMAT_VERSION,
            keys=_KEYS,
            optional=_OPTIONAL,
            error=RecipeError,
            see="proxytune.recipe",
        )
        if not isinstance(data["formula"], str) or data["formula"] not in FORMULAS:
            raise RecipeError.of(
                "recipe key 'formula'",
                expected=f"one of {', '.join(FORMULAS)}",
                got=repr(data["formula"]),
                remedy="Correct the name; or, for a formula of your own, first import the module that adds it to "
                "proxytune.formulas.FORMULAS.",
            )
        try:
            alpha = validate_alpha(data["alpha"])
        except InputError as error:
            raise RecipeError(f"recipe key 'alpha': {error}") from None
        refs = {role: MemberRef.from_json(data[role], role).beside(folder) for role in ROLES}
        for role, ref in refs.items():
            if folder is not None and ref.id == str(folder.resolve()):
                raise RecipeError.of(
                    f"recipe key {role!r}",
                    expected="the folder of a model",
                    got=f"the folder of the recipe itself, {ref.id}",
                    remedy="Loading it would recurse forever: name the model's folder.",
                )
        ends = data.get("end_tokens")
        try:
            ends = None if ends is None else choice("recipe key 'end_tokens'", ends, get_args(EndTokens))
        except InputError as error:
            raise RecipeError(str(error)) from None
        return cls(
            **refs,
            formula=data["formula"],
            alpha=alpha,
            fork_threshold=_fork_threshold(data.get("fork_threshold")),
            end_tokens=ends,
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from its JSON file or that file's folder; RecipeError if missing, not JSON or refused."""
        file = Path(path)
        if file.is_dir():
            file = file / RECIPE_FILE
        return cls.from_json(read_json(file), folder=file.parent)

    def dumps(self) -> str:
        """The file's text: indented JSON with a final newline."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _fork_threshold(value: Any) -> ForkCalibration | None:
    """Read the calibration in a recipe; null means none."""
    if value is None:
        return None
    where, known = "recipe key 'fork_threshold'", tuple(field.name for field in fields(ForkCalibration))
    missing = [key for key in ("share", "nats", "tokens") if key not in value] if isinstance(value, Mapping) else None
    if missing is None or missing:
        raise RecipeError.of(
            where,
            expected="an object with share, nats and tokens",
            got=type(value).__name__ if missing is None else f"no {', '.join(missing)}",
            remedy="Run proxytune calibrate --recipe … --write, or remove the key.",
        )
    refuse_unknown(value, known, where, error=RecipeError)
    try:
        return ForkCalibration(**value)
    except InputError as error:
        raise RecipeError(f"{where}: {error}") from None


def write_fork_threshold(path: str | Path, calibration: ForkCalibration) -> Path:
    """Write a calibration into a recipe (file or folder) and change nothing else; relative folders stay relative.

    The file is replaced atomically, or left unchanged. Returns the file.

    Raises:
        RecipeError: If there is no such recipe, it is refused (see `Recipe.from_json`), or it cannot be written.
    """
    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    data = read_json(file)
    Recipe.from_json(data)
    return exchange(file, data | {"fork_threshold": asdict(calibration)}, "recipe", error=RecipeError)


def read_json(file: Path) -> Any:
    """Parse a recipe's file without checking its content; RecipeError if it cannot be read or is not JSON."""
    return read(
        file,
        "recipe",
        sought=f"a {RECIPE_FILE}",
        error=RecipeError,
        remedy="Give the file or the folder that model.save_pretrained(folder) wrote.",
    )


Measure = Literal["raw", "scaled", "truncated"]
"""What the entropy is of: the combined logits; these over the temperature; these after top-k, top-p and min-p."""

MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class ForkCalibration:
    """The result of a calibration, as the recipe keeps it.

    Attributes:
        share: The wanted share of tokens that are forks, in (0, 1).
        nats: The entropy above which a token is a fork; finite.
        tokens: Number of tokens it was measured on.
        temperature: Temperature they were sampled at; None for given texts.
        measure: What the entropy was taken of.
        alpha: The α of the shift then; None if not recorded or without a shift.
    """

    share: float
    nats: float
    tokens: int
    temperature: float | None = None
    measure: Measure = "raw"
    alpha: float | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "share": proper_share(self.share),
            "nats": finite("nats", self.nats),
            "tokens": whole("tokens", self.tokens, least=1, remedy="Calibrate on some text."),
            "measure": choice("measure", self.measure, MEASURES),
        }
        if self.temperature is not None:
            checked["temperature"] = finite("temperature", self.temperature, above=0.0)
        if self.alpha is not None:
            checked["alpha"] = finite("alpha", self.alpha)
        for name, value in checked.items():  # as Python's own types, which JSON can hold
            object.__setattr__(self, name, value)
