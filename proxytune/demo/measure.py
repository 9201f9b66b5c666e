"""The demo's table and three example answers, as JSON values."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from proxytune.demo.tasks import Problem, Task
    from proxytune.models.model import ProxyTunedModel

__all__ = ["ShownToken", "measure", "shift_steps"]


SPEED_BATCH = 32
SPEED_TOKENS = 32
SPEED_REPEATS = 5


@dataclass(frozen=True)
class ShownToken:
    """One token of the proxy's answer, and the base's top token after the same prefix; `changed` if they differ."""

    token: str
    base_token: str
    changed: bool


def measure(
    folder: Path, alpha: float, count: int, report: Callable[[str, int, int], object] = lambda *_: None
) -> dict[str, Any]:
    """Measure the table on at most `count` problems per task, and answer one problem of each task.

    `report` is called with what is being done, the answers given so far, and all that there will be.

    Returns:
        JSON values: `rows` (with `scores`, `tokens_per_second` and `parameters`), `gap_closed`, `answers`, the
            conditions (`alpha`, `split`, `speed`, `threads`, `torch`), and `seconds`, the total wall-clock time.

    Raises:
        InputError: If alpha is not finite.
        LabError: If a model is missing from the folder.
    """
    import torch

    import proxytune
    from proxytune.demo.bundle import load_family
    from proxytune.demo.evaluation import Row, answer, held_out, shots_of, table_record
    from proxytune.demo.world import build_world

    began = time.perf_counter()
    models, tokenizer = load_family(folder)
    base, tuned = models["large-base"], models["large-tuned"]
    proxy = proxytune.wrap(base, expert=models["tiny-tuned"], antiexpert=models["tiny-base"], alpha=alpha)
    world = build_world()
    asked = held_out(world, "test", count)
    shots = {task: shots_of(world, task) for task in asked}
    # table_record takes the first row as base, the last but one as proxy, the last as tuned.
    entrants: list[tuple[str, Any, Mapping[Task, Sequence[Problem]]]] = [
        ("base, 0-shot", base, {}),
        ("base, 3-shot", base, shots),
        ("expert alone", models["tiny-tuned"], {}),
        (f"proxy, α = {alpha:g}", proxy, {}),
        ("tuned directly", tuned, {}),
    ]
    work = _Work(
        len(entrants) * sum(map(len, asked.values()))  # the rows
        + len(entrants) * SPEED_REPEATS * len(asked["chain"][:SPEED_BATCH])
        + 3 * len(asked),  # three models answer one problem of each task
        report,
    )
    rows = []
    for name, model, examples in entrants:
        work.begin(name)
        with torch.inference_mode():
            outcomes = {
                task: answer(model, tokenizer, chosen, shots=examples.get(task, ()), advance=work.advance)
                for task, chosen in asked.items()
            }
            rows.append(Row(name, outcomes))
    work.begin("speed")
    speeds = _tokens_per_second(
        [(model, examples.get("chain", ())) for _, model, examples in entrants], tokenizer, asked["chain"], work.advance
    )
    record = table_record(rows)
    for row, (_, model, _), speed in zip(record["rows"], entrants, speeds, strict=True):
        row.update({"tokens_per_second": round(speed), "parameters": model.num_parameters()})
    work.begin("three answers")
    answers = []
    for chosen in asked.values():
        answers.append(_answers(base, proxy, tuned, tokenizer, chosen[0]))
        work.advance(3)
    return {
        "split": "test",
        "alpha": alpha,
        **record,
        "speed": {"batch": SPEED_BATCH, "new_tokens": SPEED_TOKENS, "repeats": SPEED_REPEATS},
        "answers": answers,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }


@dataclass
class _Work:
    """The answers to be given in all, those given, and whom to tell."""

    total: int
    report: Callable[[str, int, int], object]
    done: int = 0
    what: str = ""

    def begin(self, what: str) -> None:
        self.what = what
        self.advance(0)

    def advance(self, answers: int) -> None:
        self.done += answers
        self.report(self.what, self.done, self.total)


def shift_steps(
    model: ProxyTunedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> tuple[str, list[ShownToken]]:
    """Answer a prompt greedily, and mark the tokens that the base alone would not have chosen.

    Each token is compared with the base's top token after the same prefix, not with the base's own answer, which is a
    different text from the first change on.

    Returns:
        The answer without special tokens, and its tokens.
    """
    import torch

    batch = tokenizer(prompt, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=False)  # [1, prompt + new]
        favourites = model.base(input_ids=ids).logits[0, length - 1 : -1].argmax(-1).tolist()
    chosen = ids[0, length:].tolist()
    steps = [
        ShownToken(tokenizer.decode([own]), tokenizer.decode([other]), own != other)
        for own, other in zip(chosen, favourites, strict=True)
    ]
    return tokenizer.decode(chosen, skip_special_tokens=True), steps


def _tokens_per_second(
    entrants: Sequence[tuple[Any, Sequence[Problem]]],
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Problem],
    advance: Callable[[int], object],
) -> list[float]:
    """Generated tokens per second, at one batch size and length for all models, so that long answers do not count.

    The models take turns, so that background load affects all of them alike. `advance(n)` is called after each batch.
    """
    import torch

    from proxytune.demo.instructions import prompt_of

    batches = []
    for _, shots in entrants:
        prefix = "".join(f"{prompt_of(shot.question)} {shot.answer}\n" for shot in shots)
        prompts = [prefix + prompt_of(problem.question) for problem in asked[:SPEED_BATCH]]
        batches.append(tokenizer(prompts, return_tensors="pt", padding=True))
    times: list[list[float]] = [[] for _ in entrants]
    with torch.inference_mode():
        for _ in range(SPEED_REPEATS):
            for (model, _), batch, spent in zip(entrants, batches, times, strict=True):
                began = time.perf_counter()
                model.generate(**batch, do_sample=False, min_new_tokens=SPEED_TOKENS, max_new_tokens=SPEED_TOKENS)
                spent.append(time.perf_counter() - began)
                advance(len(asked[:SPEED_BATCH]))
    return [len(asked[:SPEED_BATCH]) * SPEED_TOKENS / statistics.median(spent) for spent in times]


def _answers(
    base: Any, proxy: ProxyTunedModel, tuned: Any, tokenizer: PreTrainedTokenizerBase, problem: Problem
) -> dict[str, Any]:
    """One problem, answered by base, proxy and tuned model."""
    import torch

    from proxytune.demo.evaluation import answer
    from proxytune.demo.instructions import prompt_of

    with torch.inference_mode():
        own, directly = (answer(model, tokenizer, [problem])[0].text for model in (base, tuned))
    steered, steps = shift_steps(proxy, tokenizer, prompt_of(problem.question))
    return {
        "task": problem.task,
        "prompt": prompt_of(problem.question),
        "gold": problem.gold,
        "base": own,
        "proxy": steered,
        "tuned": directly,
        "tokens": [asdict(step) for step in steps],
    }
