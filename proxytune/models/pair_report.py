"""What a check of three models reports: findings in words, and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from proxytune.models.pair_probe import Shift

__all__ = ["PRECISIONS", "Finding", "MemberFigures", "PairReport", "TokenCost"]

PRECISIONS = {"float32": 32.0, "bfloat16": 16.0, "8 bits": 8.0, "4 bits": 4.5}
"""Name → bits of a weight; four bits with their scales. Below 16, embeddings, head and norms keep 16."""


@dataclass(frozen=True)
class Finding:
    """A sentence: a `problem`, which has to change or looks like a mistake, or a `note`, which is good to know."""

    kind: Literal["problem", "note"]
    text: str


@dataclass(frozen=True)
class MemberFigures:
    """What a member's files tell.

    Attributes:
        role: `"base"`, `"expert"` or `"antiexpert"`.
        id: The folder or hub id.
        kind: Its class and family.
        parameters: How many there are, tied ones once.
        dtype: That of the files.
        weights: Precision (`PRECISIONS`) → bytes of the weights.
        cache: Bytes of the cache of a text of 1,000 tokens, by precision; quantisers leave it in 16 bits.
        context: The most positions; None if the config names none.
        rows: How many ids it embeds, padding of the head included.
        layers: How many layers.
    """

    role: str
    id: str
    kind: str
    parameters: int
    dtype: str
    weights: dict[str, float]
    cache: dict[str, float]
    context: int | None
    rows: int
    layers: int


@dataclass(frozen=True)
class TokenCost:
    """What a token of one text costs in plain decoding, in the dtypes that members are loaded in.

    Attributes:
        bytes: Bytes that are read for it, over the base's.
        seconds: Kind of device → seconds of the members' passes, one after the other, by round figures.
        base_seconds: The same for the base alone.
    """

    bytes: float
    seconds: dict[str, float]
    base_seconds: dict[str, float]


@dataclass
class PairReport:
    """What `check_pair` found.

    Attributes:
        findings: Problems first, then notes.
        members: Figures of the members that could be opened.
        vocabulary: How the vocabularies compare, in words; None if they were not compared.
        ends: The ids at which a text stops, and as tokens.
        cost: None if a member could not be opened.
        shift: None if the weights were not looked at.
        refused: Mode of decoding → why it is refused; the others work. Without weights, by the kinds of layers alone.
        weights: Whether the weights of all members were looked at.
    """

    findings: list[Finding] = field(default_factory=list)
    members: list[MemberFigures] = field(default_factory=list)
    vocabulary: str | None = None
    ends: dict[int, str] = field(default_factory=dict)
    cost: TokenCost | None = None
    shift: Shift | None = None
    refused: dict[str, str] = field(default_factory=dict)
    weights: bool = False

    @property
    def problems(self) -> list[str]:
        """The texts of the problems."""
        return [found.text for found in self.findings if found.kind == "problem"]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems
