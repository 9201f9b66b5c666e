"""Drift: how far steering moves a policy from its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxytune.diagnostics.entropy_profile import totals
from proxytune.diagnostics.positions import Place, by_position
from proxytune.diagnostics.prompts import Finding, Resamples, counts, prompts_of, said, values_of, weights_of
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace
from proxytune.trace.record import COMBINED
from proxytune.validation import choice

__all__ = ["KLDrift", "kl_drift"]


@dataclass(frozen=True, kw_only=True)
class KLDrift(Finding):
    """KL(combined ‖ base) in nats.

    Attributes:
        mean: Per token.
        per_text: Summed over a text, mean over texts.
        steered: The share of tokens that are not the base's first choice.
        places: Per token, by position.
        left_out: Tokens at positions that too few prompts (or texts) reach, not in `places`.
    """

    mean: Interval
    per_text: Interval
    steered: Interval
    places: tuple[Place, ...]
    left_out: int


def kl_drift(
    trace: Trace,
    *,
    over: Literal["prompts", "texts"] = "prompts",
    given: bool = False,
    bins: int = 10,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> KLDrift:
    """How far the policy is from its base, as KL(combined ‖ base) of each token, in nats, and by position.

    It is exact: both rows were at hand when the token was drawn, and the sum over the vocabulary is part of the trace.
    Leaves of a tree count by their weights.

    Args:
        trace: The run of a composed model.
        over: What is drawn again for the intervals: whole prompts, for what holds of other prompts too; or whole texts,
            for what holds of these prompts only (enough where there are few).
        given: Read the texts that came from elsewhere, instead of those that the model wrote.
        bins: Places along the text, of about equally many tokens.
        level: Confidence level of the intervals.
        draws: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        InputError: If the trace is of a plain model, has fewer than five prompts (or texts), or a KL is not finite.
    """
    what = "kl_drift"
    choice("over", over, ("prompts", "texts"))
    if set(trace.sources if isinstance(trace, Trace) else ()) == {COMBINED, "base"}:
        raise InputError.of(
            what,
            expected="a trace of a composed model",
            got=f"sources {', '.join(trace.sources)}",
            remedy="A plain model is its own base, and its KL is 0: record the steered one.",
        )
    prompts = prompts_of(trace, what, given=given, few=over == "texts")
    values, weights = values_of(prompts, "kl", what), weights_of(prompts, what)
    moved = [[text.steered for text in texts] for texts in prompts]
    if over == "texts":
        values = [[one] for texts in values for one in texts]
        moved = [[one] for texts in moved for one in texts]
        weights = [weight[None] for row in weights for weight in row]
    resamples = Resamples(len(values), what, level=level, draws=draws, seed=seed, of=over)
    sums, masses = totals(values, weights)
    mean = resamples.ratio(sums, masses)
    steered = resamples.ratio(totals(moved, weights)[0], masses)
    places, left_out = by_position(values, weights, resamples, bins)
    return KLDrift(
        says=(
            f"Steering moves the policy {said(mean)} nats per token from its base; {said(steered, percent=True)} of "
            "the tokens are not the base's first choice."
        ),
        **counts(prompts),
        mean=mean,
        per_text=resamples.ratio(sums, [row.sum() for row in weights]),
        steered=steered,
        places=places,
        left_out=left_out,
    )
