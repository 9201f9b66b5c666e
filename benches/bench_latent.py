"""Stochastic latent steps and stochastic recursion where every solution is known. Resumable.

    python benches/bench_latent.py --out FOLDER             train and measure what is missing
    python benches/bench_latent.py --out FOLDER --seeds 1   one training seed, e.g. in its own process
    python benches/bench_latent.py --out FOLDER --write     combine all parts into benches/results/latent.json

Three puzzles whose solutions are enumerated (`lab.puzzles.puzzles`: 3-colouring, six queens row by row, Countdown
with a scratchpad), two architectures (a Llama, and an HRM that recurs), a twin of each that was trained on one solution
per instance ("collapsed"), three training seeds. One process uses one thread.

What was registered before any of it was run
--------------------------------------------

**Metrics**, on test instances: the share of valid answers; among N = 4 and 16 answers, whether some are valid (pass@N),
how many different solutions there are (distinct), and what share of all solutions that is (coverage; beside it the
bound of a sampler that is uniform over the solutions). Figures of independent samples are unbiased estimates from more
samples; a tree counts as it is.

**Reference**: plain sampling at the best of 20 temperatures from 0.05 to 4, at as many forward passes
(`_latent/measures.py`). Every family's knobs, the reference's among them, are chosen for each model, puzzle and metric
on validation instances, and judged on test instances with other draws. The temperature of the other families is one of:
greedy, the plain temperature with the best coverage@16 on validation, and 1 (0.6 if that is it).

**A win** is a 95 % interval above 0 of the paired difference to the reference, pooled over three training seeds
(instances are resampled within each seed), with a positive mean in each of them; a **loss** is the mirror image;
everything else is a **null**. No correction is made for the number of cells: of those without any effect some 2 % would
have an interval above 0. Hypotheses:

====  ================================================================================================================
H1    Latent steps in the scratchpad alone win on Countdown, varied twins, coverage@16: both architectures.
      Why: the answer behind it is still spoken in tokens, and the scratchpad is where alternatives can be kept open.
H2    On collapsed twins noise brings back what temperature does not: latent steps (in the scratchpad for Countdown,
      everywhere else) win on coverage@16 for each puzzle and architecture, recursion for each puzzle on the HRM.
H3    On the HRM, recursion with a verifier (pass@16) wins for each puzzle and twin; so does recursion selected by its
      mean log-probability and by a vote (accuracy of the selected of 16, against the same selector on plain samples).
H4    Latent steps on the tokens of an answer (colouring, queens; varied twins) do not win on coverage@16 nor on the
      share of valid answers: expected are nulls, and losses.
====  ================================================================================================================

H1 to H3 are *supported* if every cell is a win, *supported in part* if some are and none is a loss, *mixed* if there
are both, *null* if all are nulls, and *contradicted* if there are losses and no wins. H4 is *as expected* if no cell is
a win. In a pilot with other models (3-colouring) latent steps on answer tokens mostly lost to temperature, `moi` tied,
and noise on the state lay on the temperature frontier: the prior for H2 and H3 is low.

Two amendments after trial runs, to the others' advantage over latent steps and recursion; all was run again. On the
collapsed Llama (seed 0, colouring and queens) the best temperature was at the end of the sweep, then 2.5: the sweep was
extended by 3 and 4, fork sampling by that best temperature at the forks. On the varied Llama (seed 0) many settings had
the same pass@16 on validation, of which the coldest was taken: now the one with the most coverage@16 is; and hardly any
token of a colouring was a fork: trees and siblings got a second threshold.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from _latent.cells import Size, cell
from _latent.methods import Asked, thresholds
from _latent.verdicts import over_seeds, verdicts
from lab.puzzles.models import PUZZLERS, PuzzlerName, load_puzzler, train_puzzlers
from lab.puzzles.puzzles import PUZZLES, PuzzleName

import proxytune

RESULTS = Path(__file__).parent / "results" / "latent.json"
SEEDS = (0, 1, 2)
SIZES: dict[PuzzleName, Size] = {
    "colouring": Size(chosen_on=20, tried=16, judged_on=60, drawn=32),
    "queens": Size(chosen_on=20, tried=16, judged_on=60, drawn=24),
    "countdown": Size(chosen_on=12, tried=16, judged_on=40, drawn=24),
}
QUICK = Size(chosen_on=4, tried=16, judged_on=2, drawn=16)


def measure(model: Any, puzzle: PuzzleName, seed: int, size: Size) -> dict[str, Any]:
    """One cell, for a loaded model; the training seed also decides the instances and the draws."""
    of = PUZZLES[puzzle]
    asked = {
        split: Asked(model, of, of.held_out(split, count, seed), ())
        for split, count in (("validation", size.chosen_on), ("test", size.judged_on))
    }
    nats = thresholds(asked["validation"], samples=4, seed=30_000 + seed)
    validation, test = (Asked(model, of, asked[split].instances, nats) for split in ("validation", "test"))
    return cell(validation, test, size, seed=40_000 + 10 * seed)


def part(folder: Path, name: str, puzzle: str, seed: int) -> Path:
    return folder / "parts" / f"{name}-{puzzle}-{seed}.json"


def together(folder: Path, models: Path) -> dict[str, Any]:
    """All parts: differences pooled over seeds, and a verdict on each hypothesis."""
    cells = {
        f"{name} {puzzle}": [json.loads(part(folder, name, puzzle, seed).read_text()) for seed in SEEDS]
        for name in PUZZLERS
        for puzzle in PUZZLES
    }
    pooled = {name: over_seeds(records) for name, records in cells.items()}
    training = {
        f"seed {seed}": {
            name: json.loads((models / f"seed{seed}" / "checkpoints" / f"{name}.json").read_text()) for name in PUZZLERS
        }
        for seed in SEEDS
    }
    return {
        "command": "python benches/bench_latent.py --out FOLDER; python benches/bench_latent.py --out FOLDER --write",
        "versions": {
            "proxytune": proxytune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seeds": list(SEEDS),
        "sizes": {name: vars(size) for name, size in SIZES.items()},
        "seconds": {name: [record["seconds"] for record in records] for name, records in cells.items()},
        "training": training,
        "hypotheses": verdicts(pooled),
        "cells": pooled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="a folder of trained models, seed0, seed1, … [--out]")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--names", nargs="+", choices=PUZZLERS, default=list(PUZZLERS))
    parser.add_argument("--puzzles", nargs="+", choices=list(PUZZLES), default=list(PUZZLES))
    parser.add_argument("--quick", action="store_true", help="a few instances, as a smoke test")
    parser.add_argument("--write", action="store_true", help="combine the parts of all seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    models = arguments.models or arguments.out
    if arguments.write:
        found = together(arguments.out, models)
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    (arguments.out / "parts").mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        _measure_seed(arguments, models / f"seed{seed}", seed, arguments.names)


def _measure_seed(arguments: Any, folder: Path, seed: int, names: Sequence[str]) -> None:
    for name in (cast(PuzzlerName, name) for name in names):
        todo = [p for p in arguments.puzzles if not part(arguments.out, name, p, seed).exists()]
        if not todo:
            continue
        train_puzzlers(folder, seed=seed, models=[name])
        model, _ = load_puzzler(name, folder)
        for puzzle in todo:
            start, cpu = time.perf_counter(), time.process_time()
            found = measure(model, puzzle, seed, QUICK if arguments.quick else SIZES[puzzle])
            found["seconds"] = round(time.process_time() - cpu, 1)
            part(arguments.out, name, puzzle, seed).write_text(json.dumps(found))
            took = time.perf_counter() - start
            print(f"seed {seed}, {name}, {puzzle}: {took:.0f} s, {found['seconds']:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
