"""Ask held-out problems, grade the answers, and compare the models of a family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from proxytune.demo.holdout import HeldOut
from proxytune.demo.instructions import InstructionRecipe, instruction_set, prompt_of
from proxytune.demo.tasks import TASKS, Problem, Task, problems
from proxytune.demo.verifiers import Grade, grade
from proxytune.demo.world import World

Criterion = Literal["lenient", "strict"]
CRITERIA: tuple[Criterion, ...] = ("lenient", "strict")
STEERED: tuple[Task, ...] = ("chain", "qa")
"""The tasks that decide alpha."""
Z_95 = 1.959964
"""Two-sided 95 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Outcome:
    """One answered problem: what the model wrote after `Answer:`, without special tokens, and its grade."""

    problem: Problem
    text: str
    grade: Grade

    def correct(self, criterion: Criterion) -> bool:
        """Whether the answer is right under a criterion."""
        return self.grade.strict if criterion == "strict" else self.grade.lenient


@dataclass(frozen=True)
class Score:
    """Right answers out of all problems asked."""

    correct: int
    total: int

    @property
    def rate(self) -> float:
        """The share, between 0 and 1; NaN if nothing was asked."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval (Wilson 1927), valid near 0 and 1 too."""
        if not self.total:
            return math.nan, math.nan
        shrink = 1.0 + Z_95**2 / self.total
        centre = (self.rate + Z_95**2 / (2 * self.total)) / shrink
        spread = Z_95 * math.sqrt(self.rate * (1 - self.rate) / self.total + Z_95**2 / (4 * self.total**2)) / shrink
        return max(0.0, centre - spread), min(1.0, centre + spread)


@dataclass(frozen=True)
class Row:
    """All outcomes of one model or prompting method, per task in the order of the problems."""

    name: str
    outcomes: Mapping[Task, Sequence[Outcome]]

    def score(self, task: Task, criterion: Criterion = "lenient") -> Score:
        """The share of right answers on one task."""
        outcomes = self.outcomes[task]
        return Score(sum(outcome.correct(criterion) for outcome in outcomes), len(outcomes))


@dataclass(frozen=True)
class Gap:
    """How much of the gap between the base and the directly tuned model the proxy closes.

    Attributes:
        closed: `(proxy - base) / (tuned - base)`; NaN if tuning's gain cannot be told from 0.
        low: Lower end of the 95 % bootstrap interval over problems.
        high: Upper end.
    """

    closed: float
    low: float
    high: float


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Problem],
    *,
    shots: Sequence[Problem] = (),
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda _: None,
) -> list[Outcome]:
    """Answer every problem once, greedily, through the model's own `generate()`, whose saved settings decide the stop.

    `shots` are solved problems to put before each prompt. With shots an answer ends at the first line break, where the
    next question would begin; without, everything up to the end-of-text token is graded. The tokenizer has to pad on
    the left. `advance(n)` is called after each batch, with its size.
    """
    prefix = "".join(f"{prompt_of(shot.question)} {shot.answer}\n" for shot in shots)
    prompts = [prefix + prompt_of(problem.question) for problem in asked]
    # Batches of similar lengths need little padding.
    order = sorted(range(len(asked)), key=lambda index: len(prompts[index]))
    texts = [""] * len(asked)
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    stops = {"eos_token_id": [tokenizer.eos_token_id, *line_break]} if shots else {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True)
        sequences = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, **stops
        )  # [B, prompt + new]
        new_ids = sequences[:, batch["input_ids"].shape[1] :]
        for index, text in zip(chosen, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True):
            texts[index] = text.split("\n", 1)[0] if shots else text
        advance(len(chosen))
    return [Outcome(problem, text, grade(problem, text)) for problem, text in zip(asked, texts, strict=True)]


def held_out(world: World, split: HeldOut, count: int, tasks: Sequence[Task] = TASKS) -> dict[Task, list[Problem]]:
    """At most `count` held-out problems per task, the same on every machine."""
    return {task: problems(task, split, count, world) for task in tasks}


def shots_of(world: World, task: Task, count: int = 3) -> list[Problem]:
    """The first training problems of a task, for few-shot prompts."""
    return [problem for problem in instruction_set(world, InstructionRecipe(seed=77)) if problem.task == task][:count]


def evaluate(
    name: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[Task, Sequence[Problem]],
    *,
    shots: Mapping[Task, Sequence[Problem]] | None = None,
    batch_size: int = 64,
) -> Row:
    """Answer and grade problems (per task) with one model: a row of the table. `shots` are solved problems per task."""
    total = sum(len(chosen) for chosen in asked.values())
    with tqdm(total=total, desc=name, unit="problem", leave=False) as bar:
        return Row(
            name,
            {
                task: answer(
                    model,
                    tokenizer,
                    chosen,
                    shots=shots[task] if shots else (),
                    batch_size=batch_size,
                    advance=bar.update,
                )
                for task, chosen in asked.items()
            },
        )


def gap_closed(base: Row, proxy: Row, tuned: Row, task: Task, criterion: Criterion = "lenient") -> Gap:
    """`(proxy - base) / (tuned - base)` with a paired bootstrap over problems (10,000 resamples, fixed seed).

    All three values are NaN if the 95 % interval of `tuned - base` reaches down to 0: a share of a gap that may not
    exist is meaningless.
    """
    verdicts = [[outcome.correct(criterion) for outcome in row.outcomes[task]] for row in (base, proxy, tuned)]
    right = np.array(verdicts, dtype=np.float64)  # [3, N]
    means = right.mean(axis=1)
    count = right.shape[1]
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=10_000) / count  # [R, N]
    resampled = draws @ right.T  # [R, 3]
    gains = resampled[:, 2] - resampled[:, 0]
    if np.quantile(gains, 0.025) <= 0.0:
        return Gap(math.nan, math.nan, math.nan)
    shares = (resampled[:, 1] - resampled[:, 0])[gains > 0] / gains[gains > 0]
    low, high = np.quantile(shares, (0.025, 0.975))
    return Gap(float((means[1] - means[0]) / (means[2] - means[0])), float(low), float(high))


def compose(base: Any, expert: Any, antiexpert: Any, alpha: float) -> Any:
    """The steered model, from `proxytune.wrap`."""
    import proxytune

    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha)


def table_record(rows: Sequence[Row]) -> dict[str, Any]:
    """The table as JSON values: scores with intervals, and the gap closed by the last row but one."""
    base, proxy, tuned = rows[0], rows[-2], rows[-1]
    tasks = list(base.outcomes)
    return {
        "rows": [
            {
                "name": row.name,
                "scores": {
                    task: {
                        criterion: {
                            "rate": round(row.score(task, criterion).rate, 4),
                            "interval": [round(end, 4) for end in row.score(task, criterion).interval],
                            "problems": row.score(task, criterion).total,
                        }
                        for criterion in CRITERIA
                    }
                    for task in tasks
                },
            }
            for row in rows
        ],
        "gap_closed": {
            task: {criterion: _gap_record(gap_closed(base, proxy, tuned, task, criterion)) for criterion in CRITERIA}
            for task in tasks
        },
    }


def _gap_record(gap: Gap) -> dict[str, Any]:
    if math.isnan(gap.closed):
        return {"closed": None, "interval": None}
    return {"closed": round(gap.closed, 4), "interval": [round(gap.low, 4), round(gap.high, 4)]}
