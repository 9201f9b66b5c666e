"""Guidance: one model that reads two prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from proxytune.formulas.base import Formula, Term
from proxytune.formulas.schedules import Strength
from proxytune.formulas.view import View

__all__ = ["ClassifierFreeGuidance", "ContextAware"]


@dataclass(frozen=True, kw_only=True)
class ContextAware(Formula):
    """`(1 + α) z(y | context, x) − α z(y | x)` (Shi et al. 2023, arXiv 2305.14739, eq. 3): trust the context more.

    The base reads the prompt with the context; the member `no_context`, the same model, reads it without.

    Attributes:
        alpha: The strength α [0.5]; 0 is the base.
    """

    name: ClassVar[str] = "context-aware"
    alpha: Strength = 0.5

    def __post_init__(self) -> None:
        self._check("alpha")

    def terms(self) -> tuple[Term, ...]:
        """The base at 1 + α and `no_context` at −α."""
        return (Term("base", 1.0 + self.alpha), Term("no_context", -1.0 * self.alpha))

    @property
    def views(self) -> Mapping[str, View]:
        """`no_context` is the base with a prompt of its own."""
        return {"no_context": View("base", prompt=True)}


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(Formula):
    """`γ log p(y | x) + (1 − γ) log p(y | negative)` (Sanchez et al. 2023, arXiv 2306.17806, eq. 7).

    The member `negative` is the same model with a negative prompt, or without the part of the prompt to follow.

    Attributes:
        gamma: The guidance γ [1.5]; 1 is the base.
    """

    name: ClassVar[str] = "classifier-free-guidance"
    strength_field: ClassVar[str] = "gamma"
    neutral_alpha: ClassVar[float] = 1.0
    gamma: Strength = 1.5

    def __post_init__(self) -> None:
        self._check("gamma")

    def terms(self) -> tuple[Term, ...]:
        """The base at γ and `negative` at 1 − γ, as log-probabilities."""
        return (Term("base", self.gamma, True), Term("negative", 1.0 + -1.0 * self.gamma, True))

    @property
    def views(self) -> Mapping[str, View]:
        """`negative` is the base with a prompt of its own."""
        return {"negative": View("base", prompt=True)}
