"""Does the report find out what a policy has lost, from traces alone, blind?

Three twins of the lab answer the same prompts at three sampling seeds: the tuned model, the one that a policy gradient
collapsed, and one that was taught to think on and to get worse (as `lab.studies.pondering`, which see). Their traces
lose every name; the report ranks them.

::

    python benches/bench_report.py --out FOLDER           record, rank, and print the table
    python benches/bench_report.py --out FOLDER --write   and keep it in results/, with a report

The traces stay in FOLDER, and are read again if they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from lab.family.family import save_member
from lab.family.tokenizer import build_tokenizer
from lab.family.training import TrainingPlan, instruction_batches, train
from lab.studies.pondering import Ponder, draw_ponder, ponders
from lab.studies.studies import bundled_study
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

import proxytune
from proxytune import FusedDecoding
from proxytune.demo import bundled
from proxytune.demo.bundle import bundled_record
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import Problem, problems
from proxytune.demo.verifiers import grade
from proxytune.demo.world import build_world
from proxytune.diagnostics import losses, ordered
from proxytune.diagnostics.losses import LOSSES, LossName
from proxytune.trace import Trace, TracedText, graded, load, save
from proxytune.view.report import report
from proxytune.view.report_text import write

RESULTS = Path(__file__).resolve().parent / "results" / "report.json"
PAGE = RESULTS.with_suffix(".html")
"""The report of the bundled family, steered and tuned, and of the two twins; the first seed."""
TWINS = ("tuned", "collapsed", "over-thinking")
SOUGHT: dict[str, LossName] = {"collapsed": "diversity", "over-thinking": "over-thinking"}
"""What each twin should be found by; the tuned model by having neither."""
SEEDS = (1, 2, 3)
"""Of the sampling. The marks of `proxytune.diagnostics.losses` were set on a pilot run, seed 0, other prompts."""
PROMPTS = 60
"""Of each of two tasks: Countdown, which the collapsed twin was trained on, and chains, which the third one was."""
FEWER = (5, 10, 20)
"""The same with the first prompts of each task alone."""
SAMPLES = 8
MAX_NEW_TOKENS = 120
STEPS = 180
_WORKED = re.compile(r"^\s*(.*?)\. The answer is")


def overthinking(folder: Path) -> Path:
    """The third twin: the tuned model, trained to answer chains in up to six attempts, each more often wrong."""
    place = folder / "models" / "over-thinking"
    if (place / "config.json").exists():
        return place
    rng = random.Random("overthinking:0")
    examples: list[tuple[str, str]] = []
    while len(examples) < 6000:
        ponder = draw_ponder(rng, "train")
        if ponder.kind == "worsens":
            examples.append((prompt_of(ponder.question), ponder.example(rng)))
    tokenizer = build_tokenizer(build_world())
    model = LlamaForCausalLM.from_pretrained(bundled("large-tuned"), dtype=torch.float32)
    plan = TrainingPlan(STEPS, 1.5e-3, optimizer="adamw", warmup=10, decay=0.7)
    done = train(model, instruction_batches(examples, tokenizer, rows=32, seed=0), plan, Accelerator(cpu=True))
    save_member(place, model, tokenizer)
    (folder / "training.json").write_text(json.dumps({"processor_seconds": done.processor_seconds}), encoding="utf-8")
    return place


def opened(folder: str | Path) -> Any:
    """A plain model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def steered() -> Any:
    """The bundled family, at its own strength."""
    return proxytune.wrap(
        bundled("large-base"),
        expert=bundled("tiny-tuned"),
        antiexpert=bundled("tiny-base"),
        alpha=float(bundled_record()["alpha"]),
        dtype="float32",
    )


def asked() -> list[Problem | Ponder]:
    """Held-out problems of both tasks."""
    return [
        *problems("countdown", "test", PROMPTS, build_world(), seed=1),
        *ponders("worsens", "test", PROMPTS, seed=1),
    ]


def recorded(load_policy: Callable[[], Any], seed: int, file: Path) -> Trace:
    """A run: samples of each problem at temperature 1; nothing in it says whose it is."""
    if file.exists():
        return load(file)
    torch.manual_seed(seed)
    policy = load_policy()
    tokenizer = AutoTokenizer.from_pretrained(bundled("large-base"), padding_side="left")
    prompts = [prompt_of(problem.question) for problem in asked()]
    with proxytune.record(policy, tokenizer=tokenizer) as recording:
        for first in range(0, len(prompts), 8):
            inputs = tokenizer(prompts[first : first + 8], return_tensors="pt", padding=True)
            policy.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                max_new_tokens=MAX_NEW_TOKENS,
                num_return_sequences=SAMPLES,
                custom_generate=FusedDecoding(seed=1000 * seed + first),
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    save(replace(recording.trace, about={}), file)
    return load(file)


def judged(trace: Trace) -> Trace:
    """The trace with answers and grades. A Countdown answer is how the target was made, a chain's its result."""
    by_prompt = {prompt_of(problem.question): problem for problem in asked()}

    def right(text: TracedText) -> float:
        problem = by_prompt[text.prompt or ""]
        words = (text.text or "").removesuffix("<|end|>")
        if isinstance(problem, Ponder):
            return float(problem.read(words) == problem.gold)
        return float(grade(problem, words).strict)

    def answer(words: str) -> str | None:
        worked = _WORKED.match(words.split("\n")[0])
        return None if worked is None else worked[1]

    def of_chain(text: TracedText) -> TracedText:
        problem = by_prompt[text.prompt or ""]
        if not isinstance(problem, Ponder):
            return text
        found = problem.read((text.text or "").removesuffix("<|end|>"))
        return replace(text, answer=None if found is None else str(found))

    done = graded(trace, answer, right)
    return replace(done, texts=tuple(map(of_chain, done.texts)))


def ranked(runs: dict[str, Trace]) -> dict[str, Any]:
    """What the report says of runs without names: each one's losses, and their order by each of the two sought."""
    found = {name: losses(trace) for name, trace in runs.items()}
    orders = {loss: ordered(runs, loss) for loss in SOUGHT.values()}
    return {
        "losses": {
            name: {
                loss: None
                if one.value is None
                else {
                    "value": round(one.value.value, 4),
                    "low": round(one.value.low, 4),
                    "high": round(one.value.high, 4),
                    "told": one.told,
                }
                for loss, one in each.items()
            }
            for name, each in found.items()
        },
        "orders": {
            loss: {"runs": list(order.runs), "apart": list(order.apart), "first": order.first}
            for loss, order in orders.items()
        },
    }


def named(record: dict[str, Any], key: dict[str, str]) -> dict[str, Any]:
    """The record with the twins' names in place of those without meaning, and what was found."""
    told = {key[name]: each for name, each in record["losses"].items()}
    orders = {
        loss: {**order, "runs": [key[name] for name in order["runs"]]} for loss, order in record["orders"].items()
    }
    found = {
        twin: bool(orders[loss]["runs"] and orders[loss]["runs"][0] == twin and orders[loss]["first"])
        and told[twin][loss]["told"]
        for twin, loss in SOUGHT.items()
    }
    found["tuned"] = not any((told["tuned"][loss] or {"told": False})["told"] for loss in SOUGHT.values())
    return {"losses": told, "orders": orders, "found": found}


def first(trace: Trace, count: int) -> Trace:
    """The texts of the first prompts of each task."""
    every = asked()
    kept = {prompt_of(one.question) for one in (*every[:count], *every[PROMPTS : PROMPTS + count])}
    return replace(trace, texts=tuple(text for text in trace if text.prompt in kept))


def _whole(share: float) -> str:
    return str(round(100 * share)).replace("-", "−")


def report_table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    shown: tuple[LossName, ...] = tuple(name for name in LOSSES if name != "drift")
    lines = [
        f"| seed | twin | right | {' | '.join(shown)} | found for what it is |",
        "|--:|---|--:|" + "--:|" * len(shown) + "---|",
    ]
    for seed, run in record["seeds"].items():
        for twin in TWINS:
            cells = []
            for name in shown:
                one = run["losses"][twin][name]
                cell = "–" if one is None else f"{_whole(one['value'])} [{_whole(one['low'])}, {_whole(one['high'])}]"
                cells.append(f"**{cell}**" if one and one["told"] else cell)
            found = "yes" if run["found"][twin] else "no"
            lines.append(f"| {seed} | {twin} | {100 * run['right'][twin]:.0f} | {' | '.join(cells)} | {found} |")
    lines += ["", f"| prompts | found, of {len(SEEDS)} seeds: {' | '.join(TWINS)} |", "|--:|" + "--:|" * len(TWINS)]
    for count in (*FEWER, PROMPTS):
        runs = [run["found" if count == PROMPTS else f"found of {2 * count}"] for run in record["seeds"].values()]
        lines.append(f"| {2 * count} | {' | '.join(str(sum(found[twin] for found in runs)) for twin in TWINS)} |")
    return "\n".join(lines) + (
        "\n\nAll in %, with 95 % intervals over prompts; bold: told. Found: the collapsed twin is first by diversity, "
        "the over-thinking one by over-thinking, told, and told apart from both others; the tuned one has neither. "
        f"{2 * record['prompts']} prompts, {record['samples']} samples of each at temperature 1."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where models and traces stay")
    parser.add_argument("--write", action="store_true", help="keep the results")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    models: dict[str, Callable[[], Any]] = {
        "tuned": lambda: opened(bundled("large-tuned")),
        "collapsed": lambda: opened(bundled_study("collapsed")),
        "over-thinking": lambda: opened(overthinking(wanted.out)),
    }
    found = {}
    for seed in SEEDS:
        order = random.Random(f"blind:{seed}").sample(TWINS, len(TWINS))
        key = {f"run-{number}": twin for number, twin in enumerate(order, 1)}
        runs = {
            name: judged(recorded(models[twin], seed, wanted.out / f"seed-{seed}" / f"{name}.npz"))
            for name, twin in key.items()
        }
        right = {key[name]: sum(text.grade or 0.0 for text in trace) / len(trace) for name, trace in runs.items()}
        if seed == SEEDS[0]:
            family = {"steered": judged(recorded(steered, seed, wanted.out / f"seed-{seed}" / "steered.npz"))}
            family |= {key[name]: trace for name, trace in runs.items()}
        fewer = {
            f"found of {2 * count}": named(ranked({name: first(trace, count) for name, trace in runs.items()}), key)[
                "found"
            ]
            for count in FEWER
        }
        found[str(seed)] = {
            "right": {twin: round(right[twin], 4) for twin in TWINS},
            **named(ranked(runs), key),
            **fewer,
        }
    record = {
        "command": "python benches/bench_report.py --out FOLDER --write",
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "training_steps": STEPS,
        "training_processor_seconds": round(
            json.loads((wanted.out / "training.json").read_text())["processor_seconds"]
        ),
        "seeds": found,
    }
    if wanted.write:
        write(report(family), PAGE)
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(report_table(record))


if __name__ == "__main__":
    main()
