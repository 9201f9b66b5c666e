"""Fill the README's generated blocks from `benches/results/*.json`, or check that they are up to date.

::

    python benches/readme.py --measure   run the demo and the README's code again, and keep what they say
    python benches/readme.py --write     fill the blocks
    python benches/readme.py --check     exit with 1 if a block is not what --write would make of it
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benches" / "results"
PROMPT = "Question: Start with 12, add 30, take away 5. What is the result?\\nAnswer:"
QUICKSTART = f"""\
import proxytune
from proxytune.lab.bundle import bundled
from transformers import pipeline

model = proxytune.wrap(bundled("large-base"), expert=bundled("tiny-tuned"), antiexpert=bundled("tiny-base"), alpha=0.5)
for lm in (model.base, model):
    print(pipeline("text-generation", lm, tokenizer=bundled("large-base"))("{PROMPT}")[0]["generated_text"])
"""
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
HEADINGS = {"chain": "chain arithmetic", "qa": "QA about new people", "countdown": "Countdown"}


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(rate: float | None, interval: Sequence[float] | None) -> str:
    if rate is None or interval is None:
        return "–"
    return f"{100 * rate:.0f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def quickstart() -> str:
    return f"```python\n{QUICKSTART}```\n\n```text\n{load('quickstart.json')['output'].strip()}\n```"


def table() -> str:
    record = load("demo.json")
    tasks = list(record["gap_closed"])
    count = {task: record["rows"][0]["scores"][task]["strict"]["problems"] for task in tasks}
    lines = [
        "| % right, strict · lenient | "
        + " | ".join(f"{HEADINGS[task]} ({count[task]})" for task in tasks)
        + " | tokens/s | weights |",
        "|---|" + "---|" * len(tasks) + "--:|--:|",
    ]
    for row in record["rows"]:
        scores = (row["scores"][task] for task in tasks)
        cells = " | ".join(
            " · ".join(percent(score[kind]["rate"], score[kind]["interval"]) for kind in ("strict", "lenient"))
            for score in scores
        )
        lines.append(f"| {row['name']} | {cells} | {row['tokens_per_second']:,} | {row['parameters'] / 1000:,.0f} k |")
    gaps = (record["gap_closed"][task] for task in tasks)
    cells = " | ".join(
        " · ".join(percent(gap[kind]["closed"], gap[kind]["interval"]) for kind in ("strict", "lenient"))
        for gap in gaps
    )
    lines.append(f"| gap closed, % | {cells} | | |")
    lines += [
        "",
        f"Held-out problems, greedy decoding, α = {record['alpha']:g} (chosen on other problems), 95 % intervals in "
        f"brackets. Strict: exactly the taught form; lenient: the right content in any form. Gap: from base, 0-shot, "
        f"to tuned directly. Tokens/s: batches of {record['speed']['batch']} on {record['threads']} CPU threads, "
        f"torch {record['torch']}; the demo took {record['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def losses() -> str:
    """What the table shows to the method's disadvantage, in words."""
    record = load("demo.json")
    base, proxy, tuned = (record["rows"][index] for index in (0, 3, 4))

    def rate(row: dict[str, Any], task: str) -> str:
        return percent(row["scores"][task]["strict"]["rate"], row["scores"][task]["strict"]["interval"])

    return (
        f"- **It costs a pass through three models per token**: {proxy['tokens_per_second']:,} tokens/s here, against "
        f"{base['tokens_per_second']:,} of the base alone.\n"
        f"- **It brings out what the base knows; it does not add skill.** On Countdown, a search problem, the base "
        f"solves {rate(base, 'countdown')} %, the proxy {rate(proxy, 'countdown')} %, the directly tuned model "
        f"{rate(tuned, 'countdown')} % (strict)."
    )


BLOCKS: dict[str, Callable[[], str]] = {"quickstart": quickstart, "table": table, "losses": losses}


def filled(text: str) -> str:
    """The README with every block made anew."""

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in BLOCKS:
            raise SystemExit(f"README.md: expected one of the blocks {', '.join(BLOCKS)}; got {found['name']}")
        return found[1] + BLOCKS[found["name"]]() + found[3]

    return BLOCK.sub(fill, text)


def measure() -> None:
    demo = subprocess.run([sys.executable, "-m", "proxytune", "demo", "--json"], stdout=subprocess.PIPE, check=True)
    (RESULTS / "demo.json").write_text(json.dumps(json.loads(demo.stdout), indent=1, ensure_ascii=False) + "\n")
    output = run_quickstart()
    (RESULTS / "quickstart.json").write_text(json.dumps({"output": output}, indent=1, ensure_ascii=False) + "\n")


def run_quickstart() -> str:
    """What the README's code prints."""
    ran = subprocess.run([sys.executable, "-c", QUICKSTART], stdout=subprocess.PIPE, check=True, text=True)
    return ran.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("measure", "write", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    wanted = parser.parse_args()
    if wanted.measure:
        measure()
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if wanted.write:
        README.write_text(new, encoding="utf-8")
    elif wanted.check and new != text:
        sys.exit("README.md is stale: run `python benches/readme.py --write` and commit it")


if __name__ == "__main__":
    main()
