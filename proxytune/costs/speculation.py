"""The costs of speculative decoding: rounds, expected tokens, the best draft length.

A decode step of a large model is bound by memory: a pass reads every weight once, however few tokens pass, so methods
compare by the bytes they read. Speculation (Leviathan et al. 2023, arXiv 2211.17192) reads the verifying members once
per round instead of once per token. In the composed model the expert drafts, since it runs anyway: a round of k drafted
tokens has k passes of the expert, one more if all k were accepted, and one pass each of base and antiexpert. Nothing is
measured here.
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
    """The costs of a round of speculative decoding, in any unit of time (or in bytes, for the lower bound).

    A round at draft length k costs `round + (k + a^k) draft + k position`: one verifying pass over k + 1 positions; k
    passes of the draft, and one over the last drafted token if that was accepted (a is the acceptance). At k = 0 that
    is a plain step, with the expert's one pass.

    Attributes:
        round: One pass of each verifying member over one position: base and antiexpert if the expert drafts, else all
            three.
        draft: One pass of the draft over one token; 0 for a draft without a model (prompt lookup).
        position: What each further position adds, to the verifying pass and to per-position work.
        plain: A step without a draft; None for `round + draft`. A draft that is not a member does not run at k = 0:
            then it is `round`.

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
        """The lower bound of the costs, in bytes; a further position adds none.

        Args:
            verifying: The members that verify: base and antiexpert if the expert drafts, else all three.
            drafting: The draft; None for one without a model.
            member: Whether the draft is a member of the composition, so that a plain step runs it too.
            context: Tokens in each row's cache.
            rows: B.
        """
        together = sum(one.at(context=context, rows=rows) for one in verifying)
        draft = 0.0 if drafting is None else drafting.at(context=context, rows=rows)
        return cls(together, draft, plain=None if member else together)

    def of_round(self, draft_length: int, acceptance: float | Sequence[float] = 1.0) -> float:
        """The mean cost of a round of draft length k; arguments and errors as for `expected_tokens`.

        The draft's last pass runs if any row needs it.
        """
        powers = (
            [a**k for a in _rates(acceptance)] if (k := whole("draft_length", draft_length, "of tokens")) else [1.0]
        )
        return self._of_round(k, powers)

    def _of_round(self, k: int, powers: Sequence[float]) -> float:
        """`powers` are each row's probability that all k drafts are accepted."""
        if k == 0 and self.plain is not None:
            return self.plain
        some = 1.0 - math.prod(1.0 - p for p in powers)
        return self.round + (k + some) * self.draft + k * self.position


def acceptance_of(accepted: int, rejected: int) -> float:
    """Accepted tokens as a share of the tokens that were tested; NaN if none was.

    Tokens after a rejection were never tested, so accepted/drafted underestimates acceptance, the more so the longer
    the drafts. This is the maximum-likelihood estimate for independent decisions.

    Args:
        accepted: Drafted tokens that were accepted.
        rejected: Rounds, over all rows, that ended in a rejection.
    """
    accepted, rejected = whole("accepted", accepted), whole("rejected", rejected, "of rounds")
    return accepted / (accepted + rejected) if accepted + rejected else math.nan


def expected_tokens(acceptance: float | Sequence[float], draft_length: int) -> float:
    """Expected tokens per round and row, `(1 − a^(k+1)) / (1 − a)`, in [1, k + 1].

    Leviathan et al. 2023, arXiv 2211.17192, eq. 1: each drafted token is accepted with probability a if all before it
    were, and every round ends in one token of the verifier's own.

    Args:
        acceptance: a in [0, 1], or one per row. Rows advance independently, so their mean counts.
        draft_length: k ≥ 0.

    Raises:
        InputError: If an a is outside [0, 1], or k is not an integer ≥ 0.
    """
    k = whole("draft_length", draft_length, "of tokens")
    rates = _rates(acceptance)
    # As a sum of powers: exact at a = 1, and no cancellation near it.
    return math.fsum(a**i for a in rates for i in range(k + 1)) / len(rates)


def time_per_token(acceptance: float | Sequence[float], draft_length: int, costs: DraftCosts) -> float:
    """Time per token and row: a round's cost over its expected tokens. Arguments as for `expected_tokens`."""
    return costs.of_round(draft_length, acceptance) / expected_tokens(acceptance, draft_length)


def best_draft_length(acceptance: float | Sequence[float], costs: DraftCosts, most: int) -> int:
    """The draft length k in 0 … `most` with the least time per token, the smallest of equally good ones.

    `acceptance` and errors are as for `expected_tokens`; 0 means not to draft.
    """
    rates = _rates(acceptance)
    powers = [1.0] * len(rates)
    times: list[float] = []
    tokens = 0.0
    for k in range(whole("most", most, "of tokens") + 1):
        tokens += math.fsum(powers) / len(rates)
        times.append(costs._of_round(k, powers) / tokens)
        powers = [p * a for p, a in zip(powers, rates, strict=True)]
    near = min(times) * (1 + 1e-13)  # times that differ only by rounding are equally good
    return next(k for k, time in enumerate(times) if time <= near)


def _rates(acceptance: float | Sequence[float]) -> list[float]:
    rates = list(acceptance) if isinstance(acceptance, Sequence) else [acceptance]
    if not rates or not all(0.0 <= as_float(a) <= 1.0 for a in rates):
        raise InputError.of(
            "acceptance",
            expected="a rate in [0, 1], or one for each row",
            got=repr(acceptance),
            remedy="Pass acceptance_of(accepted, rejected), or an assumed rate.",
        )
    return rates
