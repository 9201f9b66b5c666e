"""Strengths that change while a text is written: α as a function of how many tokens were generated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxytune.errors import InputError
from proxytune.validation import as_float, finite, shown, validate_alpha, whole

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Ramp", "Schedule", "Strength", "strength", "strength_at"]

KINDS = ("linear", "cosine", "step")
"""The shapes of a ramp: a straight line, half a cosine, or a jump at its end."""


@dataclass(frozen=True)
class Ramp:
    """From `start` at the first generated token to `end` at the token `tokens` later; `end` from there on.

    Attributes:
        kind: One of `KINDS`.
        start: The first value.
        end: The last value.
        tokens: After how many generated tokens the end is reached.
    """

    kind: str
    start: float
    end: float
    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", finite("start of a schedule", self.start))
        object.__setattr__(self, "end", finite("end of a schedule", self.end))
        whole("tokens of a schedule", self.tokens, "of generated tokens", least=1)

    def at(self, generated: torch.Tensor) -> torch.Tensor:
        """The value, float32, where `generated` tokens were generated before (a tensor of any shape)."""
        import torch

        share = (generated.float() / self.tokens).clamp(max=1.0)
        if self.kind == "cosine":
            share = (1.0 - torch.cos(math.pi * share)) / 2.0
        elif self.kind == "step":
            share = (share >= 1.0).float()
        return self.start + (self.end - self.start) * share

    def __str__(self) -> str:
        return f"{self.kind}({_short(self.start)}, {_short(self.end)}, {self.tokens})"


@dataclass(frozen=True)
class Schedule:
    """A constant plus weighted ramps, e.g. `Schedule.linear(1.0, 0.0, 64)`; a number times a schedule is one too.

    It can stand wherever a formula takes a strength. `generated` counts the tokens that a text has after its prompt: 0
    for the first token to be drawn.
    """

    constant: float
    parts: tuple[tuple[float, Ramp], ...]

    @classmethod
    def linear(cls, start: float, end: float, tokens: int) -> Schedule:
        """A straight line from `start` to `end` over `tokens` generated tokens."""
        return cls(0.0, ((1.0, Ramp("linear", start, end, tokens)),))

    @classmethod
    def cosine(cls, start: float, end: float, tokens: int) -> Schedule:
        """Half a cosine from `start` to `end`: flat at both ends."""
        return cls(0.0, ((1.0, Ramp("cosine", start, end, tokens)),))

    @classmethod
    def step(cls, start: float, end: float, tokens: int) -> Schedule:
        """`start` for the first `tokens` generated tokens, then `end`."""
        return cls(0.0, ((1.0, Ramp("step", start, end, tokens)),))

    def at(self, generated: torch.Tensor) -> torch.Tensor:
        """The value, float32, where `generated` tokens were generated before (a tensor of any shape)."""
        import torch

        value = torch.full(generated.shape, self.constant, dtype=torch.float32, device=generated.device)
        for factor, ramp in self.parts:
            value = value + factor * ramp.at(generated)
        return value

    @property
    def first(self) -> float:
        """The value at the first generated token."""
        return self.constant + sum(factor * ramp.start for factor, ramp in self.parts)

    @property
    def largest(self) -> float:
        """The value that is the largest in size, or more."""
        return abs(self.constant) + sum(abs(f) * max(abs(ramp.start), abs(ramp.end)) for f, ramp in self.parts)

    def __add__(self, other: float | Schedule) -> Schedule:
        if isinstance(other, Schedule):
            return Schedule(self.constant + other.constant, self.parts + other.parts)
        return Schedule(self.constant + other, self.parts)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Strength:
        if not isinstance(factor, int | float):
            raise InputError.of(
                "a schedule",
                expected="a number as its factor",
                got=shown(factor, 80),
                remedy="Let one strength change, and keep the other a number.",
            )
        if factor == 0.0:
            return 0.0
        return Schedule(self.constant * factor, tuple((f * factor, ramp) for f, ramp in self.parts))

    __rmul__ = __mul__

    def __str__(self) -> str:
        parts = [str(ramp) if f == 1 else f"{_short(f)} * {ramp}" for f, ramp in self.parts]
        return " + ".join([*parts, *([_short(self.constant)] if self.constant or not parts else [])])

    def __format__(self, spec: str) -> str:
        return str(self)


def _short(number: float) -> str:
    """A number with all its digits, and no more."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


Strength = float | Schedule
"""The weight of a member, or a strength α."""


def strength(name: str, value: Any) -> Strength:
    """A strength as a float or a schedule; InputError if it is neither."""
    if isinstance(value, Schedule):
        return value
    if name == "alpha":
        return validate_alpha(value)
    if not math.isfinite(as_float(value)):
        raise InputError.of(
            name,
            expected="a finite number, or a schedule such as Schedule.linear(1.0, 0.0, 64)",
            got=shown(value, 80),
            remedy="Correct it.",
        )
    return as_float(value)


def strength_at(value: Strength, generated: torch.Tensor) -> torch.Tensor:
    """A strength where `generated` tokens were generated before: float32, of its shape."""
    if isinstance(value, Schedule):
        return value.at(generated)
    import torch

    return torch.full(generated.shape, value, dtype=torch.float32, device=generated.device)
