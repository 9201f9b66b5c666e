"""What if the base has never seen the form that the expert was taught?

    python -m lab.family.template --taught FOLDER/seed0 --out FOLDER/untaught      # resumable

Trains the same family (same seed, same steps) on pre-training text without a single `The answer is X.`, and sweeps
alpha on the validation split for both families. The expert is tuned on that form in both. Writes
benches/results/lab_template.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lab.family.corpus import CorpusRecipe
from lab.family.family import FamilyRecipe, train_family
from lab.report import ALPHAS, sweep_alpha
from proxytune.demo.bundle import load_family, read_record
from proxytune.demo.evaluation import CRITERIA

RESULTS = Path(__file__).parents[2] / "results" / "lab_template.json"


def sweep(folder: Path) -> list[dict[str, Any]]:
    """Validation rates of one family at every alpha, with its first chain answer as a sample."""
    models, tokenizer = load_family(folder)
    return [
        {
            "alpha": float(row.name),
            **{f"{task}, {kind}": round(row.score(task, kind).rate, 4) for task in row.outcomes for kind in CRITERIA},
            "sample": row.outcomes["chain"][0].text,
        }
        for row in sweep_alpha(models, tokenizer, ALPHAS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taught", type=Path, required=True, help="a family trained with the shipped recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the family without the form")
    arguments = parser.parse_args()
    seed = read_record(arguments.taught)["seed"]
    train_family(arguments.out, seed=seed, recipe=FamilyRecipe(corpus=CorpusRecipe(template=0.0)))
    result = {
        "command": "python -m lab.family.template --taught FOLDER/seed0 --out FOLDER/untaught",
        "split": "validation",
        "seed": seed,
        "form seen in pre-training": sweep(arguments.taught),
        "form never seen": sweep(arguments.out),
    }
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name in ("form seen in pre-training", "form never seen"):
        print(name)
        for row in result[name]:
            print(" ", row)


if __name__ == "__main__":
    main()
