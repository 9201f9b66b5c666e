"""The protocol of a formula."""

from __future__ import annotations

from typing import ClassVar, Protocol

__all__ = ["Formula"]


class Formula(Protocol):
    """A formula: its name in a recipe, the companions it needs (`roles`), and a weight for each."""

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]

    @property
    def alpha(self) -> float:
        """The strength of the shift."""
        ...

    def weights(self) -> tuple[float, ...]:
        """The weight of each companion's logits, in the order of `roles`."""
        ...

    def with_alpha(self, alpha: float) -> Formula:
        """The same formula at another α."""
        ...
