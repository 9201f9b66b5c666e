"""Train the lab's family with several seeds and combine their test results.

    python -m lab.family.seeds --out FOLDER            # FOLDER/seed0, FOLDER/seed1, ... ; resumable

Each seed is what `python -m lab train --seed N --out FOLDER/seedN` makes. All seeds share the world, the instruction
set and the held-out problems; initial weights, pre-training text and order differ. Writes
benches/results/lab_seeds.json. The shipped family is the first seed, a choice made before any was trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from lab.family.family import train_family
from lab.report import measure_family
from proxytune.demo.bundle import RECORD_NAME, read_record
from proxytune.demo.evaluation import CRITERIA

RESULTS = Path(__file__).parents[2] / "results" / "lab_seeds.json"


def spread(values: list[float]) -> dict[str, float]:
    """Mean and range over seeds, four decimals."""
    return {"mean": round(fmean(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def aggregate(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows and gaps over seeds; rows are matched by position, because the proxy's name contains its alpha."""
    tables = [record["test"] for record in records]
    tasks = list(tables[0]["gap_closed"])
    names = [
        "base, 0-shot",
        "base, 3-shot",
        "antiexpert alone",
        "expert alone",
        "proxy, chosen alpha",
        "tuned directly",
    ]
    return {
        "rows": {
            name: {
                f"{task}, {kind}": spread([table["rows"][index]["scores"][task][kind]["rate"] for table in tables])
                for task in tasks
                for kind in CRITERIA
            }
            for index, name in enumerate(names)
        },
        "gap_closed": {
            f"{task}, {kind}": [table["gap_closed"][task][kind] for table in tables]
            for task in tasks
            for kind in CRITERIA
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    records = []
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"
        training = train_family(folder, seed=seed)
        if not (folder / RECORD_NAME).exists():
            measure_family(folder, seed=seed, training=training)
        records.append(read_record(folder))
    result: dict[str, Any] = {
        "command": "python -m lab.family.seeds --out FOLDER",
        "split": "test",
        "alphas": [record["alpha"] for record in records],
        "training": [record["training"] for record in records],
        "over_seeds": aggregate(records),
        "per_seed": [{"seed": record["seed"], "alpha": record["alpha"], **record["test"]} for record in records],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, scores in result["over_seeds"]["rows"].items():
        print(f"{name:22s}", scores)
    print(json.dumps(result["over_seeds"]["gap_closed"], indent=1))


if __name__ == "__main__":
    main()
