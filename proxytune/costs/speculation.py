"""What a token costs: bytes that a forward pass has to read, rounds of speculative decoding, the best draft length.

A decode step of a large model waits for memory: every weight is read once per pass, however few tokens pass. So the
time of a method has a floor, the bytes it reads over the bandwidth, and two methods compare by their bytes. Speculation
(Leviathan et al. 2023, arXiv 2211.17192) reads the verifying members once per round instead of once per token. In the
composed model the expert is the draft: it runs anyway, so a round of k drafted tokens has k passes of it, one more
where all k were accepted, and one of the base and one of the antiexpert. Pure Python: nothing here is measured, and
times may be in any unit, as long as it is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.costs.roofline import PassBytes
from proxytune.errors import InputError
from proxytune.validation import as_float, finite, whole

__all__ = ["DraftCosts", "acceptance_of", "best_draft_length", "expected_tokens", "time_per_token"]


@dataclass(frozen=True)
class DraftCosts:
    """What a round of speculative decoding takes, in any unit of time (or in bytes, for the floor).

    A round at draft length k takes `round + (k + a^k) draft + k position`: all members that verify make one pass over
    k + 1 positions; the draft makes k passes to draft, and one over the last drafted token if that was accepted. At
    k = 0 that is a plain step: the expert's one pass is its own.

    Attributes:
        round: One pass of each member that verifies, over one position: base and antiexpert if the expert drafts, all
            three otherwise.
        draft: One pass of the draft over one token; 0 for a draft without a model (prompt lookup).
        position: What each further position adds to the verifying pass, and to all that happens once per position.
        plain: A step without a draft; None for `round + draft`. A draft that is no member rests at k = 0: then it is
            `round`.

    Raises:
        InputError: If a number is negative or not finite, or a step costs nothing.
    """

    round: float
    draft: float
    position: float = 0.0
    plain: float | None = None

    def __post_init__(self) -> None:
        plain = self.round + self.draft if self.plain is None else self.plain
        costs = {"round": self.round, "draft": self.draft, "position": self.position, "plain": plain}
        for name, cost in costs.items():
            finite(name, cost, least=0.0, remedy="Pass a time, or bytes; all in one unit.")
        if self.round + self.draft == 0 or plain == 0:
            raise InputError.of(
                "DraftCosts",
                expected="a step that costs something",
                got=f"round={self.round}, draft={self.draft}, plain={self.plain}",
                remedy="Pass measured times, or DraftCosts.of_bytes(...).",
            )

    @classmethod
    def of_bytes(
        cls,
        verifying: Sequence[PassBytes],
        drafting: PassBytes | None,
        *,
        member: bool = True,
        context: float = 0.0,
        rows: int = 1,
    ) -> DraftCosts:
        """The floor of the costs: what has to be read.

        Args:
            verifying: The members that verify: base and antiexpert if the expert drafts, all three otherwise.
            drafting: The draft; None for one without a model.
            member: Whether the draft is a member of the composition, so that a plain step needs it too.
            context: Tokens in each row's cache.
            rows: B.

        Returns:
            Costs in bytes; a further position adds none.

        Raises:
            InputError: If there is no verifying member, or as `PassBytes.at`.
        """
        together = sum(one.at(context=context, rows=rows) for one in verifying)
        draft = 0.0 if drafting is None else drafting.at(context=context, rows=rows)
        return cls(together, draft, plain=None if member else together)

    def of_round(self, draft_length: int, acceptance: float | Sequence[float] = 1.0) -> float:
        """What a round takes.

        Args:
            draft_length: k, at least 0.
            acceptance: As for `expected_tokens`. The draft's last pass is made if any row needs it.

        Returns:
            In the unit of the costs, on average.

        Raises:
            InputError: If an a is outside [0, 1], or k is no whole number of at least 0.
        """
        powers = (
            [a**k for a in _rates(acceptance)] if (k := whole("draft_length", draft_length, "of tokens")) else [1.0]
        )
        return self._of_round(k, powers)

    def _of_round(self, k: int, powers: Sequence[float]) -> float:
        """With the chance of each row that all of its k drafts are accepted."""
        if k == 0 and self.plain is not None:
            return self.plain
        some = 1.0 - math.prod(1.0 - p for p in powers)
        return self.round + (k + some) * self.draft + k * self.position


def acceptance_of(accepted: int, rejected: int) -> float:
    """The share of accepted tokens among those that were decided upon.

    What stands behind a rejected token in a draft was never decided upon: accepted tokens over drafted ones would be
    too low, the more so the longer the drafts were.

    Args:
        accepted: Drafted tokens that were accepted.
        rejected: Rounds, over all rows, that ended in a rejection.

    Returns:
        In [0, 1]; the estimate of largest likelihood for independent decisions, and NaN if none was made.

    Raises:
        InputError: If a number is not whole.
    """
    accepted, rejected = whole("accepted", accepted), whole("rejected", rejected, "of rounds")
    return accepted / (accepted + rejected) if accepted + rejected else math.nan


def expected_tokens(acceptance: float | Sequence[float], draft_length: int) -> float:
    """Tokens per round and row: `(1 − a^(k+1)) / (1 − a)`.

    Leviathan et al. 2023, arXiv 2211.17192, eq. 1: each drafted token is accepted with probability a as long as those
    before it were, and each round ends in one token of the verifier's own.

    Args:
        acceptance: a, in [0, 1]; of several rows one each. Rows go on by themselves, so their mean counts.
        draft_length: k, at least 0.

    Returns:
        In [1, k + 1].

    Raises:
        InputError: If an a is outside [0, 1], or k is no whole number of at least 0.
    """
    k = whole("draft_length", draft_length, "of tokens")
    rates = _rates(acceptance)
    # The sum of powers: exact at a = 1, and not a difference of two numbers near 1 next to it.
    return math.fsum(a**i for a in rates for i in range(k + 1)) / len(rates)


def time_per_token(acceptance: float | Sequence[float], draft_length: int, costs: DraftCosts) -> float:
    """What a token of each row takes: a round's costs over its expected tokens.

    Args:
        acceptance: As for `expected_tokens`.
        draft_length: k, at least 0.
        costs: Of a round.

    Returns:
        In the unit of the costs.

    Raises:
        InputError: As `expected_tokens`.
    """
    return costs.of_round(draft_length, acceptance) / expected_tokens(acceptance, draft_length)


def best_draft_length(acceptance: float | Sequence[float], costs: DraftCosts, most: int) -> int:
    """The draft length at which a token takes the least time.

    Args:
        acceptance: As for `expected_tokens`.
        costs: Of a round.
        most: The longest draft that is allowed.

    Returns:
        k in 0 … most; the smallest of those that are equally good. 0 is to draft nothing.

    Raises:
        InputError: If an a is outside [0, 1], or `most` is no whole number of at least 0.
    """
    rates = _rates(acceptance)
    powers = [1.0] * len(rates)
    times: list[float] = []
    tokens = 0.0
    for k in range(whole("most", most, "of tokens") + 1):
        tokens += math.fsum(powers) / len(rates)
        times.append(costs._of_round(k, powers) / tokens)
        powers = [p * a for p, a in zip(powers, rates, strict=True)]
    near = min(times) * (1 + 1e-13)  # what differs by rounding alone is equally good
    return next(k for k, time in enumerate(times) if time <= near)


def _rates(acceptance: float | Sequence[float]) -> list[float]:
    rates = list(acceptance) if isinstance(acceptance, Sequence) else [acceptance]
    if not rates or not all(0.0 <= as_float(a) <= 1.0 for a in rates):
        raise InputError.of(
            "acceptance",
            expected="a rate in [0, 1], or one for each row",
            got=repr(acceptance),
            remedy="Pass acceptance_of(accepted, rejected), or a rate to suppose.",
        )
    return rates
