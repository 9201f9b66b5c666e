"""Plausibility masks: tokens that a member finds implausible stay out, whatever the shift says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxytune.errors import InputError
from proxytune.validation import share as share_of

__all__ = ["Plausibility"]


@dataclass(frozen=True, kw_only=True)
class Plausibility:
    """Which tokens may be drawn at all, by one member's own distribution before the shift.

    Attributes:
        of: The member.
        share: Tokens stay that have at least this share of its largest probability (Li et al. 2023, arXiv 2210.15097,
            eq. 4, α [0.1]).
        top_p: Tokens stay that are in its nucleus of this mass (Liu et al. 2021, arXiv 2105.03023, §2).

    Raises:
        InputError: Unless exactly one of `share` and `top_p` is given, in (0, 1].
    """

    of: str = "base"
    share: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("share", "top_p") if getattr(self, name) is not None}
        if len(given) != 1:
            raise InputError.of(
                "Plausibility",
                expected="share or top_p",
                got="neither" if not given else "both",
                remedy="Pass e.g. Plausibility(share=0.1).",
            )
        ((name, value),) = given.items()
        object.__setattr__(self, name, share_of(name, value))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `Plausibility(**…)` reads."""
        value = {"share": self.share} if self.share is not None else {"top_p": self.top_p}
        return {"of": self.of, **value}
