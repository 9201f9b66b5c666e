"""Proxy-tuning: `base + alpha * (expert - antiexpert)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from proxytune.validation import validate_alpha

__all__ = ["ProxyTuning"]


@dataclass(frozen=True, kw_only=True)
class ProxyTuning:
    """`z_base + α (z_expert − z_antiexpert)` (Liu et al. 2024, arXiv 2401.08565, eq. 1; α as in DExperts, 2105.03023).

    The strength α is finite, else InputError; 0 is the base, 1 the paper's setting.
    """

    name: ClassVar[str] = "proxy-tuning"
    roles: ClassVar[tuple[str, ...]] = ("expert", "antiexpert")
    alpha: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", validate_alpha(self.alpha))

    def weights(self) -> tuple[float, ...]:
        """`(alpha, -alpha)`: the weight of each companion's logits, in the order of `roles`."""
        return (self.alpha, -self.alpha)

    def with_alpha(self, alpha: float) -> ProxyTuning:
        """The same formula at another α; InputError if it is not a finite number."""
        return replace(self, alpha=alpha)
