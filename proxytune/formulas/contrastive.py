"""Shifts under a plausibility mask: contrastive decoding and DExperts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from proxytune.formulas.base import Formula, Term
from proxytune.formulas.plausibility import Plausibility
from proxytune.formulas.schedules import Strength
from proxytune.validation import share as share_of

__all__ = ["ContrastiveDecoding", "DExperts"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveDecoding(Formula):
    """`(1 + β) z_base − β z_amateur` (O'Brien and Lewis 2023, arXiv 2309.09117, eq. 2; Li et al. 2023, 2210.15097).

    The base is the paper's expert, the large model; the amateur a small one.

    Attributes:
        beta: The strength β [0.5]; 0 is the base, on its plausible tokens.
        share: Tokens stay that have this share of the base's largest probability (α in both papers) [0.1]; None for
            all tokens.
    """

    name: ClassVar[str] = "contrastive"
    strength_field: ClassVar[str] = "beta"
    beta: Strength = 0.5
    share: float | None = 0.1

    def __post_init__(self) -> None:
        self._check("beta")
        if self.share is not None:
            object.__setattr__(self, "share", share_of("share", self.share))

    def terms(self) -> tuple[Term, ...]:
        """The base at 1 + β and the amateur at −β."""
        return (Term("base", 1.0 + self.beta), Term("amateur", -1.0 * self.beta))

    @property
    def mask(self) -> Plausibility | None:
        """The base's plausible tokens."""
        return None if self.share is None else Plausibility(share=self.share)

    def neutral(self) -> Self:
        """β = 0 without the mask."""
        return replace(self, beta=0.0, share=None, gate=None)


@dataclass(frozen=True, kw_only=True)
class DExperts(Formula):
    """`z_base + α (z_expert − z_antiexpert)` on the base's nucleus (Liu et al. 2021, arXiv 2105.03023, eq. 2 and §2).

    Attributes:
        alpha: The strength α [2.0, the paper's for detoxification].
        top_p: The base's nucleus, truncated before the shift [0.9]; None for all tokens.
    """

    name: ClassVar[str] = "dexperts"
    alpha: Strength = 2.0
    top_p: float | None = 0.9

    def __post_init__(self) -> None:
        self._check("alpha")
        if self.top_p is not None:
            object.__setattr__(self, "top_p", share_of("top_p", self.top_p))

    def terms(self) -> tuple[Term, ...]:
        """The base, the expert at α and the antiexpert at −α."""
        return (Term("base", 1.0), Term("expert", self.alpha), Term("antiexpert", -1.0 * self.alpha))

    @property
    def mask(self) -> Plausibility | None:
        """The base's nucleus."""
        return None if self.top_p is None else Plausibility(top_p=self.top_p)

    def neutral(self) -> Self:
        """α = 0 without the mask."""
        return replace(self, alpha=0.0, top_p=None, gate=None)
