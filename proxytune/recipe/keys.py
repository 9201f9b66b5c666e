"""The keys of a recipe, each read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import InputError, RecipeError
from proxytune.formulas.view import View
from proxytune.json_files import refuse_unknown
from proxytune.recipe.member_ref import ROLES, MemberRef

__all__ = ["check_evidence", "check_formula", "given_alpha", "member", "other_members"]


def check_evidence(evidence: Mapping[str, Any]) -> None:
    """Refuse evidence whose parts have another form."""
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


def other_members(data: Mapping[str, Any]) -> Mapping[str, Any]:
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


def member(value: Any, role: str, folder: Path | None) -> MemberRef | View:
    """A member by where it lies, seen from the recipe's folder, or as a view of another one."""
    if not (isinstance(value, Mapping) and "of" in value):
        return MemberRef.from_json(value, role).beside(folder)
    refuse_unknown(value, ("of", "prompt", "adapter"), f"recipe key {role!r}", error=RecipeError)
    try:
        return View.from_json(value)
    except InputError as error:
        raise RecipeError(f"recipe key {role!r}: {error}") from None


def given_alpha(data: Mapping[str, Any]) -> Any:
    """The α of a parsed file; None for the formula's own default, which an explicit null is not."""
    from proxytune.validation import validate_alpha

    if "alpha" in data and data["alpha"] is None:
        try:
            validate_alpha(None)
        except InputError as error:
            raise RecipeError(f"recipe key 'alpha': {error}") from None
    return data.get("alpha")


def check_formula(name: Any) -> None:
    """Refuse anything but the name of a formula or a sum."""
    from proxytune.formulas.registry import FORMULAS, is_expression

    if not isinstance(name, str) or not (name in FORMULAS or is_expression(name)):
        raise RecipeError.of(
            "recipe key 'formula'",
            expected=f"one of {', '.join(FORMULAS)}, or a sum such as 'base + 0.5*(math - small)'",
            got=repr(name),
            remedy="Correct the name; or, for a formula of your own, first import the module that adds it to "
            "proxytune.formulas.FORMULAS.",
        )
