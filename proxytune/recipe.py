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

A `fork_threshold` may stand beside them, which is what `proxytune calibrate` found (`ForkCalibration`):
`{"share": 0.2, "nats": 0.41, "tokens": 20000, "temperature": 1.0, "measure": "raw", "alpha": 0.5}`.

An `id` is a hub id or a folder. A relative folder is looked for next to the recipe first, so that a folder that holds a
recipe and its models can be moved as one. Unknown keys are refused by name: a misspelt knob must not be ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import InputError, RecipeError
from proxytune.json_files import check_form, exchange, read, refuse_unknown
from proxytune.validation import choice, finite, proper_share, whole

__all__ = [
    "FORMAT_VERSION",
    "MEASURES",
    "RECIPE_FILE",
    "ROLES",
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
_OPTIONAL = ("fork_threshold",)


@dataclass(frozen=True)
class MemberRef:
    """Where one member is to be had.

    Attributes:
        id: A hub id or a folder.
        revision: A branch, tag or commit on the hub; None for the default one, and for folders.
    """

    id: str
    revision: str | None = None

    @classmethod
    def from_json(cls, value: Any, role: str) -> MemberRef:
        """Read a member from a recipe.

        Args:
            value: A string, or `{"id": …, "revision": …}`.
            role: The member's role, for the message.

        Returns:
            The reference.

        Raises:
            RecipeError: If the value has another form or unknown keys.
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
        refuse_unknown(value, ("id", "revision"), f"recipe key {role!r}", error=RecipeError)
        name, revision = value.get("id"), value.get("revision")
        if not isinstance(name, str) or not name or not (revision is None or isinstance(revision, str)):
            raise RecipeError.of(
                f"recipe key {role!r}",
                expected="a non-empty string as id, and a string or null as revision",
                got=f"id={name!r}, revision={revision!r}",
                remedy="Name a hub id or a folder.",
            )
        return cls(name, revision)

    def beside(self, folder: Path | None) -> MemberRef:
        """Resolve a relative folder against the folder of the recipe.

        Args:
            folder: The folder that holds the recipe; None if the recipe came from the hub.

        Returns:
            The reference with an absolute folder if there is one beside the recipe, else itself.
        """
        # os.path.isdir is False for what cannot be a path, such as a name too long, where Path.is_dir raises.
        if folder is not None and os.path.isdir(folder / self.id):
            return MemberRef(str((folder / self.id).resolve()), None)
        return self


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An adapter: members, formula and α.

    Attributes:
        base: The frozen large model.
        expert: The small tuned model.
        antiexpert: The small model that the expert was tuned from.
        formula: The name of the formula (`proxytune.formulas.registry.FORMULAS`).
        alpha: The strength α of the shift; finite.
        fork_threshold: From which entropy on a token of this adapter is a fork; None if it was not calibrated.
    """

    base: MemberRef
    expert: MemberRef
    antiexpert: MemberRef
    formula: str = "proxy-tuning"
    alpha: float = 1.0
    fork_threshold: ForkCalibration | None = None

    @property
    def members(self) -> dict[str, MemberRef]:
        """The members by role, base first."""
        return {role: getattr(self, role) for role in ROLES}

    def to_json(self) -> dict[str, Any]:
        """The recipe as the object that `from_json` reads.

        Returns:
            A dictionary of JSON values, with the format version.
        """
        members = {role: {"id": ref.id, "revision": ref.revision} for role, ref in self.members.items()}
        threshold = {} if self.fork_threshold is None else {"fork_threshold": asdict(self.fork_threshold)}
        return {"format_version": FORMAT_VERSION, **members, "formula": self.formula, "alpha": self.alpha, **threshold}

    @classmethod
    def from_json(cls, data: Any, *, folder: Path | None = None) -> Recipe:
        """Read a recipe from parsed JSON.

        Args:
            data: The parsed file.
            folder: The folder it lay in; relative member folders are resolved against it.

        Returns:
            The recipe.

        Raises:
            RecipeError: If keys are missing or unknown, the format is newer than this version reads, or a value has
                the wrong form.
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
                remedy="Correct the name, or upgrade proxytune.",
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
                    remedy="Opening it would never end. Name the model.",
                )
        return cls(
            **refs, formula=data["formula"], alpha=alpha, fork_threshold=_fork_threshold(data.get("fork_threshold"))
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from disk.

        Args:
            path: The JSON file, or the folder that holds `proxytune_config.json`.

        Returns:
            The recipe.

        Raises:
            RecipeError: If there is no such file, it is no JSON, or its content is refused (see `from_json`).
        """
        file = Path(path)
        if file.is_dir():
            file = file / RECIPE_FILE
        return cls.from_json(read_json(file), folder=file.parent)

    def dumps(self) -> str:
        """The file's text.

        Returns:
            Indented JSON with a final newline.
        """
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _fork_threshold(value: Any) -> ForkCalibration | None:
    """Read the calibration in a recipe; null is as good as none."""
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
    """Write a calibration into a recipe on disk, and change nothing else in it.

    Member folders stay as they were written, relative ones too. The file is exchanged as a whole, or left as it was.

    Args:
        path: The JSON file, or the folder that holds `proxytune_config.json`.
        calibration: What the run found.

    Returns:
        The file.

    Raises:
        RecipeError: If there is no such recipe, it is refused (see `Recipe.from_json`), or it cannot be written.
    """
    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    data = read_json(file)
    Recipe.from_json(data)
    return exchange(file, data | {"fork_threshold": asdict(calibration)}, "recipe", error=RecipeError)


def read_json(file: Path) -> Any:
    """Read the JSON of a recipe, without looking at what it says.

    Args:
        file: The file.

    Returns:
        The parsed JSON.

    Raises:
        RecipeError: If there is no such file, it cannot be read, or it is no JSON.
    """
    return read(
        file,
        "recipe",
        sought=f"a {RECIPE_FILE}",
        error=RecipeError,
        remedy="Give the file or the folder that model.save_pretrained(folder) wrote.",
    )


Measure = Literal["raw", "scaled", "truncated"]


"""Of what the entropy is: the combined logits; these at the sampling temperature; these after top-k, top-p, min-p."""


MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class ForkCalibration:
    """What a calibration run found, as the recipe keeps it.

    Attributes:
        share: The share of tokens that were to be forks, in (0, 1).
        nats: The entropy h above which a token is one; finite.
        tokens: How many tokens it was measured on.
        temperature: At which they were sampled; None for given texts.
        measure: Of what the entropy was taken.
        alpha: The α of the shift at that time; None if it was not noted, or there was none.

    Raises:
        InputError: If a value is out of its range.
    """

    share: float
    nats: float
    tokens: int
    temperature: float | None = None
    measure: Measure = "raw"
    alpha: float | None = None

    def __post_init__(self) -> None:
        proper_share(self.share)
        finite("nats", self.nats)
        whole("tokens", self.tokens, least=1, remedy="Calibrate on some text.")
        if self.temperature is not None:
            finite("temperature", self.temperature, above=0.0)
        choice("measure", self.measure, MEASURES)
        if self.alpha is not None:
            finite("alpha", self.alpha)
