"""Formulas by the names that recipes use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proxytune.errors import InputError
from proxytune.formulas.algebra import Linear, parse_strength
from proxytune.formulas.base import Formula, settings_of, terms_of
from proxytune.formulas.contrastive import ContrastiveDecoding, DExperts
from proxytune.formulas.experts import DeRa, Experts, Nudging
from proxytune.formulas.guidance import ClassifierFreeGuidance, ContextAware
from proxytune.formulas.proxy_tuning import EmulatedFineTuning, ProxyTuning
from proxytune.formulas.schedules import Schedule

__all__ = ["FORMULAS", "is_expression", "is_kept", "made", "recipe_of"]

_NAMED: tuple[Any, ...] = (
    ProxyTuning,
    DExperts,
    ContrastiveDecoding,
    ContextAware,
    ClassifierFreeGuidance,
    EmulatedFineTuning,
    DeRa,
    Experts,
    Nudging,
)

FORMULAS: dict[str, Callable[..., Formula]] = {formula.name: formula for formula in _NAMED}
"""The formulas that a recipe can name: name → what makes one of its settings.

A formula of one's own is added here before its recipes are opened.
"""


def is_expression(name: str) -> bool:
    """Whether a recipe's formula is a sum that is written down, not a name."""
    return bool(re.search(r"[-+*/()\s]", name)) and bool(re.search(r"\bbase\b", name))


def made(name: str, alpha: Any, settings: Mapping[str, Any]) -> Formula:
    """The formula of a recipe.

    Args:
        name: A name in `FORMULAS`, or a sum as a text.
        alpha: The strength; a text for a schedule; None for the formula's own default.
        settings: The other settings, as JSON.

    Raises:
        InputError: If there is no such formula or setting, or a value is out of range.
    """
    strength = parse_strength(alpha) if isinstance(alpha, str) and "(" in alpha else alpha
    given = dict(settings)
    if isinstance(given.get("experts"), Mapping):
        given["experts"] = {k: parse_strength(v) if isinstance(v, str) else v for k, v in given["experts"].items()}
    try:
        if name not in FORMULAS:
            return Linear(name, alpha=1.0 if alpha is None else strength, **given)
        make: Any = FORMULAS[name]
        own = {} if alpha is None else {getattr(make, "strength_field", "alpha"): strength}
        return make(**own, **given)
    except TypeError as error:
        raise InputError.of(
            f"settings of the formula {name!r}",
            expected="settings that it has",
            got=repr(dict(settings)),
            remedy=f"Correct them: {error}.",
        ) from None


def recipe_of(formula: Any) -> dict[str, Any]:
    """A formula as a recipe keeps it: its `formula`, `alpha` and `settings`, as JSON."""
    name = formula.expression if isinstance(formula, Linear) else formula.name
    alpha = formula.alpha
    if isinstance(alpha, Schedule):
        alpha = str(alpha) if alpha.parts else alpha.constant
    return {"formula": name, "alpha": alpha, "settings": settings_of(formula)}


def is_kept(formula: Any) -> bool:
    """Whether a recipe gives a formula back: same members, weights, mask and gate."""
    kept = recipe_of(formula)
    if kept["formula"] not in FORMULAS and not isinstance(formula, Linear):
        return False
    again = made(kept["formula"], kept["alpha"], kept["settings"])
    rest = [(getattr(f, "mask", None), getattr(f, "gate", None)) for f in (formula, again)]
    return terms_of(again) == terms_of(formula) and rest[0] == rest[1]
