"""Forks, trees, votes, budgets and the allocator on the lab, where the truth is known. Resumable.

    python benches/bench_forks.py --out FOLDER             train and measure what is missing
    python benches/bench_forks.py --out FOLDER --seeds 1   one training seed, e.g. in its own process
    python benches/bench_forks.py --out FOLDER --write     combine all parts into benches/results/forks.json

With `--parts`, only some of the measurements are made anew. `--write` takes the others, and the records of trainings
that the folder lacks, from the committed results as they are; `measured` and `trained` there say when, by which
command and with which versions each came about.

The studies (`lab.studies.studies`) are trained with three seeds from the bundled family, in FOLDER/seed0, …; each part
of the measurements is a file in FOLDER/parts. One process uses one thread. Results are recorded whether they favour a
method or not.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from _forks import pondering as forks_pondering
from _forks import sampling as forks_sampling
from _forks import votes as forks_votes
from _forks.common import Subject
from lab.studies.pondering import KINDS
from lab.studies.studies import STUDIES, train_studies
from transformers import AutoTokenizer, LlamaForCausalLM

import proxytune
from proxytune.demo.bundle import bundled

RESULTS = Path(__file__).parent / "results" / "forks.json"
SEEDS = (0, 1, 2)
PARTS = ("detection", "votes", "tuned", "collapsed", "lengths", "confidence")
COUNTDOWN = ("tuned", "collapsed")
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
    chosen = swept["test"]["k=16"][forks_sampling.CHOSEN]["temperature"]
    spread = forks_sampling.spreads(subject, nats, seed=20_000 + subject.seed, chosen=chosen, **SIZES["spreads"])
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
            found |= {"seconds": round(time.perf_counter() - start), "versions": versions()}
            place.write_text(json.dumps(found))
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def versions() -> dict[str, str]:
    return {
        "proxytune": proxytune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def together(folder: Path, seeds: Sequence[int], before: dict[str, Any]) -> dict[str, Any]:
    """All parts, and the result over seeds: per problem the mean over seeds, then an interval over problems.

    Args:
        folder: With the parts and the records of training. A part counts if it is there for all seeds.
        seeds: Training seeds.
        before: A result of this function. From it comes what the folder lacks.
    """
    out: dict[str, Any] = {"seeds": list(seeds), "sizes": SIZES, "measured": {}, "trained": {}}
    out |= {"training": [{} for _ in seeds], "over seeds": {}, "per seed": {}}
    new = [name for name in PARTS if all(part(name, seed, folder).exists() for seed in seeds)]
    if kept := [name for name in PARTS if name not in new and before["sizes"] != SIZES]:
        raise SystemExit(f"{', '.join(kept)}: expected to be kept at the present sizes; measure them again in {folder}")
    for name in PARTS:
        if name not in new:
            out["per seed"][name], out["measured"][name] = before["per seed"][name], before["measured"][name]
            if name in before["over seeds"]:
                out["over seeds"][name] = before["over seeds"][name]
            continue
        found = [json.loads(part(name, seed, folder).read_text(encoding="utf-8")) for seed in seeds]
        by = [one.pop("versions") for one in found]
        if any(one != by[0] for one in by):
            raise SystemExit(f"{name}: expected all seeds by the same versions; got {by}")
        out["measured"][name] = {
            "command": f"python benches/bench_forks.py --out FOLDER --parts {name}",
            "date": _date(part(name, seed, folder) for seed in seeds),
            **by[0],
        }
        out["per seed"][name] = found
        if name in COUNTDOWN:
            out["over seeds"][name] = over_seeds(found)
    for name in STUDIES:
        places = [folder / f"seed{seed}" / "checkpoints" / f"{name}.json" for seed in seeds]
        complete = all(place.exists() for place in places)
        for number, place in enumerate(places):
            kept_or_new = (
                json.loads(place.read_text(encoding="utf-8")) if complete else before["training"][number][name]
            )
            out["training"][number][name] = kept_or_new
        out["trained"][name] = {"date": _date(places), **versions()} if complete else before["trained"][name]
    return out


def _date(files: Iterable[Path]) -> str:
    """The day on which the last of some files was written."""
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).date().isoformat()


def over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one Countdown model together; the lists of differences are taken out of them.

    Returns:
        Per row and measure, the mean difference of each problem over seeds to both references, the intervals, and which
        is the better reference.
    """
    tests = [one["temperatures"]["test"] for one in found]
    methods = [one["spreads"]["methods"] for one in found]
    return {
        "two temperatures": {k: _better([test[k].pop("differences") for test in tests]) for k in tests[0]},
        "methods": {
            method: {measure: _better([one[measure] for one in lists]) for measure in lists[0]}
            for method in methods[0]
            for lists in [[one[method].pop("differences") for one in methods]]
        },
    }


def _better(lists: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Differences of each seed to both references, `[S]` of `[P]` each."""
    pooled = {
        name: [round(sum(values) / len(values), 5) for values in zip(*(one[name] for one in lists), strict=True)]
        for name in (forks_sampling.CHOSEN, forks_sampling.AT_ONE)
    }
    return {**forks_sampling.better_of_both(*pooled.values()), "differences": pooled}


def text(record: dict[str, Any]) -> str:
    """The record as JSON, with each list of numbers on one line."""
    lines = json.dumps(record, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", lines) + "\n"


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
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        RESULTS.write_text(text(together(arguments.out, SEEDS, before)), encoding="utf-8")
        return
    needed = {"detection": "routes", "votes": "routes", "collapsed": "collapsed", "lengths": "ponder"}
    needed["confidence"] = "ponder"
    for seed in arguments.seeds:
        studies = [study for study in STUDIES if study in {needed.get(name) for name in arguments.parts}]
        train_studies(arguments.out / f"seed{seed}", seed=seed, studies=studies)
    measure(arguments.out, arguments.seeds, arguments.parts)


if __name__ == "__main__":
    main()
