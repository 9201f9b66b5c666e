"""What a check of a pair knows so far, and what it has said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedModel

from proxytune.errors import (
    ProxytuneError,
    SteeringWarning,
    VocabularyWarning,
)
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.models.members.layer_kinds import Ability
from proxytune.models.members.member import Member
from proxytune.models.pair_report import Finding, PairReport
from proxytune.models.references import reference_of
from proxytune.recipe import MemberRef

__all__ = ["ONTO", "Findings"]

ONTO = "lora:"
"""Before the folder of an adapter that is put onto the antiexpert."""


class Findings:
    """The report while it is written, and what the parts know of each other."""

    def __init__(self, sources: Mapping[str, Any], alpha: float, trusted: Sequence[str], dtype: str) -> None:
        self.formula = ProxyTuning(alpha=alpha)
        self.alpha, self.dtype = alpha, dtype
        self.report = PairReport()
        self.onto = {role for role, source in sources.items() if str(source).startswith(ONTO)}  # the antiexpert
        found = {role: reference_of(s[len(ONTO) :] if role in self.onto else s) for role, s in sources.items()}
        self.references = {role: reference for role, reference in found.items() if reference is not None}
        self.arguments: dict[str, dict[str, Any]] = {
            role: {**reference.load, "trust_remote_code": role in trusted}
            for role, reference in self.references.items()
        }
        self.pair: bool | None = None  # whether they are encoder-decoders, once a member tells
        self.closed: set[str] = set()  # roles that cannot be opened
        self.models: dict[str, PreTrainedModel] = {}  # without weights, on `meta`
        self.members: dict[str, Member] = {}
        self.carriers: dict[str, MemberRef] = {}  # the models below adapters
        self.tokenizers: dict[str, Any] = {}
        self.same = False  # whether expert and antiexpert are one model
        self.saved: dict[str, str] = {}  # role → dtype of its files
        self.packed: set[str] = set()  # roles whose weights are quantised in their files
        self.lacks: dict[str, dict[Ability, str]] = {}  # role → what it cannot do, and why

    def say(self, kind: Literal["problem", "note"], text: str) -> None:
        """Say something once."""
        if all(found.text != text for found in self.report.findings):
            self.report.findings.append(Finding(kind, text))

    def problem(self, text: str) -> None:
        """Say what is wrong."""
        self.say("problem", text)

    def note(self, text: str) -> None:
        """Say what to know."""
        self.say("note", text)

    @contextmanager
    def saying(self, *closing: str, warned: Literal["problem", "note"] = "problem") -> Iterator[None]:
        """Make problems of errors, which close the roles `closing`, and of warnings what `warned` says."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            except ProxytuneError as error:
                self.problem(str(error))
                self.closed.update(closing)
        for warning in said:
            if issubclass(warning.category, SteeringWarning | VocabularyWarning):
                text = str(warning.message)
                self.say("note" if "Nothing is wrong" in text else warned, text)
