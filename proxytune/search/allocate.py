"""Parallel or sequential: spend what a ledger has left on one task, as a calibration run recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.budget.ledger import TokenLedger, refuse_no_ledger
from proxytune.errors import BudgetError, InputError
from proxytune.search.calibration_run import CalibrationRun
from proxytune.search.plan import LEAST_PROBLEMS, Plan, plan
from proxytune.search.policy import Policy, Voting, attempt, refuse_one_policy
from proxytune.voting.vote import Sample, Tally, vote

__all__ = ["Allocation", "allocate"]


@dataclass(frozen=True, eq=False)
class Allocation:
    """The plan, samples, vote and cost of one task.

    Attributes:
        tally: The vote over the samples; its winner is None if no sample has an answer.
        spent: Tokens that the policy charged.
        left: Tokens left in the ledger.
    """

    plan: Plan
    samples: tuple[Sample, ...]
    tally: Tally
    spent: int
    left: int


def allocate(
    task: Any,
    policies: Sequence[Policy],
    run: CalibrationRun,
    ledger: TokenLedger,
    *,
    kind: str | None = None,
    tolerance: float = 0.0,
    quantile: float = 0.5,
    least: int = LEAST_PROBLEMS,
    voting: Voting = vote,
) -> Allocation:
    """Choose a policy by the calibration run, and let it attempt the task.

    Args:
        task: Passed on to the policy.
        policies: The candidates; each must be in the run, under the same form and level.
        run: The calibration run.
        ledger: The budget. Nothing else may use it during the call.
        kind: The kind of the task; None for any.
        tolerance: As in `plan`.
        quantile: As in `plan`.
        least: As in `plan`.
        voting: From samples to an answer; use the one of the calibration run.

    Raises:
        BudgetError: If no policy fits what is left, or the chosen one tried to spend more.
        InputError: If a policy is not in the run or differs from it, or breaks the rules of `attempt`; if there is no
            ledger, or one policy instead of a list.
    """
    refuse_no_ledger(ledger)
    refuse_one_policy(policies)
    named = {policy.name: policy for policy in policies}
    if not policies or len(named) < len(policies):
        raise InputError.of(
            "policies",
            expected="at least one, all of different names",
            got=", ".join(repr(policy.name) for policy in policies) or "none",
            remedy="Put the level into the name, e.g. 'vote-8'.",
        )
    for trial in run.trials:
        policy = named.get(trial.name)
        if policy is not None and (policy.form, policy.level) != (trial.form, trial.level):
            raise InputError.of(
                f"policy {trial.name!r}",
                expected=f"{trial.form} at level {trial.level}, as it was calibrated",
                got=f"{policy.form} at level {policy.level}",
                remedy="Calibrate again, or give it another name.",
            )
    if ledger.left < 1:
        raise BudgetError.of(
            "ledger",
            expected="tokens to spend",
            got=f"{ledger.left} left, {ledger.spent} spent and {ledger.held} reserved of {ledger.max_total_tokens}",
            remedy="Raise max_total_tokens.",
        )
    found = plan(run, ledger.left, kind, names=set(named), tolerance=tolerance, quantile=quantile, least=least)
    samples, spent = attempt(named[found.chosen.name], task, ledger)
    return Allocation(found, tuple(samples), voting(samples), spent, ledger.left)
