"""Several tuned models at once, and the line between two of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from proxytune.errors import InputError
from proxytune.formulas.base import Formula, Term
from proxytune.formulas.gates import Gate
from proxytune.formulas.schedules import Strength, strength
from proxytune.validation import finite, shown

__all__ = ["DeRa", "Experts", "Nudging"]


@dataclass(frozen=True, kw_only=True)
class DeRa(Formula):
    """`(1 − λ) z_base + λ z_aligned` (Liu et al. 2024, arXiv 2402.02992, eq. 8): realignment at decoding time.

    The base is the reference (SFT) model, `aligned` the same after alignment; any λ.

    Attributes:
        lam: The strength λ [1.5]: 0 is the base, 1 the aligned model, above 1 beyond it.
    """

    name: ClassVar[str] = "dera"
    strength_field: ClassVar[str] = "lam"
    lam: Strength = 1.5

    def __post_init__(self) -> None:
        self._check("lam")

    def terms(self) -> tuple[Term, ...]:
        """The base at 1 − λ and the aligned model at λ."""
        return (Term("base", 1.0 + -1.0 * self.lam), Term("aligned", self.lam))


@dataclass(frozen=True, kw_only=True)
class Experts(Formula):
    """`z_base + α Σ w_i (z_i − z_antiexpert)`: several experts with one antiexpert (arXiv 2105.03023; 2311.14479).

    `Formula.parse` takes experts with antiexperts of their own.

    Attributes:
        experts: Role → weight, of each expert.
        alpha: A strength for all of them [1.0]; 0 is the base.
        antiexpert: The role that is subtracted; None for `z_base + α Σ w_i z_i`.
    """

    name: ClassVar[str] = "experts"
    experts: Mapping[str, float] = field(default_factory=dict, hash=False)
    alpha: Strength = 1.0
    antiexpert: str | None = "antiexpert"

    def __post_init__(self) -> None:
        self._check("alpha")
        given = self.experts
        if not isinstance(given, Mapping) or not given or "base" in given or self.antiexpert in given:
            raise InputError.of(
                "experts",
                expected="a weight for each expert's role, other than base and antiexpert",
                got=shown(given, 80),
                remedy="Pass e.g. Experts(experts={'math': 0.5, 'code': 0.3}).",
            )
        object.__setattr__(self, "experts", {k: strength(f"weight of {k}", v) for k, v in given.items()})

    def terms(self) -> tuple[Term, ...]:
        """The base, each expert, and the antiexpert at minus their sum."""
        terms = [Term("base", 1.0), *(Term(role, w * self.alpha) for role, w in self.experts.items())]
        if self.antiexpert is not None:
            terms.append(Term(self.antiexpert, -1.0 * sum(self.experts.values()) * self.alpha))
        return tuple(terms)


@dataclass(frozen=True, kw_only=True)
class Nudging(Formula):
    """The nudging model's distribution where the base is unsure, else the base's (Fei et al. 2024, arXiv 2410.09300).

    Attributes:
        gamma: The base is unsure where its largest probability is below γ [0.4]; 0 is the base.
    """

    name: ClassVar[str] = "nudging"
    strength_field: ClassVar[str] = "gamma"
    gamma: float = 0.4

    def __post_init__(self) -> None:
        gamma = finite("gamma", self.gamma, least=0.0, most=1.0, remedy="0 is the base, 1 the nudging model.")
        own = Gate(top1=gamma) if gamma else None
        if self.gate not in (None, own):
            raise InputError.of(
                "gate of Nudging",
                expected="none: it is open where the base's largest probability is below gamma",
                got=repr(self.gate),
                remedy="Set gamma; for another gate, use Formula.parse('0*base + nudging', gate=…).",
            )
        object.__setattr__(self, "gamma", gamma)
        object.__setattr__(self, "gate", own)

    def with_alpha(self, alpha: Any) -> Self:
        """The same at another γ."""
        return replace(self, gamma=alpha, gate=None)

    def terms(self) -> tuple[Term, ...]:
        """The nudging model in place of the base."""
        return (Term("base", 0.0), Term("nudging", 1.0)) if self.gamma else (Term("base", 1.0), Term("nudging", 0.0))
