"""What can the bundled base do if it is not asked? The demo's test problems as beginnings of pre-training documents.

    python -m lab.family.documents

The base continues each greedily, up to the first full stop. A fact is right if its value is written, a chain or a
Countdown if `proxytune.demo.verifiers` takes it (leniently). Writes benches/results/lab_documents.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from proxytune.demo.bundle import bundled_family, load_family
from proxytune.demo.evaluation import held_out
from proxytune.demo.tasks import Problem
from proxytune.demo.verifiers import grade
from proxytune.demo.world import ATTRIBUTES, STATEMENTS, build_world

RESULTS = Path(__file__).parents[2] / "results" / "lab_documents.json"
COUNT = 300
MAX_NEW_TOKENS = 48


def beginning(problem: Problem) -> str:
    """The pre-training document about a problem, up to what has to be found; see `lab.family.corpus`."""
    if problem.task == "chain":
        return f"{problem.question.removesuffix(' What is the result?')} So"
    if problem.task == "countdown":
        return f"Numbers {', '.join(map(str, problem.numbers))} make {problem.gold}:"
    _, name, attribute = problem.key.split(":")
    (known,) = (one for one in ATTRIBUTES if one == attribute)
    return STATEMENTS[known][0].partition(" {value}")[0].format(name=name)


def right(problem: Problem, text: str) -> bool:
    """Whether the first sentence of a continuation has what the problem asks for."""
    return grade(problem, text.partition(".")[0] + ".").lenient


def continued(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The greedy continuation of each text."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def measure(count: int = COUNT) -> dict[str, Any]:
    """Right continuations of each task, of at most `count` test problems."""
    models, tokenizer = load_family(bundled_family())
    found: dict[str, Any] = {}
    for task, asked in held_out(build_world(), "test", count).items():
        texts = continued(models["large-base"], tokenizer, [beginning(problem) for problem in asked])
        marks = [right(problem, text) for problem, text in zip(asked, texts, strict=True)]
        found[task] = {
            "right": sum(marks),
            "problems": len(marks),
            "sample": beginning(asked[0]) + texts[0].partition(".")[0] + ".",
        }
    return {"command": "python -m lab.family.documents", "split": "test", "torch": torch.__version__, "tasks": found}


def main() -> None:
    record = measure()
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record["tasks"], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
