"""Proxy-tuning: `base + alpha * (expert - antiexpert)`; and the same on log-probabilities, emulated fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from proxytune.formulas.base import Formula, Term
from proxytune.formulas.schedules import Strength

__all__ = ["EmulatedFineTuning", "ProxyTuning"]


@dataclass(frozen=True, kw_only=True)
class ProxyTuning(Formula):
    """`z_base + α (z_expert − z_antiexpert)` (Liu et al. 2024, arXiv 2401.08565, eq. 1; α as in DExperts, 2105.03023).

    The strength α is finite, or a schedule, else InputError; 0 is the base, 1 the paper's setting.
    """

    name: ClassVar[str] = "proxy-tuning"
    alpha: Strength = 1.0

    def __post_init__(self) -> None:
        self._check("alpha")

    def terms(self) -> tuple[Term, ...]:
        """The base, the expert at α and the antiexpert at −α."""
        return (Term("base", 1.0), Term("expert", self.alpha), Term("antiexpert", -1.0 * self.alpha))


@dataclass(frozen=True, kw_only=True)
class EmulatedFineTuning(Formula):
    """`log p_base + α (log p_expert − log p_antiexpert)` (Mitchell et al. 2023, arXiv 2310.12962, eq. 3, up-scaling).

    At α = 1 [1.0] it is the law of `ProxyTuning`; scores are normalised per member.
    """

    name: ClassVar[str] = "emulated-fine-tuning"
    alpha: Strength = 1.0

    def __post_init__(self) -> None:
        self._check("alpha")

    def terms(self) -> tuple[Term, ...]:
        """The terms of proxy-tuning, as log-probabilities."""
        alpha = self.alpha
        return (Term("base", 1.0, True), Term("expert", alpha, True), Term("antiexpert", -1.0 * alpha, True))
