"""Gates: where the shift applies at all. Elsewhere the row is the base's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxytune.errors import InputError
from proxytune.validation import finite, share

__all__ = ["Gate"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The shift applies where the base alone is unsure: `softmax(z_base + 1[open] · shift)`.

    Attributes:
        entropy: Open where the entropy of the base's own distribution is above this, in nats.
        top1: Open where the base's largest probability is below this (Fei et al. 2024, arXiv 2410.09300, γ).

    Raises:
        InputError: Unless exactly one is given, in its range.
    """

    entropy: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("entropy", "top1") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError.of(
                "Gate",
                expected="entropy (nats) or top1",
                got=", ".join(given) or "nothing",
                remedy="Pass e.g. Gate(entropy=0.1).",
            )
        if self.entropy is not None:
            object.__setattr__(self, "entropy", finite("entropy of a Gate", self.entropy, "of nats", least=0.0))
        else:
            object.__setattr__(self, "top1", share("top1 of a Gate", self.top1))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `Gate(**…)` reads."""
        return {"entropy": self.entropy} if self.entropy is not None else {"top1": self.top1}
