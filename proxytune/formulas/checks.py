"""What a formula has to be, checked before any model is loaded."""

from __future__ import annotations

import math
import warnings
from typing import Any

from proxytune.errors import InputError, SteeringWarning
from proxytune.formulas.base import Term, terms_of
from proxytune.formulas.schedules import Schedule
from proxytune.validation import as_float, shown

__all__ = ["COMPANIONS", "MOST_MEMBERS", "check_formula"]

COMPANIONS = ("expert", "antiexpert")
"""The companions of proxy-tuning, in the order of its weights."""

MOST_MEMBERS = 8
"""Members that a formula may have, the base among them: what one launch of the kernels reads."""

_FLOAT32 = 3.4e38

_LARGE = 10.0
"""The weight above which a shift is more likely a slip: 0.5 to 2 are usual, and about 3 the most that papers report."""


def check_formula(formula: Any) -> Any:
    """Return a formula; InputError if it is none, has more than `MOST_MEMBERS`, or its weights are not finite.

    Warns:
        SteeringWarning: If a weight is above 10 in size, where the shift alone decides.
    """
    wanted = "a formula with a name, a finite α, roles such as 'expert' and 'antiexpert'"
    remedy = "Pass e.g. ProxyTuning(alpha=0.5); proxytune.formulas.Formula says what a formula of one's own has."
    wrong = [name for name in ("weights", "with_alpha") if not callable(getattr(formula, name, None))]
    wrong += [name for name in ("name", "roles", "alpha") if not hasattr(formula, name)]
    if isinstance(formula, type) or wrong:
        got = f"the class {formula.__name__}" if isinstance(formula, type) else shown(formula, 80)
        raise InputError.of("formula", expected=f"{wanted} and a finite weight for each", got=got, remedy=remedy)
    roles, weights = tuple(formula.roles), tuple(formula.weights())
    named = all(isinstance(r, str) and r.isidentifier() and r != "base" for r in roles) and len({*roles}) == len(roles)
    numbers = [w.largest if isinstance(w, Schedule) else w for w in (formula.alpha, *weights)]
    if not named or len(weights) != len(roles) or not all(math.isfinite(as_float(x)) for x in numbers):
        raise InputError.of(
            f"formula {formula.name!r}",
            expected=f"{wanted} and a finite weight for each",
            got=f"alpha={shown(formula.alpha)}, roles {roles!r} and weights {weights!r}",
            remedy=remedy,
        )
    if not 1 <= len(roles) < MOST_MEMBERS:
        raise InputError.of(
            f"formula {formula.name!r}",
            expected=f"1 to {MOST_MEMBERS - 1} members beside the base",
            got=f"{len(roles)}: {', '.join(roles)}",
            remedy="Leave some out." if roles else "Name a companion; without one, use the model itself.",
        )
    if wrong_terms := [term for term in terms_of(formula) if not _size(term) <= _FLOAT32]:
        raise InputError.of(
            f"formula {formula.name!r}",
            expected="weights that float32 can hold",
            got=f"{wrong_terms[0].weight} for the {wrong_terms[0].member}",
            remedy="Lower it.",
        )
    largest = max((term for term in terms_of(formula) if term.member != "base"), key=_size, default=None)
    if largest is not None and _size(largest) > _LARGE:
        warnings.warn(
            f"alpha={formula.alpha:g} weighs the shift {_size(largest):g} times: the base hardly counts, and texts are "
            "mostly noise. 0.5 to 2 are usual.",
            SteeringWarning,
            stacklevel=3,
        )
    return formula


def _size(term: Term) -> float:
    return term.weight.largest if isinstance(term.weight, Schedule) else abs(term.weight)
