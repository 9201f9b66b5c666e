"""Where a latent step is taken: the settings of the gates. Their state per row is in `gate_state.py`.

A gate only ever makes a step discrete, as it would be in plain decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from proxytune.errors import InputError
from proxytune.validation import TokenIds, finite, token_ids, whole

__all__ = ["LatentGates", "span_ids"]

_COUNTS = (
    ("cold_steps", "of steps", 1),
    ("max_run", "of steps", 1),
    ("loop_ngram", "of tokens", 1),
    ("loop_repeats", "of times", 2),
)
_LEAVE = "Leave it out for the default."


@dataclass(frozen=True, kw_only=True)
class LatentGates:
    """Which steps may be latent. A step is latent if every gate allows it; Ĥ = H(p) / ln k over the k candidates.

    Attributes:
        begin_ids: What opens the thinking span, outside of which all steps are discrete: the ids of `<think>`. Empty
            with `end_ids` for a span that is open from the first new token on.
        end_ids: What closes it: the ids of `</think>`. Empty for no span: every new token may be latent.
        discrete_ids: Ids that are always fed back as they are, as are those of the span. Pass the tokenizer's special
            ids; EOS, padding and BOS of the call are added.
        min_entropy: θ: the least Ĥ of a latent step, in [0, 1] [0].
        dwell: Switch between two modes as in SwiReasoning (arXiv 2510.05069): a latent block ends where Ĥ falls below
            its value at the block's start, a discrete one where it rises above it; a block has at least this many
            steps. One number, or one for latent and one for discrete blocks; None for no switching.
        cold_steps: After this many consecutive steps with an entropy below `cold_entropy`, the thinking span ends (the
            cold stop of Soft Thinking, 2505.15778): `end_ids` are forced; without a span all later steps are discrete.
            None for never [256].
        cold_entropy: In nats, of the whole distribution that the token was drawn from [.01].
        max_run: The most consecutive latent steps; one discrete step follows. None for no limit.
        loop_ngram: n: where the last n tokens were generated `loop_repeats` times, the step is discrete, to break
            loops. None for no check [8].
        loop_repeats: How often, this time included [3].

    Raises:
        InputError: If a setting is out of range.
    """

    begin_ids: TokenIds | None = None
    end_ids: TokenIds | None = None
    discrete_ids: Sequence[int] = ()
    min_entropy: float = 0.0
    dwell: int | tuple[int, int] | None = None
    cold_steps: int | None = 256
    cold_entropy: float = 0.01
    max_run: int | None = None
    loop_ngram: int | None = 8
    loop_repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("begin_ids", "end_ids", "discrete_ids"):
            object.__setattr__(self, name, token_ids(name, getattr(self, name), single=True, optional=True))
        object.__setattr__(self, "discrete_ids", tuple(sorted(set(_tuple(self.discrete_ids)))))
        if self.begin_ids and self.begin_ids == self.end_ids:
            raise InputError.of(
                "end_ids",
                expected="another pattern than begin_ids",
                got=f"{list(self.end)} for both: the span would never be open",
                remedy="Pass what closes the thinking span.",
            )
        if self.begin_ids and not self.end_ids:
            raise InputError.of(
                "end_ids",
                expected="what closes the thinking span",
                got=f"an empty end_ids with begin_ids={list(self.begin)}",
                remedy="Pass both, e.g. the ids of '<think>' and '</think>'; or neither, for latent steps everywhere.",
            )
        if self.dwell is not None:
            pair = self.dwell if isinstance(self.dwell, tuple) else (self.dwell, self.dwell)
            if len(pair) != 2:
                raise InputError.of("dwell", expected="a whole number, or two", got=repr(self.dwell), remedy=_LEAVE)
            object.__setattr__(self, "dwell", tuple(whole("dwell", n, "of steps", remedy=_LEAVE) for n in pair))
        for name, what, least in _COUNTS:
            value = getattr(self, name)
            if value is not None or name == "loop_repeats":
                object.__setattr__(self, name, whole(name, value, what, least=least, remedy=_LEAVE))
        object.__setattr__(
            self, "min_entropy", finite("min_entropy", self.min_entropy, least=0.0, most=1.0, remedy=_LEAVE)
        )
        if self.cold_entropy != math.inf:  # inf makes every step cold
            finite("cold_entropy", self.cold_entropy, "of nats", least=0.0, remedy=_LEAVE)

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, span: str | None = None, **settings: Any) -> LatentGates:
        """Gates by text instead of ids: all special tokens are discrete, and two tokens delimit the span.

        Args:
            tokenizer: The model's tokenizer.
            span: `"<think>…</think>"`, or with three dots: what opens and what closes the thinking span, a single token
                of the vocabulary each; nothing before the dots for a span that is open from the start. None for no
                span.
            **settings: Further settings of `LatentGates`.

        Raises:
            InputError: If the span does not have two parts, or one is no token of the vocabulary.
        """
        listed = [*tokenizer.all_special_ids, *cls(discrete_ids=settings.pop("discrete_ids", ())).discrete_ids]
        if span is None:
            return cls(discrete_ids=listed, **settings)
        begin, end = span_ids(tokenizer, span)
        return cls(begin_ids=begin, end_ids=end, discrete_ids=listed, **settings)

    def with_discrete(self, ids: Sequence[int]) -> LatentGates:
        """The same gates with more ids that are always discrete.

        Args:
            ids: The ids.
        """
        return replace(self, discrete_ids=(*self.discrete_ids, *ids))

    @property
    def begin(self) -> tuple[int, ...]:
        """`begin_ids` as a tuple; empty for none."""
        return _tuple(self.begin_ids)

    @property
    def end(self) -> tuple[int, ...]:
        """`end_ids` as a tuple; empty for none."""
        return _tuple(self.end_ids)

    @property
    def largest_id(self) -> int:
        """The largest id that a gate names; −1 for none."""
        return max((*self.begin, *self.end, *self.discrete_ids), default=-1)


def span_ids(
    tokenizer: Any,
    span: str,
    *,
    what: str = "span",
    otherwise: str = "pass begin_ids and end_ids of several tokens to LatentGates",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of what opens and what closes `"<think>…</think>"`; none for nothing before the dots.

    `what` names the argument in errors, `otherwise` says what else to do where a text is no token; `InputError` for
    anything but two different tokens of the vocabulary.
    """
    parts = [part.strip() for part in span.replace("...", "…").split("…")]
    if len(parts) != 2 or not parts[1] or parts[0] == parts[1]:
        raise InputError.of(
            what,
            expected="what opens thinking and another text that closes it, with … or ... between them",
            got=repr(span),
            remedy='Pass e.g. "<think>…</think>".',
        )
    # Not by encode(): a text that is not one token is split differently in different contexts.
    known = tokenizer.get_vocab()
    for part in filter(None, parts):
        if part not in known:
            raise InputError.of(
                what,
                expected=f"tokens of {type(tokenizer).__name__}'s vocabulary",
                got=f"{part!r}, which is not a token",
                remedy=f"Use the thinking tokens of this model (its chat template shows them), or {otherwise}.",
            )
    begin, end = ((known[part],) if part else () for part in parts)
    return begin, end


def _tuple(ids: TokenIds | None) -> tuple[int, ...]:
    # __post_init__ makes it a tuple; the annotation is of what may be passed.
    assert isinstance(ids, tuple)
    return ids
