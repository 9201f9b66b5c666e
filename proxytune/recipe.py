"""The adapter as a small JSON file: which models, which formula, which α. It never holds weights.

```json
{
  "format_version": 2,
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

`formula` is a name out of `proxytune.formulas.FORMULAS`, with its further `settings`, or a sum that is written down.
Members of other names stand in `members`; one that is another's model once more is a view of it (`View`):

```json
{
  "format_version": 2,
  "base": {"id": "org/large", "revision": null},
  "formula": "1.5*base - 0.5*no_context",
  "alpha": 1.0,
  "members": {"no_context": {"of": "base", "prompt": {"without": ["<context>", "</context>"]}}},
  "settings": {"gate": {"entropy": 0.1}}
}
```

`proxytune tune --write` adds `evidence`: under `tune`, for each number that was tuned, the file (name and SHA-256), the
items, the curve and the chosen value; under `test`, the files that nothing may be tuned on.

A strength that changes while a text is written is a text, such as `"linear(1, 0, 64)"`. Recipes of version 1, which
know proxy-tuning's three roles alone, are read as well.

An `id` is a hub id or a folder. A relative folder is first looked for next to the recipe, so that a folder with a
recipe and its models can be moved; `save_pretrained` writes folders in or beside the recipe's as relative ones. Unknown
keys are refused, so that a misspelt one is not ignored.

A member that carries an adapter names its folder or hub id as `adapter`. A member may have a `load`: the arguments of
`from_pretrained` that decide which model it is (`LOAD_KEYS`), e.g.
`{"id": "models", "revision": null, "load": {"gguf_file": "large.Q4_K_M.gguf"}}`. Its `trust_remote_code` says that the
member has code of its own; that code runs only as `ProxyTunedModel.from_pretrained` tells.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import InputError, RecipeError
from proxytune.formulas.view import View
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
    "write_tuned",
]

FORMAT_VERSION = 2
RECIPE_FILE = "proxytune_config.json"
ROLES = ("base", "expert", "antiexpert")
_KEYS = ("format_version", "base", "formula")
_OF_THREE = ("expert", "antiexpert", "alpha")
_OPTIONAL = ("members", "settings", "fork_threshold", "end_tokens", "evidence")
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


EndTokens = Literal["union", "base", "expert"]
"""Whose end tokens stop a text: those of base and expert, or of one of them alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter: members, formula and α.

    Attributes:
        base: The frozen large model.
        expert: The small tuned model, for formulas that have one.
        antiexpert: The small model that the expert was tuned from, for formulas that have one.
        formula: The name of the formula (`proxytune.formulas.registry.FORMULAS`), or a sum as a text.
        alpha: Strength of the shift; finite, or a schedule as a text.
        others: The formula's other members, by role.
        settings: The formula's other settings, as JSON: its gate, its mask.
        fork_threshold: The calibrated entropy above which a token of this adapter is a fork; None if not calibrated.
        end_tokens: Whose end tokens stop a text; None where that makes no difference.
        evidence: What α and other numbers were chosen on, and what is test data (`write_tuned`); None for nothing.
    """

    base: MemberRef
    expert: MemberRef | View | None = None
    antiexpert: MemberRef | View | None = None
    formula: str = "proxy-tuning"
    alpha: float | str = 1.0
    others: Mapping[str, MemberRef | View] = field(default_factory=dict, hash=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fork_threshold: ForkCalibration | None = None
    end_tokens: EndTokens | None = None
    evidence: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, members: Mapping[str, MemberRef | View], **settings: Any) -> Recipe:
        """A recipe of members by role, the base among them."""
        own = {role: ref for role, ref in members.items() if role in ROLES}
        others = {role: ref for role, ref in members.items() if role not in ROLES}
        return cls(**own, others=others, **settings)  # type: ignore[arg-type]

    def at(self, places: Mapping[str, MemberRef]) -> Recipe:
        """The same with members, by role, that lie in other places."""
        own = {role: ref for role, ref in places.items() if role in ROLES}
        others = {role: ref for role, ref in places.items() if role not in ROLES}
        return replace(self, **own, others={**self.others, **others})  # type: ignore[arg-type]

    @property
    def everyone(self) -> dict[str, MemberRef | View]:
        """Members and views by role, base first."""
        own = {role: getattr(self, role) for role in ROLES}
        return {role: ref for role, ref in own.items() if ref is not None} | dict(self.others)

    @property
    def members(self) -> dict[str, MemberRef]:
        """The members that are loaded, by role, base first."""
        return {role: ref for role, ref in self.everyone.items() if isinstance(ref, MemberRef)}

    @property
    def views(self) -> dict[str, View]:
        """The members that are another member's model once more, by role."""
        return {role: ref for role, ref in self.everyone.items() if isinstance(ref, View)}

    def made_formula(self) -> Any:
        """The formula; RecipeError if its name or settings are wrong."""
        from proxytune.formulas.registry import made

        try:
            return made(self.formula, self.alpha, self.settings)
        except InputError as error:
            raise RecipeError(
                f"recipe key {'alpha' if str(error).startswith('alpha') else 'formula'!r}: {error}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads, with the format version."""
        members = {role: ref.to_json() for role, ref in self.everyone.items() if role in ROLES}
        others = {role: ref.to_json() for role, ref in self.others.items()}
        threshold = None if self.fork_threshold is None else asdict(self.fork_threshold)
        optional = {
            "members": others or None,
            "settings": dict(self.settings) or None,
            "fork_threshold": threshold,
            "end_tokens": self.end_tokens,
            "evidence": None if self.evidence is None else dict(self.evidence),
        }
        return {
            "format_version": FORMAT_VERSION,
            **members,
            "formula": self.formula,
            "alpha": self.alpha,
            **{key: value for key, value in optional.items() if value is not None},
        }

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
        of_three = isinstance(data, Mapping) and data.get("format_version") == 1
        data = check_form(
            data,
            "recipe",
            version=FORMAT_VERSION,
            keys=("format_version", *ROLES, "formula", "alpha") if of_three else _KEYS,
            optional=("fork_threshold", "end_tokens") if of_three else (*_OF_THREE, *_OPTIONAL),
            error=RecipeError,
            see="proxytune.recipe",
        )
        refs: dict[str, MemberRef | View] = {"base": MemberRef.from_json(data["base"], "base").beside(folder)}
        for role, value in {**{r: data[r] for r in ROLES[1:] if r in data}, **_others(data)}.items():
            refs[role] = _member(value, role, folder)
        for role, ref in refs.items():
            if folder is not None and isinstance(ref, MemberRef) and ref.id == str(folder.resolve()):
                raise RecipeError.of(
                    f"recipe key {role!r}",
                    expected="the folder of a model",
                    got=f"the folder of the recipe itself, {ref.id}",
                    remedy="Loading it would recurse forever: name the model's folder.",
                )
        ends, settings, evidence = data.get("end_tokens"), data.get("settings") or {}, data.get("evidence")
        for key, value in (("settings", settings), ("evidence", evidence)):
            if not isinstance(value, Mapping | None):
                raise RecipeError.of(
                    f"recipe key {key!r}", expected="an object", got=repr(value), remedy="Correct it, or remove it."
                )
        _check_evidence(evidence or {})
        try:
            ends = None if ends is None else choice("recipe key 'end_tokens'", ends, get_args(EndTokens))
        except InputError as error:
            raise RecipeError(str(error)) from None
        recipe = cls.of(
            refs,
            formula=data["formula"],
            alpha=_given_alpha(data),
            settings=dict(settings),
            fork_threshold=_fork_threshold(data.get("fork_threshold")),
            end_tokens=ends,
            evidence=evidence,
        )
        recipe = replace(recipe, alpha=_alpha(recipe))
        missing = [role for role in recipe.made_formula().roles if role not in {**refs, **_implied(recipe)}]
        if missing:
            raise RecipeError.of(
                "recipe",
                expected=f"a member for each role of the formula {recipe.formula!r}",
                got=f"no {', '.join(missing)}",
                remedy='Add them under "members", or correct the formula.',
            )
        viewed = {view.of for view in recipe.views.values()}
        if strange := sorted(refs.keys() - {"base", *recipe.made_formula().roles} - viewed):
            raise RecipeError.of(
                "recipe",
                expected=f"members of the formula {recipe.formula!r}: {', '.join(recipe.made_formula().roles)}",
                got=", ".join(strange),
                remedy="Remove them, or name them in the formula.",
            )
        return recipe

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


def _check_evidence(evidence: Mapping[str, Any]) -> None:
    tuned, test = evidence.get("tune", {}), evidence.get("test", [])
    named = isinstance(test, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("file"), str) and isinstance(one.get("sha256"), str)
        for one in test
    )
    if not isinstance(tuned, Mapping) or not named:
        raise RecipeError.of(
            "recipe key 'evidence'",
            expected='an object under "tune", and under "test" a list of objects with file and sha256',
            got=f"tune={tuned!r}, test={test!r}"[:120],
            remedy="Correct it, or remove the key.",
        )


def _others(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The members of other names in a recipe."""
    others = data.get("members") or {}
    given = data.get("members")
    strange = [role for role in others if role in ROLES] if isinstance(others, Mapping) else given
    if strange or not isinstance(given, Mapping | None):
        raise RecipeError.of(
            "recipe key 'members'",
            expected=f"an object of members by role, other than {', '.join(ROLES)}, which are keys of the recipe",
            got=repr(strange or given),
            remedy='Write e.g. {"math": {"id": "org/small-math"}}.',
        )
    return others


def _member(value: Any, role: str, folder: Path | None) -> MemberRef | View:
    if not (isinstance(value, Mapping) and "of" in value):
        return MemberRef.from_json(value, role).beside(folder)
    refuse_unknown(value, ("of", "prompt", "adapter"), f"recipe key {role!r}", error=RecipeError)
    try:
        return View.from_json(value)
    except InputError as error:
        raise RecipeError(f"recipe key {role!r}: {error}") from None


def _given_alpha(data: Mapping[str, Any]) -> Any:
    """The α of a parsed file; None for the formula's own default, which an explicit null is not."""
    from proxytune.validation import validate_alpha

    if "alpha" in data and data["alpha"] is None:
        try:
            validate_alpha(None)
        except InputError as error:
            raise RecipeError(f"recipe key 'alpha': {error}") from None
    return data.get("alpha")


def _alpha(recipe: Recipe) -> float | str:
    """The recipe's α as its formula has it; RecipeError if formula or α are wrong."""
    from proxytune.formulas.registry import FORMULAS, is_expression

    if not isinstance(recipe.formula, str) or not (recipe.formula in FORMULAS or is_expression(recipe.formula)):
        raise RecipeError.of(
            "recipe key 'formula'",
            expected=f"one of {', '.join(FORMULAS)}, or a sum such as 'base + 0.5*(math - small)'",
            got=repr(recipe.formula),
            remedy="Correct the name; or, for a formula of your own, first import the module that adds it to "
            "proxytune.formulas.FORMULAS.",
        )
    alpha = recipe.made_formula().alpha
    return alpha if isinstance(alpha, float) else str(alpha)


def _implied(recipe: Recipe) -> Mapping[str, View]:
    """The views that a formula has by itself."""
    views: Mapping[str, View] = getattr(recipe.made_formula(), "views", {})
    return views


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


def write_tuned(
    path: str | Path, formula: Any, knob: str, evidence: Mapping[str, Any], test: Sequence[Mapping[str, str]] = ()
) -> Path:
    """Write a tuned formula into a recipe (file or folder) with its evidence; what else it holds stays as it is.

    Under `evidence`, `tune` keeps the newest evidence of each knob, and `test` the files that are held out: each with
    its `file` name and `sha256`. A recipe of format 1 becomes one of the newest format. The file is replaced
    atomically, or left unchanged.

    Args:
        path: The recipe.
        formula: The formula at the chosen value.
        knob: What was tuned.
        evidence: JSON values: the file's name and SHA-256, the number of items, the curve, the chosen value.
        test: Files that nothing may be tuned on.

    Returns:
        The file.

    Raises:
        RecipeError: If there is no such recipe, it is refused (see `Recipe.from_json`), or it cannot be written.
    """
    from proxytune.formulas.registry import recipe_of

    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    data = read_json(file)
    kept = Recipe.from_json(data).evidence or {}
    held_out = {one["sha256"]: one for one in (*kept.get("test", ()), *test)}
    found = {**kept, "tune": {**kept.get("tune", {}), knob: dict(evidence)}}
    if held_out:
        found["test"] = [dict(one) for one in held_out.values()]
    data |= recipe_of(formula) | {"format_version": FORMAT_VERSION, "evidence": found}
    if not data["settings"]:
        del data["settings"]
    Recipe.from_json(data)
    return exchange(file, data, "recipe", error=RecipeError)


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
