"""Forks, trees, votes, budgets and the allocator on the lab, where the truth is known. Resumable.

    python benches/bench_forks.py --out FOLDER             train and measure what is missing
    python benches/bench_forks.py --out FOLDER --seeds 1   one training seed, e.g. in its own process
    python benches/bench_forks.py --out FOLDER --write     combine all parts into benches/results/forks.json

The studies (`lab.studies.studies`) are trained with three seeds from the bundled family, in FOLDER/seed0, …; each part
of the measurements is a file in FOLDER/parts. One process uses one thread. Results are recorded whether they favour a
method or not.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _forks import pondering as forks_pondering
from _forks import sampling as forks_sampling
from _forks import votes as forks_votes
from _forks.common import Subject, mean_interval, record
from lab.studies.pondering import KINDS
from lab.studies.studies import STUDIES, train_studies
from transformers import AutoTokenizer, LlamaForCausalLM

import proxytune
from proxytune.demo.bundle import bundled

RESULTS = Path(__file__).parent / "results" / "forks.json"
SEEDS = (0, 1, 2)
PARTS = ("detection", "votes", "tuned", "collapsed", "lengths", "confidence")
SIZES: dict[str, dict[str, int]] = {
    "detection": {"problems": 40, "samples": 16},
    "votes": {"problems": 10, "trees": 100},
    "temperatures": {"chosen_on": 50, "judged_on": 100, "few": 16, "many": 32},
    "spreads": {"count": 100, "samples": 64},
    "lengths": {"problems": 60, "samples": 4},
    "confidence": {"problems": 80, "calibration": 60, "samples": 16, "attempts": 4},
}


def detection(seed: int, folder: Path) -> dict[str, Any]:
    return forks_votes.detection(Subject.study("routes", seed, folder), **SIZES["detection"])


def votes(seed: int, folder: Path) -> dict[str, Any]:
    nats = detection_of(seed, folder)["target share as taught"]["nats"]
    return {"nats": nats, **forks_votes.votes(Subject.study("routes", seed, folder), nats, **SIZES["votes"])}


def tuned(seed: int, folder: Path) -> dict[str, Any]:
    """The directly tuned model of the bundled family: one training, but other draws for each seed."""
    place = bundled("large-tuned")
    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    return _countdown(Subject("tuned", seed, model, AutoTokenizer.from_pretrained(place)))


def collapsed(seed: int, folder: Path) -> dict[str, Any]:
    return _countdown(Subject.study("collapsed", seed, folder))


def _countdown(subject: Subject) -> dict[str, Any]:
    nats = forks_sampling.threshold(subject)
    swept = forks_sampling.temperatures(subject, nats, seed=subject.seed, **SIZES["temperatures"])
    best = swept["test"]["k=16"]["plain"]["temperature"]
    spread = forks_sampling.spreads(
        subject, nats, seed=20_000 + subject.seed, best_temperature=best, **SIZES["spreads"]
    )
    return {"nats": round(nats, 4), "temperatures": swept, "spreads": spread}


def lengths(seed: int, folder: Path) -> dict[str, Any]:
    return forks_pondering.lengths(Subject.study("ponder", seed, folder), **SIZES["lengths"])


def confidence(seed: int, folder: Path) -> dict[str, Any]:
    size, subject = SIZES["confidence"], Subject.study("ponder", seed, folder)
    drawn = {k: forks_pondering.draw(subject, k, "test", size["problems"], size["samples"]) for k in KINDS}
    learnt = {k: forks_pondering.draw(subject, k, "validation", size["calibration"], size["samples"]) for k in KINDS}
    return {
        "confidence": forks_pondering.confidence(drawn, learnt),
        "allocation": forks_pondering.allocation(subject, drawn, learnt, attempts=size["attempts"]),
    }


MEASURES: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "detection": detection,
    "votes": votes,
    "tuned": tuned,
    "collapsed": collapsed,
    "lengths": lengths,
    "confidence": confidence,
}


def part(name: str, seed: int, folder: Path) -> Path:
    return folder / "parts" / f"{name}-{seed}.json"


def detection_of(seed: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part("detection", seed, folder).read_text())
    return found


def measure(folder: Path, seeds: Sequence[int], parts: Sequence[str]) -> None:
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in parts:
            place = part(name, seed, folder)
            if place.exists():
                continue
            start = time.perf_counter()
            found = MEASURES[name](seed, folder)
            place.write_text(json.dumps(found | {"seconds": round(time.perf_counter() - start)}))
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def together(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All parts, and the result over seeds: per problem the mean over seeds, then an interval over problems."""
    found = {name: [json.loads(part(name, seed, folder).read_text()) for seed in seeds] for name in PARTS}
    pooled: dict[str, Any] = {}
    for name in ("tuned", "collapsed"):
        tests = [one["temperatures"]["test"] for one in found[name]]
        methods = [one["spreads"]["methods"] for one in found[name]]
        pooled[name] = {
            "fork − plain": {k: record(_pooled([test[k].pop("differences") for test in tests])) for k in tests[0]},
            "methods − independent": {},
        }
        for method in methods[0]:
            lists = [one[method].pop("differences") for one in methods]
            pooled[name]["methods − independent"][method] = {
                what: record(_pooled([some[what] for some in lists])) for what in lists[0]
            }
    return {
        "command": "python benches/bench_forks.py --out FOLDER; python benches/bench_forks.py --out FOLDER --write",
        "versions": {
            "proxytune": proxytune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seeds": list(seeds),
        "sizes": SIZES,
        "training": [
            {
                name: json.loads((folder / f"seed{seed}" / "checkpoints" / f"{name}.json").read_text())
                for name in STUDIES
            }
            for seed in seeds
        ],
        "over seeds": pooled,
        "per seed": found,
    }


def _pooled(lists: Sequence[Sequence[float]]) -> Any:
    return mean_interval([sum(values) / len(values) for values in zip(*lists, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--write", action="store_true", help="combine the parts of all seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if arguments.write:
        RESULTS.write_text(json.dumps(together(arguments.out, SEEDS), indent=1, ensure_ascii=False) + "\n")
        return
    needed = {"detection": "routes", "votes": "routes", "collapsed": "collapsed", "lengths": "ponder"}
    needed["confidence"] = "ponder"
    for seed in arguments.seeds:
        studies = [study for study in STUDIES if study in {needed.get(name) for name in arguments.parts}]
        train_studies(arguments.out / f"seed{seed}", seed=seed, studies=studies)
    measure(arguments.out, arguments.seeds, arguments.parts)


if __name__ == "__main__":
    main()
