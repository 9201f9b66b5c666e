"""Formulas that are written down: `Formula.parse("base + 0.5*(math - small) + 0.3*(code - small)")`."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from proxytune.errors import InputError
from proxytune.formulas.base import Formula, Term
from proxytune.formulas.gates import Gate
from proxytune.formulas.plausibility import Plausibility
from proxytune.formulas.schedules import KINDS, Ramp, Schedule, Strength
from proxytune.validation import shown

__all__ = ["Linear", "parse_strength"]

_Sum = dict[tuple[str, bool], Strength]
"""(role, whether its log-probabilities) → weight."""


@dataclass(frozen=True, kw_only=True)
class Linear(Formula):
    """A sum of members that is written as text.

    `+`, `-`, `*`, `/` and brackets; names are roles; `log_p(name)` is a member's log-probabilities, and a bare name its
    logits. A weight may be a schedule over the generated tokens: `linear(1, 0, 64)` (also `cosine`, `step`).

    Attributes:
        expression: The text.
        alpha: A strength for the whole shift [1.0]: 0 is the base, 1 the text as it stands.
        plausible: Which tokens may be drawn at all.

    Raises:
        InputError: If the text is no weighted sum of members, or does not name the base.
    """

    name: ClassVar[str] = "linear"
    expression: str = field(kw_only=False)
    alpha: Strength = 1.0
    plausible: Plausibility | None = None
    _sum: tuple[Term, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        self._check("alpha")
        for name, kind in (("plausible", Plausibility), ("gate", Gate)):
            object.__setattr__(self, name, _made(name, getattr(self, name), kind))
        found = _parsed(self.expression)
        if not isinstance(found, dict) or "base" not in {role for role, _ in found}:
            raise _refusal(self.expression, "a weighted sum of members, the base among them")
        both = {role for role, log in found if log} & {role for role, log in found if not log}
        if both:
            raise _refusal(self.expression, f"logits or log-probabilities of {min(both)}, not both")
        terms = [Term(role, weight, log) for (role, log), weight in found.items()]
        object.__setattr__(self, "_sum", tuple(sorted(terms, key=lambda term: term.member != "base")))
        self.terms()  # it may refuse

    def terms(self) -> tuple[Term, ...]:
        """The members in the sum, the base first."""
        base, *others = self._sum
        if self.alpha == 1.0:
            return self._sum
        scaled = [Term(t.member, _times(t.weight, self.alpha), t.log) for t in others]
        return (Term("base", _plus(1.0, _times(_plus(base.weight, -1.0), self.alpha)), base.log), *scaled)

    @property
    def mask(self) -> Plausibility | None:
        """Which tokens may be drawn at all."""
        return self.plausible

    def neutral(self) -> Linear:
        """α = 0 without mask and gate."""
        return Linear(self.expression, alpha=0.0)


def parse_strength(text: str) -> Strength:
    """Read a number or a schedule, such as `"linear(1, 0, 64)"`; InputError if it is neither."""
    found = _parsed(text)
    if isinstance(found, dict):
        raise _refusal(text, "a number or a schedule, without members")
    return found


def _made(name: str, value: Any, kind: Any) -> Any:
    """A setting as an object of its kind, or of a mapping of its arguments."""
    if value is None or isinstance(value, kind):
        return value
    try:
        return kind(**value)
    except TypeError:
        raise InputError.of(
            name,
            expected=f"a {kind.__name__}",
            got=shown(value, 80),
            remedy=f"Pass e.g. {kind.__name__}({'share=0.1' if kind is Plausibility else 'entropy=0.1'}).",
        ) from None


def _parsed(text: Any) -> _Sum | Strength:
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        why = f": {error}" if type(error) is ValueError else ", and this is no complete expression"
        raise _refusal(text, f"a weighted sum of members{why}") from None


def _value(node: ast.expr) -> _Sum | Strength:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(cast(float, node.value))
    if isinstance(node, ast.Name):
        return {(node.id, False): 1.0}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return _times(value, -1.0) if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return _plus(left, right)
        if isinstance(node.op, ast.Sub):
            return _plus(left, _times(right, -1.0))
        if isinstance(node.op, ast.Mult):
            return _times(left, right) if not isinstance(right, dict) else _times(right, left)
        if isinstance(node.op, ast.Div) and isinstance(right, float):
            return _times(left, 1.0 / right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id == "log_p" and len(node.args) == 1 and isinstance(node.args[0], ast.Name):
            return {(node.args[0].id, True): 1.0}
        given = [_value(arg) for arg in node.args]
        if node.func.id in KINDS and len(given) == 3 and all(isinstance(x, float) for x in given):
            start, end, tokens = cast(list[float], given)
            if tokens != int(tokens):
                raise ValueError(f"{tokens:g} generated tokens are no whole number")
            return Schedule(0.0, ((1.0, Ramp(node.func.id, start, end, int(tokens))),))
    raise ValueError(f"{ast.unparse(node)!r} is no number, member, log_p(member), {'/'.join(KINDS)}(from, to, tokens)")


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, dict) != isinstance(right, dict):
        raise ValueError("a member and a number cannot be added")
    if not isinstance(left, dict):
        return left + right
    return {key: left.get(key, 0.0) + right.get(key, 0.0) for key in dict.fromkeys((*left, *right))}


def _times(left: Any, right: Any) -> Any:
    if isinstance(right, dict):
        names = sorted({role for role, _ in (*(left if isinstance(left, dict) else ()), *right)})
        hint = (
            "; alpha is no name here: write numbers, and model.alpha scales the whole shift" if "alpha" in names else ""
        )
        raise ValueError(f"members cannot be multiplied ({', '.join(names)}){hint}")
    if isinstance(left, dict):
        return {key: _times(weight, right) for key, weight in left.items()}
    if isinstance(left, Schedule) and isinstance(right, Schedule):
        raise ValueError("two schedules cannot be multiplied")
    return left * right


def _refusal(text: Any, expected: str) -> InputError:
    error = InputError.of(
        "formula",
        expected=expected,
        got=shown(text, 120),
        remedy="Write e.g. 'base + 0.5*(math - small)', or 'base + linear(1, 0, 64)*(log_p(expert) - log_p(base))'.",
    )
    assert isinstance(error, InputError)
    return error
