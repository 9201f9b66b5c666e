"""A calibrated fork threshold, as a recipe keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from proxytune.errors import InputError, RecipeError
from proxytune.json_files import refuse_unknown
from proxytune.validation import choice, finite, proper_share, whole

__all__ = ["MEASURES", "ForkCalibration", "Measure", "read_fork_threshold"]

Measure = Literal["raw", "scaled", "truncated"]
"""What the entropy is of: the combined logits; these over the temperature; these after top-k, top-p and min-p."""

MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class ForkCalibration:
    """The result of a calibration, as the recipe keeps it.

    Attributes:
        share: The wanted share of tokens that are forks, in (0, 1).
        nats: The entropy above which a token is a fork; finite.
        tokens: Number of tokens it was measured on.
        temperature: Temperature they were sampled at; None for given texts.
        measure: What the entropy was taken of.
        alpha: The α of the shift then; None if not recorded or without a shift.
    """

    share: float
    nats: float
    tokens: int
    temperature: float | None = None
    measure: Measure = "raw"
    alpha: float | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "share": proper_share(self.share),
            "nats": finite("nats", self.nats),
            "tokens": whole("tokens", self.tokens, least=1, remedy="Calibrate on some text."),
            "measure": choice("measure", self.measure, MEASURES),
        }
        if self.temperature is not None:
            checked["temperature"] = finite("temperature", self.temperature, above=0.0)
        if self.alpha is not None:
            checked["alpha"] = finite("alpha", self.alpha)
        for name, value in checked.items():  # as Python's own types, which JSON can hold
            object.__setattr__(self, name, value)


def read_fork_threshold(value: Any) -> ForkCalibration | None:
    """Read the calibration in a recipe; null means none."""
    if value is None:
        return None
    where, known = "recipe key 'fork_threshold'", tuple(field.name for field in fields(ForkCalibration))
    missing = [key for key in ("share", "nats", "tokens") if key not in value] if isinstance(value, Mapping) else None
    if missing is None or missing:
        raise RecipeError.of(
            where,
            expected="an object with share, nats and tokens",
            got=type(value).__name__ if missing is None else f"no {', '.join(missing)}",
            remedy="Run proxytune calibrate --recipe … --write, or remove the key.",
        )
    refuse_unknown(value, known, where, error=RecipeError)
    try:
        return ForkCalibration(**value)
    except InputError as error:
        raise RecipeError(f"{where}: {error}") from None
