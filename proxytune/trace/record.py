"""What is recorded of each generated token, and of each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InputError
from proxytune.validation import shown

__all__ = ["COMBINED", "FIELDS", "SIGNALS", "UNKNOWN", "Trace", "TracedText", "refuse_mixed", "show_in_notebooks"]

COMBINED = "combined"
"""The name of the combined distribution among a trace's sources; the others are roles of members."""

UNKNOWN = -1
"""In a signal: the run had nothing of the kind, or did not say."""

SIGNALS = ("gate", "fork", "drafted", "latent")
"""Fields of one byte per token: 1 for yes, 0 for no, `UNKNOWN`."""

FIELDS: Mapping[str, tuple[type[np.generic], int]] = {
    "tokens": (np.int32, 1),
    "logprobs": (np.float32, 1),
    "entropy": (np.float32, 1),
    "kl": (np.float32, 1),
    "shift": (np.float32, 1),
    "base_rank": (np.int32, 1),
    **dict.fromkeys(SIGNALS, (np.int8, 1)),
    "top_ids": (np.int32, 3),
    "top_logprobs": (np.float32, 3),
}
"""The arrays of a text: dtype and number of dimensions. The first dimension is the token, T of them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TracedText:
    """One text and what was recorded at each of its T tokens.

    Distributions are those of raw logits at temperature 1, before logits processors and truncation: what the models
    want, not what a sampler left of it. S sources, k likeliest tokens of each.

    Attributes:
        prompt_ids: `[P]`, int32: the prompt, padding left out.
        tokens: `[T]`, int32: the tokens of the text, the end token included.
        logprobs: `[T]`, nats: log-probability of the token, combined.
        entropy: `[T]`, nats: entropy of the combined distribution.
        kl: `[T]`, nats: KL(combined ‖ base); 0 for a plain model.
        shift: `[T]`, nats: the token's combined log-probability less the base's.
        base_rank: `[T]`, int32: how many tokens the base held for likelier; 0 for its first choice.
        gate: `[T]`, int8: whether the formula's gate was open.
        fork: `[T]`, int8: whether the entropy was above the fork threshold.
        drafted: `[T]`, int8: whether the token was drafted, and accepted.
        latent: `[T]`, int8: whether a mixture was fed back in the token's place.
        top_ids: `[T, S, k]`, int32: the likeliest tokens of each source, in descending order.
        top_logprobs: `[T, S, k]`, nats: their log-probabilities under that source; −inf for masked tokens.
        prompt: The prompt as text, if known.
        pieces: `[T]`: what each token adds to the text, if a tokenizer was at hand; they join to the text.
        names: Token id → its text, for the ids among `top_ids`; empty without a tokenizer.
        given: Whether the text came from elsewhere and was scored; otherwise the model wrote it.
        answer: The answer found in the text, if any.
        grade: A verifier's grade, 1 for right; None if not graded.
        facts: More about the text, as JSON: votes, confidence, budget, weight (of a tree's leaf), group (samples of one
            prompt share it).
    """

    prompt_ids: NDArray[np.int32]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    kl: NDArray[np.float32]
    shift: NDArray[np.float32]
    base_rank: NDArray[np.int32]
    gate: NDArray[np.int8]
    fork: NDArray[np.int8]
    drafted: NDArray[np.int8]
    latent: NDArray[np.int8]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    prompt: str | None = None
    pieces: tuple[str, ...] | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    given: bool = False
    answer: str | None = None
    grade: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.tokens)
        for name, (dtype, dimensions) in FIELDS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != dimensions or len(array) != count:
                raise InputError.of(
                    f"TracedText.{name}",
                    expected=f"{np.dtype(dtype)} with {dimensions} dimension(s), the first of {count} tokens",
                    got=f"{array.dtype} {list(array.shape)}",
                    remedy="Let a recorder write the trace (proxytune.record), or cast the array.",
                )
        if self.top_ids.shape != self.top_logprobs.shape:
            raise InputError.of(
                "TracedText.top_ids",
                expected=f"the shape of top_logprobs, {list(self.top_logprobs.shape)}",
                got=str(list(self.top_ids.shape)),
                remedy="Give an id for each log-probability.",
            )
        if self.pieces is not None and len(self.pieces) != count:
            raise InputError.of(
                "TracedText.pieces",
                expected=f"one for each of the {count} tokens",
                got=str(len(self.pieces)),
                remedy="Leave pieces out, or give all of them.",
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        words = "" if self.pieces is None else f"{shown(''.join(self.pieces[:20]), 40)}, "
        steered = int(self.steered.sum())
        kl = f", KL {float(self.kl.mean()):.2f} nats a token" if len(self) else ""
        return f"TracedText({words}{len(self)} tokens, {steered} not the base's first choice{kl})"

    @property
    def text(self) -> str | None:
        """The text, without its prompt; None without a tokenizer."""
        return None if self.pieces is None else "".join(self.pieces)

    @property
    def steered(self) -> NDArray[np.bool_]:
        """`[T]`: where the token is not the base's first choice."""
        return self.base_rank > 0

    def said(self, signal: Literal["gate", "fork", "drafted", "latent"]) -> NDArray[np.bool_] | None:
        """`[T]`: where a signal was given; None if no token of the text knows it."""
        found: NDArray[np.int8] = getattr(self, signal)
        return None if (found == UNKNOWN).all() else found == 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """A run: texts, and what they have in common.

    Attributes:
        sources: Whose likeliest tokens were kept: "combined", then the members' roles, the base's first. A plain model
            has the two that are one: "combined" and "base".
        top: k: how many likeliest tokens of each.
        texts: In the order in which they were written.
        about: What else is known of the run, as JSON: model, formula, alpha, sampling, loop.
    """

    sources: tuple[str, ...]
    top: int
    texts: tuple[TracedText, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, text in enumerate(self.texts):
            if text.top_ids.shape[1:] != (len(self.sources), self.top):
                raise InputError.of(
                    f"Trace.texts[{i}].top_ids",
                    expected=f"[T, {len(self.sources)}, {self.top}]: {', '.join(self.sources)}, {self.top} tokens each",
                    got=str(list(text.top_ids.shape)),
                    remedy="Keep texts of different models in traces of their own.",
                )

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[TracedText]:
        return iter(self.texts)

    def __getitem__(self, index: int) -> TracedText:
        return self.texts[index]

    def __repr__(self) -> str:
        tokens = sum(map(len, self.texts))
        return f"Trace({len(self.texts)} texts, {tokens} tokens, sources={', '.join(self.sources)}, top={self.top})"

    def _repr_html_(self) -> str | None:
        return _in_notebooks[-1](self) if _in_notebooks and self.texts else None

    def groups(self) -> dict[str, list[TracedText]]:
        """The texts of each prompt: those that share `facts["group"]`, or else the prompt's ids."""
        found: dict[str, list[TracedText]] = {}
        for text in self.texts:
            found.setdefault(str(text.facts.get("group", text.prompt_ids.tolist())), []).append(text)
        return found


_in_notebooks: list[Callable[[Trace], str]] = []


_ONE = ("model", "members", "formula", "loop", "temperature")


def refuse_mixed(of: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to put runs with other settings into one trace: what reads it knows one model, formula, loop, temperature.

    Args:
        of: The trace, for the message.
        before: What it says of its run (`Trace.about`).
        now: The same of the run to be added; settings that one of both does not know are not compared.

    Raises:
        InputError: If they differ.
    """
    for name in _ONE:
        if name in before and name in now and before[name] != now[name]:
            raise InputError.of(
                of,
                expected=f"runs of one {name}: {before[name]}",
                got=str(now[name]),
                remedy="Use a recording, and a file, for each.",
            )


def show_in_notebooks(draw: Callable[[Trace], str]) -> None:
    """Say how notebooks show a trace, as HTML. `proxytune.view` does when it is imported; until then, as its `repr`."""
    _in_notebooks.append(draw)
