"""The recipe: read strictly, written as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import InputError, RecipeError
from proxytune.formulas.view import View
from proxytune.json_files import check_form, read
from proxytune.recipe.fork_calibration import ForkCalibration, read_fork_threshold
from proxytune.recipe.keys import check_evidence, check_formula, given_alpha, member, other_members
from proxytune.recipe.member_ref import ROLES, MemberRef
from proxytune.validation import choice

__all__ = ["FORMAT_VERSION", "RECIPE_FILE", "EndTokens", "Recipe", "read_json"]

FORMAT_VERSION = 2
RECIPE_FILE = "proxytune_config.json"
_KEYS = ("format_version", "base", "formula")
_OF_THREE = ("expert", "antiexpert", "alpha")
_OPTIONAL = ("members", "settings", "fork_threshold", "end_tokens", "evidence")

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
        for role, value in {**{r: data[r] for r in ROLES[1:] if r in data}, **other_members(data)}.items():
            refs[role] = member(value, role, folder)
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
        check_evidence(evidence or {})
        try:
            ends = None if ends is None else choice("recipe key 'end_tokens'", ends, get_args(EndTokens))
        except InputError as error:
            raise RecipeError(str(error)) from None
        recipe = cls.of(
            refs,
            formula=data["formula"],
            alpha=given_alpha(data),
            settings=dict(settings),
            fork_threshold=read_fork_threshold(data.get("fork_threshold")),
            end_tokens=ends,
            evidence=evidence,
        )
        check_formula(recipe.formula)
        made = recipe.made_formula()
        recipe = replace(recipe, alpha=made.alpha if isinstance(made.alpha, float) else str(made.alpha))
        missing = [role for role in made.roles if role not in {**refs, **getattr(made, "views", {})}]
        if missing:
            raise RecipeError.of(
                "recipe",
                expected=f"a member for each role of the formula {recipe.formula!r}",
                got=f"no {', '.join(missing)}",
                remedy='Add them under "members", or correct the formula.',
            )
        viewed = {view.of for view in recipe.views.values()}
        if strange := sorted(refs.keys() - {"base", *made.roles} - viewed):
            raise RecipeError.of(
                "recipe",
                expected=f"members of the formula {recipe.formula!r}: {', '.join(made.roles)}",
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


def read_json(file: Path) -> Any:
    """Parse a recipe's file without checking its content; RecipeError if it cannot be read or is not JSON."""
    return read(
        file,
        "recipe",
        sought=f"a {RECIPE_FILE}",
        error=RecipeError,
        remedy="Give the file or the folder that model.save_pretrained(folder) wrote.",
    )
