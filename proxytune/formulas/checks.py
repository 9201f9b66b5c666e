"""What a formula has to be, checked before any model is loaded."""

from __future__ import annotations

import math
import warnings
from typing import Any

from proxytune.errors import InputError, SteeringWarning
from proxytune.formulas.base import Formula
from proxytune.validation import as_float, shown

__all__ = ["COMPANIONS", "check_formula"]

COMPANIONS = ("expert", "antiexpert")
"""The companions that a composed model has, in the order of a formula's weights."""


_LARGE = 10.0
"""The weight above which a shift is more likely a slip: 0.5 to 2 are usual, and about 3 the most that papers report."""


def check_formula(formula: Any) -> Formula:
    """Return a formula for the companions `COMPANIONS`; InputError if it is none, or its weights are not finite.

    Warns:
        SteeringWarning: If a weight is above 10 in size, where the shift alone decides.
    """
    wanted = "a formula with a name, a finite α, the roles " + " and ".join(map(repr, COMPANIONS))
    remedy = "Pass e.g. ProxyTuning(alpha=0.5); proxytune.formulas.Formula says what a formula of one's own has."
    wrong = [name for name in ("weights", "with_alpha") if not callable(getattr(formula, name, None))]
    wrong += [name for name in ("name", "roles", "alpha") if not hasattr(formula, name)]
    if isinstance(formula, type) or wrong:
        got = f"the class {formula.__name__}" if isinstance(formula, type) else shown(formula, 80)
        raise InputError.of("formula", expected=f"{wanted} and a finite weight for each", got=got, remedy=remedy)
    weights = formula.weights()
    fits = tuple(formula.roles) == COMPANIONS and len(weights) == len(COMPANIONS)
    if not fits or not all(math.isfinite(as_float(x)) for x in (formula.alpha, *weights)):
        raise InputError.of(
            f"formula {formula.name!r}",
            expected=f"{wanted} and a finite weight for each",
            got=f"alpha={shown(formula.alpha)}, roles {tuple(formula.roles)!r} and weights {tuple(weights)!r}",
            remedy=remedy,
        )
    if (largest := max(weights, key=abs)) and abs(largest) > _LARGE:
        warnings.warn(
            f"alpha={formula.alpha:g} weighs the shift {abs(largest):g} times: the base hardly counts, and texts are "
            "mostly noise. 0.5 to 2 are usual.",
            SteeringWarning,
            stacklevel=3,
        )
    return formula
