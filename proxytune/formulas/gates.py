"""Gates: where the shift applies at all. Elsewhere the row is the base's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxytune.errors import InputError
from proxytune.validation import finite, proper_share
from proxytune.validation import share as probability

__all__ = ["Gate"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The shift applies where the base alone is unsure: `softmax(z_base + 1[open] · shift)`.

    Open and shut are decided for each row and token, from the base's raw logits at temperature 1, over their full
    width. It is what fork sampling measures (arXiv 2506.01939), of the base alone.

    Attributes:
        entropy: Open where the entropy of the base's own distribution is above this, in nats.
        top1: Open where the base's largest probability is below this (Fei et al. 2024, arXiv 2410.09300, γ).
        share: Open in this share of the steps: `entropy` is then what a calibration run found for these models
            (`proxytune.models.gate_calibration.calibrate_gate`), and None before it.

    Raises:
        InputError: Unless exactly one of them is given, in its range; `entropy` may stand beside `share`.
    """

    entropy: float | None = None
    top1: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("entropy", "top1", "share") if getattr(self, name) is not None]
        if len(given) != 1 and given != ["entropy", "share"]:
            raise InputError.of(
                "Gate",
                expected="entropy (nats), top1 or share",
                got=", ".join(given) or "nothing",
                remedy="Pass e.g. Gate(entropy=0.1).",
            )
        if self.entropy is not None:
            object.__setattr__(self, "entropy", finite("entropy of a Gate", self.entropy, "of nats", least=0.0))
        if self.top1 is not None:
            object.__setattr__(self, "top1", probability("top1 of a Gate", self.top1))
        if self.share is not None:
            object.__setattr__(self, "share", proper_share(self.share))

    def refuse_uncalibrated(self) -> None:
        """Raise InputError for a share that no calibration run has turned into nats."""
        if self.entropy is None and self.top1 is None:
            raise InputError.of(
                f"Gate(share={self.share:g})",
                expected="a gate that is calibrated for these models, so that its entropy is known",
                got="entropy=None",
                remedy="Call proxytune.models.gate_calibration.calibrate_gate(model, tokenizer(prompts, "
                "return_tensors='pt', padding=True)), or choose it by proxytune tune --knob gate.entropy --write.",
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `Gate(**…)` reads."""
        return {name: value for name, value in vars(self).items() if value is not None}
