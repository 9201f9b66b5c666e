"""What a policy is, one attempt at a task, and a calibration run of many.

A policy spends a ledger on one task, in one of two forms: *parallel*, several samples and a vote, or *sequential*, one
text that is extended or revised (s1, arXiv 2501.19393). Its level is the number of samples or extensions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from numbers import Number
from typing import Any, Protocol

import numpy as np

from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, InputError
from proxytune.search.calibration_run import CalibrationRun, PolicyForm, Trial
from proxytune.validation import shown
from proxytune.voting.vote import Sample, Tally, vote

__all__ = ["AnswerChecker", "Policy", "Voting", "attempt", "refuse_one_policy", "run_policies"]

Voting = Callable[[Sequence[Sample]], Tally]
"""From samples to an answer: `vote`, or e.g. `functools.partial(vote, how="deepconf")`."""

AnswerChecker = Callable[[Any, Hashable], bool]
"""Whether an answer to a task is right."""


class Policy(Protocol):
    """A way to spend a ledger on one task."""

    @property
    def name(self) -> str:
        """Its name in a run; two settings of one policy need two names."""

    @property
    def form(self) -> PolicyForm:
        """Either "parallel" or "sequential"."""

    @property
    def level(self) -> int:
        """Number of samples or extensions."""

    def __call__(self, task: Any, ledger: TokenLedger, /) -> Sequence[Sample]:
        """Attempt a task: charge all tokens, prompt included; return at least one sample to vote on."""


def refuse_one_policy(policies: Any) -> None:
    """Raise InputError for a policy that is not in a list."""
    if not isinstance(policies, Sequence):
        raise InputError.of(
            "policies",
            expected="a list",
            got=getattr(policies, "name", None) or shown(policies, 80),
            remedy="Pass a list, also of one.",
        )


def attempt(policy: Policy, task: Any, ledger: TokenLedger) -> tuple[list[Sample], int]:
    """Let a policy attempt a task on a ledger that nothing else uses meanwhile, and check that it kept to the rules.

    Returns:
        Its samples, at least one, and the tokens that it charged, at least 1.

    Raises:
        BudgetError: If it tried to spend more than was left.
        InputError: If it returns no samples, charges nothing, or leaves tokens reserved.
    """
    spent, held, left = ledger.spent, ledger.held, ledger.left
    try:
        samples = policy(task, ledger)
    except BudgetError as error:
        raise BudgetError.of(
            f"policy {policy.name!r}",
            expected=f"an attempt within the {left} tokens that are left",
            got=f"{type(error).__name__}: {str(error).removesuffix('.')}",
            remedy="Let it ask the ledger before it draws, or raise max_total_tokens.",
        ) from error
    good = isinstance(samples, Sequence) and len(samples) > 0 and all(isinstance(s, Sample) for s in samples)
    if not good:
        raise InputError.of(
            f"policy {policy.name!r}",
            expected="a sequence of samples, at least one",
            got=repr(samples)[:80],
            remedy="Return [Sample(None)] where it has no answer.",
        )
    charged = ledger.spent - spent
    if charged < 1 or ledger.held != held:
        raise InputError.of(
            f"policy {policy.name!r}",
            expected="every token charged, and no reservation left open",
            got=f"{charged} tokens charged for {len(samples)} samples, {ledger.held - held} left reserved",
            remedy="Charge the prompt and what is generated; release reservations with `with`.",
        )
    return list(samples), charged


def run_policies(
    policies: Sequence[Policy],
    tasks: Sequence[Any],
    truths: Sequence[Hashable] | AnswerChecker,
    *,
    budget: int,
    kinds: Sequence[str] | None = None,
    voting: Voting = vote,
) -> CalibrationRun:
    """Run policies on problems with known answers.

    Use the budget of the later use, so that levels it cuts short are measured as such.

    Args:
        policies: The policies, all of different names.
        tasks: The problems.
        truths: The right answer of each; or a verifier `(task, answer) → bool`, not called where there is no answer.
        budget: Tokens per attempt, prompt included.
        kinds: The kind of each problem; None for no kinds.
        voting: From samples to the answer, e.g. `functools.partial(vote, how="deepconf")`.

    Raises:
        BudgetError: If a policy cannot attempt a problem within the budget.
        InputError: Before the first attempt: if one policy came instead of a list, if tasks, truths and kinds differ in
            number, a truth is None, or two policies share a name. Later: if answers are texts where truths are numbers
            or the reverse, a verifier raises, or a policy breaks the rules of `attempt`.
    """
    refuse_one_policy(policies)
    if not policies or not len(tasks):
        raise InputError.of(
            "policies, tasks",
            expected="at least one of each",
            got=f"{len(policies)} and {len(tasks)}",
            remedy="Pass both.",
        )
    for name, given in (("tasks", tasks), ("truths", truths), ("kinds", kinds)):
        if isinstance(given, str):
            raise InputError.of(name, expected="a list", got=f"the text {given[:40]!r}", remedy="Pass a list of one.")
    if not callable(truths) and (len(truths) != len(tasks) or any(truth is None for truth in truths)):
        raise InputError.of(
            "truths",
            expected=f"the right answer of each of the {len(tasks)} tasks, none of them None, or a verifier",
            got=f"{len(truths)}, {sum(truth is None for truth in truths)} of them None",
            remedy="Leave out problems whose answer is not known.",
        )
    of_tasks = None if kinds is None else tuple(kinds)
    none, ones = np.zeros(len(tasks), bool), np.ones(len(tasks), np.int64)
    # Refuse before the first attempt what the record would refuse at the end.
    CalibrationRun(tuple(Trial(p.name, p.form, p.level, none, ones) for p in policies), of_tasks, budget)
    trials = []
    for policy in policies:
        right, tokens = [], []
        for i, task in enumerate(tasks):
            samples, spent = attempt(policy, task, TokenLedger(budget))
            answer = voting(samples).winner
            if not callable(truths):
                _refuse_other_type(answer, truths)
            right.append(_verified(truths, task, answer) if callable(truths) else answer == truths[i])
            tokens.append(spent)
        trials.append(Trial(policy.name, policy.form, policy.level, np.array(right), np.array(tokens)))
    return CalibrationRun(tuple(trials), of_tasks, budget)


def _refuse_other_type(answer: Hashable | None, truths: Sequence[Hashable]) -> None:
    """Refuse a text where all truths are numbers, or the reverse: never equal, they would make every policy wrong."""
    for one, other in ((str, Number), (Number, str)):
        if isinstance(answer, one) and all(isinstance(truth, other) for truth in truths):
            raise InputError.of(
                "truths",
                expected=f"answers of the policies' type, {type(answer).__name__}, which can equal {answer!r}",
                got=f"{type(truths[0]).__name__}, such as {truths[0]!r}",
                remedy="Let the policies' extract() make the same type, or pass a verifier.",
            )


def _verified(verifier: AnswerChecker, task: Any, answer: Hashable | None) -> bool:
    if answer is None:
        return False
    try:
        return bool(verifier(task, answer))
    except Exception as error:
        raise InputError.of(
            "verifier",
            expected="whether an answer is right, for every answer",
            got=f"{type(error).__name__}: {error} for {answer!r} to the task {str(task)[:80]!r}",
            remedy="Return False for answers that it cannot read.",
        ) from error
