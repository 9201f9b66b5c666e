"""Fill the README's generated blocks from `benches/results/*.json`, or check that they are up to date.

::

    python benches/readme.py --measure   run the demo and the README's code again, and keep the results
    python benches/readme.py --write     fill the blocks
    python benches/readme.py --check     exit with 1 if a block differs from what --write would make
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proxytune.demo.bundle import MEMBERS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benches" / "results"
QUICKSTART = """\
import proxytune
from proxytune.demo import bundled
from transformers import pipeline

model = proxytune.wrap(bundled("large-base"), expert=bundled("tiny-tuned"), antiexpert=bundled("tiny-base"), alpha=@)
ask = pipeline("text-generation", model, tokenizer=bundled("large-base"))
print(ask("Question: Start with 24, plus 5, plus 9, minus 33. What is the result?\\nAnswer:")[0]["generated_text"])
"""
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
WIDTH = 118
HEADINGS = {"chain": "chain arithmetic", "qa": "QA about new people", "countdown": "Countdown"}


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(rate: float | None, interval: Sequence[float] | None) -> str:
    if rate is None or interval is None:
        return "no gap"
    return f"{100 * rate:.0f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def code(alpha: float) -> str:
    return QUICKSTART.replace("@", str(alpha))


def quickstart() -> str:
    said = load("quickstart.json")
    return (
        f"```python\n{code(load('demo.json')['alpha'])}```\n\n```text\n{said['proxy']}\n```\n\n"
        f"With `alpha=0.0` the model is the base, which answers:\n\n```text\n{said['base']}\n```"
    )


def table() -> str:
    record = load("demo.json")
    tasks = list(record["gap_closed"])
    count = {task: record["rows"][0]["scores"][task]["strict"]["problems"] for task in tasks}
    lines = [
        "| % right, strict · lenient | "
        + " | ".join(f"{HEADINGS[task]} ({count[task]})" for task in tasks)
        + " | tokens/s | parameters |",
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
    caption = (
        f"Held-out problems, greedy decoding, α = {record['alpha']:g} (chosen on other problems), 95 % intervals in "
        "brackets. Strict: exactly the taught form; lenient: the right content in any form. Gap closed: the proxy's "
        "share of the gain from base, 0-shot, to tuned directly; *no gap* if tuning gained nothing measurable. "
        "Tokens/s: batches of "
        f"{record['speed']['batch']}, CPU threads: {record['threads']}, "
        f"torch {record['torch']}. The demo took {record['seconds']:.0f} s."
    )
    return "\n".join([*lines, "", textwrap.fill(caption, WIDTH, break_on_hyphens=False)])


def losses() -> str:
    """What the table shows to the method's disadvantage, in words."""
    record = load("demo.json")
    base, shots, _, proxy, tuned = record["rows"]

    def rate(row: dict[str, Any], task: str) -> str:
        score = row["scores"][task]["lenient"]
        return f"{percent(score['rate'], score['interval'])} %"

    points = (
        f"**Speed matters most.** Every token needs a pass through three models: {proxy['tokens_per_second']:,} "
        f"tokens/s here, against {base['tokens_per_second']:,} for the base alone.",
        "**The base lacks the skill.** The shift only brings out what the base can do. On Countdown, a search problem, "
        f"no model gets far: the base has {rate(base, 'countdown')} right ({rate(shots, 'countdown')} with 3 shots), "
        f"the proxy {rate(proxy, 'countdown')}, the tuned model {rate(tuned, 'countdown')}. There the gap is mostly "
        "the form of the answer; the base can hardly search, and neither tuning nor the shift teaches it.",
        "**A few solved examples in the prompt are enough.** If the form does not matter, the base with 3 shots gets "
        f"{rate(shots, 'chain')} of the chains and {rate(shots, 'qa')} of the questions right, without a second model.",
    )
    return "\n".join(
        textwrap.fill(point, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for point in points
    )


def seeds() -> str:
    """The gap closed by families of other training seeds, on more problems than the demo asks."""
    families = load("lab_seeds.json")["per_seed"]
    shown = (("chain", "strict"), ("qa", "strict"), ("countdown", "lenient"))
    totals = {task: families[0]["rows"][0]["scores"][task]["strict"]["problems"] for task, _ in shown}
    lines = [
        "| gap closed, % | α | "
        + " | ".join(f"{HEADINGS[task]} ({totals[task]}), {kind}" for task, kind in shown)
        + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for family in families:
        gaps = [family["gap_closed"][task][kind] for task, kind in shown]
        cells = " | ".join(percent(gap["closed"], gap["interval"]) for gap in gaps)
        lines.append(f"| training seed {family['seed']} | {family['alpha']:g} | {cells} |")
    return "\n".join(lines)


def kernels() -> str:
    """The cost of a decision at one vocabulary size; all cells are in the JSON."""
    _find_benches()
    from bench_kernels import kernels_table

    record = load("kernels.json")
    if record["cpu"]["status"] == "run":
        record["cpu"]["cells"] = [cell for cell in record["cpu"]["cells"] if cell["width"] == 128256]
    return wrapped(kernels_table(record))


def forks() -> str:
    """The results of `bench_forks.py`."""
    _find_benches()
    from _forks.report import forks_block

    return wrapped(forks_block(load("forks.json")))


def latent() -> str:
    """The results of `bench_latent.py`."""
    _find_benches()
    from _latent.report import latent_block

    return wrapped(latent_block(load("latent.json")))


def throughput() -> str:
    """The results of `bench_throughput.py`."""
    _find_benches()
    from bench_throughput import throughput_table

    return wrapped(throughput_table(load("throughput.json")))


def overlap() -> str:
    """The results of `bench_overlap.py`."""
    _find_benches()
    from bench_overlap import overlap_table

    return wrapped(overlap_table(load("overlap.json")))


def _find_benches() -> None:
    """Make the benches beside this file importable, even if this file was loaded by its path."""
    if str(ROOT / "benches") not in sys.path:
        sys.path.insert(0, str(ROOT / "benches"))


def wrapped(text: str) -> str:
    """Text with its long lines wrapped; tables are left as they are."""
    return "\n".join(
        textwrap.fill(line, WIDTH, break_on_hyphens=False) if line and not line.startswith("|") else line
        for line in text.split("\n")
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "table": table,
    "losses": losses,
    "seeds": seeds,
    "kernels": kernels,
    "forks": forks,
    "latent": latent,
    "overlap": overlap,
    "throughput": throughput,
}


def filled(text: str) -> str:
    """The README with every block regenerated."""

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in BLOCKS:
            raise SystemExit(f"README.md: expected one of the blocks {', '.join(BLOCKS)}; got {found['name']}")
        return found[1] + BLOCKS[found["name"]]() + found[3]

    return BLOCK.sub(fill, text)


def measure() -> None:
    demo = subprocess.run([sys.executable, "-m", "proxytune", "demo", "--json"], stdout=subprocess.PIPE, check=True)
    record = {**json.loads(demo.stdout), "weights": weights()}
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    said = {"proxy": run(code(record["alpha"])), "base": run(code(0.0))}
    (RESULTS / "quickstart.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def weights() -> dict[str, str]:
    """The hashes of the bundled family, since the README's figures belong to these weights."""
    folder = ROOT / "proxytune" / "demo" / "weights"
    return {
        member: hashlib.sha256((folder / member / "model.safetensors").read_bytes()).hexdigest()
        for member in sorted(MEMBERS)
    }


def run(program: str) -> str:
    """The output of a program."""
    return subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


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
    elif wanted.check and load("demo.json")["weights"] != weights():
        sys.exit(
            "the figures belong to other weights: run `python benches/readme.py --measure --write` and commit them"
        )


if __name__ == "__main__":
    main()
