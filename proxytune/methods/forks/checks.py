"""What fork sampling refuses, and what it makes of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from proxytune.errors import InputError, ProxytuneError, UnsupportedModeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.recipe import ForkCalibration, Measure, Recipe

__all__ = ["OFF", "WARPERS", "TemperatureRule", "beams", "listed", "measuring_warpers", "several", "threshold_of"]

TemperatureRule = Literal["two", "dynamic", "edt"]
# In generate()'s own order.
WARPERS: dict[str, type[LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def threshold_of(given: Any, measure: Measure, form: TemperatureRule) -> ForkThreshold | None:
    """The threshold of a number, a calibration or a recipe; None where a soft form has none."""
    if isinstance(given, Recipe):
        calibration = given.fork_threshold
        fits = calibration is not None and calibration.alpha in (None, given.alpha)
        if not fits:
            raise InputError.of(
                "recipe",
                expected=f"a fork_threshold calibrated at its α, {given.alpha}",
                got="fork_threshold=None"
                if calibration is None
                else f"a fork_threshold calibrated at α = {calibration.alpha}",
                remedy="Run proxytune calibrate --recipe … --write.",
            )
        given = calibration
    if isinstance(given, ForkCalibration):
        given = ForkThreshold.of(given)
    if given is None and form != "two":
        return None
    threshold = given if isinstance(given, ForkThreshold) else ForkThreshold(given)
    if threshold.measure not in (None, measure):
        raise InputError.of(
            "measure",
            expected=f"{threshold.measure!r}, for which the threshold was calibrated",
            got=repr(measure),
            remedy=f"Pass measure={threshold.measure!r}, or calibrate for the other.",
        )
    return threshold


def measuring_warpers(told: Mapping[str, float], measure: Measure) -> list[LogitsProcessor]:
    """The warpers between the scores and the measured distribution."""
    active = {name: value for name, value in told.items() if value != OFF[name]}
    try:
        made = {name: WARPERS[name](value) for name, value in active.items()}
    except (ValueError, TypeError) as error:
        raise InputError.of(
            "sampling settings",
            expected="values that generate() takes",
            got=", ".join(f"{name}={value!r}" for name, value in active.items()),
            remedy=f"transformers says: {error}",
        ) from None
    truncating = [name for name in made if name != "temperature"]
    if bool(truncating) != (measure == "truncated"):
        raise InputError.of(
            "measure",
            expected="'truncated' and at least one of top_k, top_p and min_p, or neither",
            got=f"measure={measure!r} and {', '.join(truncating) or 'no truncation'}",
            remedy="Pass them for this measure only; generate() needs its own.",
        )
    return [] if measure == "raw" else list(made.values())


def several(of: str, count: int) -> ProxytuneError:
    """The error for more than one processor of this kind."""
    return InputError.of(
        of,
        expected="one ForkSamplingLogitsProcessor",
        got=f"{count}, whose temperatures would multiply",
        remedy="Keep one of them.",
    )


def beams(got: str) -> ProxytuneError:
    """The error for beam search."""
    return UnsupportedModeError.of(
        "beam search",
        expected="greedy decoding or sampling",
        got=f"{got}: beams are compared by sums of log-probabilities, which are not comparable across temperatures",
        remedy="Leave num_beams out, or the processor.",
    )


def listed(value: Any) -> list[int]:
    """Ids as generation configs hold them: None, one, several, or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [] if value is None else [value] if isinstance(value, int) else list(value)
