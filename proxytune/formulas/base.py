"""What a formula is: a weighted sum of members, perhaps with a mask and a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self

from proxytune.errors import InputError
from proxytune.formulas.gates import Gate
from proxytune.formulas.plausibility import Plausibility
from proxytune.formulas.schedules import Schedule, Strength, strength
from proxytune.formulas.view import View
from proxytune.validation import shown

__all__ = ["Formula", "Term", "settings_of", "terms_of"]


@dataclass(frozen=True)
class Term:
    """One member in the sum.

    Attributes:
        member: Its role.
        weight: Its weight, a number or a schedule.
        log: Whether its log-probabilities are summed, instead of its logits.
    """

    member: str
    weight: Strength
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A weighted sum of members' logits or log-probabilities; the base's class, from which the named ones are made.

    A formula of one's own derives from this, has a `name` for recipes, and says its `terms`; or it has `name`, `roles`,
    `alpha`, `weights()` and `with_alpha()` alone, and adds companions to a base of weight 1.

    Attributes:
        gate: Where the shift applies; None for everywhere.
    """

    name: ClassVar[str]
    strength_field: ClassVar[str] = "alpha"
    """The field that `alpha` stands for: the paper's own letter."""
    neutral_alpha: ClassVar[float] = 0.0
    """The α at which the formula is the base."""

    gate: Gate | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Formula.__repr__  # type: ignore[method-assign]  # not the dataclass's, which shows gate=None

    def __repr__(self) -> str:
        shown = sorted((f for f in fields(self) if f.repr), key=lambda f: f.name == "gate")
        given = [(f.name, getattr(self, f.name)) for f in shown if (getattr(self, f.name), f.default) != (None, None)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    @staticmethod
    def parse(text: str, **settings: Any) -> Formula:
        """Read a formula such as `"base + 0.5*(math - small)"`; see `proxytune.formulas.algebra.Linear`."""
        from proxytune import formulas  # the class of written sums derives from this one

        return formulas.Linear(text, **settings)

    def terms(self) -> tuple[Term, ...]:
        """The members in the sum, the base first."""
        raise NotImplementedError

    @property
    def mask(self) -> Plausibility | None:
        """Which tokens may be drawn at all; None for all."""
        return None

    @property
    def views(self) -> Mapping[str, View]:
        """The members that are another member once more, unless they are given."""
        return {}

    @property
    def roles(self) -> tuple[str, ...]:
        """The companions, in the order of `weights`."""
        named = [term.member for term in self.terms()]
        if self.mask is not None:
            named.append(self.mask.of)
        return tuple(role for role in dict.fromkeys(named) if role != "base")

    @property
    def alpha(self) -> Any:
        """The strength of the shift: a float, or a schedule."""
        return getattr(self, self.strength_field)

    def with_alpha(self, alpha: Any) -> Self:
        """The same formula at another strength; InputError if it is neither a finite number nor a schedule."""
        return replace(self, **{self.strength_field: alpha})

    def neutral(self) -> Self:
        """The same formula where it is the base, bit for bit."""
        return replace(self.with_alpha(self.neutral_alpha), gate=None)

    def weights(self) -> tuple[float, ...]:
        """The weight of each companion, in the order of `roles`; of schedules, at the first generated token."""
        found = {term.member: _at_first(term.weight) for term in self.terms()}
        return tuple(found.get(role, 0.0) for role in self.roles)

    def _check(self, *names: str) -> None:
        """Check strengths and the gate, which may be given as JSON."""
        for name in names:
            object.__setattr__(self, name, strength(name, getattr(self, name)))
        if isinstance(self.gate, Mapping):
            object.__setattr__(self, "gate", Gate(**self.gate))
        if not isinstance(self.gate, Gate | None):
            raise InputError.of(
                f"gate of {type(self).__name__}",
                expected="a Gate",
                got=shown(self.gate, 80),
                remedy="Pass e.g. Gate(entropy=0.1).",
            )


def _at_first(weight: Strength) -> float:
    return weight.first if isinstance(weight, Schedule) else weight


def terms_of(formula: Any) -> tuple[Term, ...]:
    """The terms of a formula, the base first; one that says only `roles` and `weights()` adds to a base of weight 1."""
    if isinstance(formula, Formula) and type(formula).weights is Formula.weights:
        return formula.terms()
    pairs = zip(formula.roles, formula.weights(), strict=True)
    return (Term("base", 1.0), *(Term(role, weight) for role, weight in pairs))


def settings_of(formula: Any) -> dict[str, Any]:
    """What a recipe keeps of a formula beside its name and α: its other fields that are not the default, as JSON."""
    if not isinstance(formula, Formula):
        return {}
    kept: dict[str, Any] = {}
    for field in fields(formula):
        value = getattr(formula, field.name)
        if field.name in (formula.strength_field, "expression") or not field.init or value == field.default:
            continue
        if field.default is not MISSING and replace(formula, **{field.name: field.default}) == formula:
            continue  # it follows from the others
        kept[field.name] = value.to_json() if hasattr(value, "to_json") else _plain(value)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return str(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
