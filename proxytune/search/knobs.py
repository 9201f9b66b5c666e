"""The numbers of a formula that can be tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from proxytune.formulas.gates import Gate
from proxytune.validation import choice

if TYPE_CHECKING:
    pass


__all__ = ["Knob", "knob_of", "knobs_of"]

_FLOAT_KINDS = ("float", "Strength")


_NEUTRAL = {"share": 0.0, "top_p": 1.0}


@dataclass(frozen=True)
class Knob:
    """A number that is to be chosen.

    Attributes:
        name: Its name: a field of the formula ("alpha", "beta", …), "gate.entropy", "gate.top1" or "temperature".
        neutral: The value that changes the base least, maybe infinite.
        turn: From the formula and a value to the formula at that value.
        of_sampling: Whether it divides the combined logits instead: a temperature.
    """

    name: str
    neutral: float
    turn: Callable[[Any, float], Any]
    of_sampling: bool = False

    def distance(self, value: float) -> float:
        """How far a value is from the neutral one; where that is infinite, smaller values are farther."""
        return abs(value - self.neutral) if math.isfinite(self.neutral) else -value


def knobs_of(formula: Any) -> list[str]:
    """The names of what can be tuned of a formula, its strength first."""
    names = [_strength_of(formula), "gate.entropy", "gate.top1", "temperature"]
    if is_dataclass(formula):
        names += [f.name for f in fields(formula) if f.init and str(f.type).split(" |")[0] in _FLOAT_KINDS]
    return list(dict.fromkeys(names if hasattr(formula, "gate") else [n for n in names if "gate" not in n]))


def knob_of(formula: Any, name: str | None = None) -> Knob:
    """A knob by its name, or the formula's strength; InputError if there is none of that name."""
    strength = _strength_of(formula)
    name = strength if name in (None, "alpha") else choice("knob", name, knobs_of(formula))
    if name == strength:
        return Knob(name, float(getattr(formula, "neutral_alpha", 0.0)), lambda f, value: f.with_alpha(value))
    if name == "temperature":
        return Knob(name, 1.0, lambda f, value: f, of_sampling=True)
    if name.startswith("gate."):
        which = name.removeprefix("gate.")
        return Knob(
            name,
            math.inf if which == "entropy" else 0.0,
            lambda f, value: replace(f, gate=_gate(which, value)),
        )
    return Knob(name, _NEUTRAL.get(name, 0.0), lambda f, value: replace(f, **{name: value}))


def _gate(which: str, value: float) -> Gate:
    return Gate(**{which: value})  # a share that was calibrated is another threshold's


def _strength_of(formula: Any) -> str:
    return str(getattr(formula, "strength_field", "alpha"))
