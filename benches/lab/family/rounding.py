"""Does rounding the weights to bfloat16 change the results?

    python -m lab.family.rounding --family FOLDER/seed0

Compares the family as saved (bfloat16, run in float32) with the float32 weights of its checkpoints, on the test split.
Writes benches/results/lab_rounding.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lab.report import family_rows
from proxytune.demo.bundle import load_family, read_record
from proxytune.demo.evaluation import CRITERIA

RESULTS = Path(__file__).parents[2] / "results" / "lab_rounding.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, required=True, help="a folder that still has its checkpoints")
    arguments = parser.parse_args()
    alpha = read_record(arguments.family)["alpha"]
    models, tokenizer = load_family(arguments.family)
    rounded = family_rows(models, tokenizer, alpha)
    for member, model in models.items():
        state = torch.load(arguments.family / "checkpoints" / f"{member}.pt", weights_only=True)
        model.load_state_dict(state["model"])
    exact = family_rows(models, tokenizer, alpha)
    rows = {}
    for before, after in zip(exact, rounded, strict=True):
        rows[before.name] = {
            task: {
                **{f"float32, {kind}": round(before.score(task, kind).rate, 4) for kind in CRITERIA},
                **{f"bfloat16, {kind}": round(after.score(task, kind).rate, 4) for kind in CRITERIA},
                "same text": sum(
                    one.text == other.text
                    for one, other in zip(before.outcomes[task], after.outcomes[task], strict=True)
                ),
                "problems": len(before.outcomes[task]),
            }
            for task in before.outcomes
        }
    result = {"command": "python -m lab.family.rounding --family FOLDER/seed0", "alpha": alpha, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(name, row)


if __name__ == "__main__":
    main()
