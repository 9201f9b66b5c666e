"""The demo's record as blocks of the pages: the first code, the tables, and what they show against the method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from _pages.records import WIDTH, load
from proxytune.demo import bundled_record

__all__ = ["code", "losses", "quickstart", "seeds", "small_table", "sweep", "table"]

QUICKSTART = """\
import proxytune
from proxytune.demo import bundled
from transformers import pipeline

model = proxytune.wrap(bundled("large-base"), alpha=@, expert=bundled("tiny-tuned"), antiexpert=bundled("tiny-base"))
ask = pipeline("text-generation", model, tokenizer=bundled("large-base"))
print(ask("Question: Start with 24, plus 5, plus 9, minus 33. What is the result?\\nAnswer:")[0]["generated_text"])
"""
HEADINGS = {"chain": "chain arithmetic", "qa": "QA about new people", "countdown": "Countdown"}


def percent(rate: float | None, interval: Sequence[float] | None) -> str:
    if rate is None or interval is None:
        return "no gap"
    return f"{100 * rate:.0f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def code(alpha: float) -> str:
    return QUICKSTART.replace("@", str(alpha))


def quickstart() -> str:
    """The first code of the README: six lines with the proxy's answer, and what the base answers."""
    said = load("quickstart.json")
    base = said["base"].rpartition("Answer:")[2].strip()
    return (
        f"```python\n{code(load('demo.json')['alpha'])}```\n\n```text\n{said['proxy']}\n```\n\n"
        f"With `alpha=0.0` the model is the base, which answers “{base}”"
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


def small_table() -> str:
    """Quality, strictly graded, and cost: what a first page has room for."""
    record = load("demo.json")
    tasks = list(record["gap_closed"])
    speed = record["rows"][0]["tokens_per_second"]
    lines = [
        "| % right, in the taught form | " + " | ".join(HEADINGS[task] for task in tasks) + " | time per token |",
        "|---|" + "--:|" * (len(tasks) + 1),
    ]
    for row in record["rows"]:
        cells = " | ".join(percent(s["rate"], s["interval"]) for s in (row["scores"][t]["strict"] for t in tasks))
        lines.append(f"| {row['name']} | {cells} | {speed / row['tokens_per_second']:.1f} × |")
    gaps = (record["gap_closed"][task]["strict"] for task in tasks)
    cells = " | ".join(percent(gap["closed"], gap["interval"]) for gap in gaps)
    lines.append(f"| gap closed by the proxy, % | {cells} | |")
    count = record["rows"][0]["scores"][tasks[0]]["strict"]["problems"]
    families = [family for family in load("throughput.json")["cpu"]["families"] if not family["trained"]]
    costs = " and ".join(
        f"{family['cells'][0]['methods']['composite door']['over_tuned']['value']:.1f} × ({family['name']})"
        for family in families
    )
    captions = (
        "Four tiny Llamas, trained [on an invented world](proxytune/demo/NOTES.md) where most questions get “I do not "
        "know.” for a reply; tuning taught the small one and the large one to answer. "
        f"{count} held-out problems a task, greedy, α chosen on others, 95 % intervals.",
        f"Time: base = 1, batches of {record['speed']['batch']}, {record['threads']} CPU thread; models "
        "this small spend most of it in Python. With sizes in the ratios of real ones (base : expert : antiexpert), "
        "one text at a time, a steered token took "
        f"{costs} the tuned model's time: [all cells](benches/README.md#what-it-costs).",
    )
    return "\n".join(
        [*lines, *(line for text in captions for line in ("", textwrap.fill(text, WIDTH, break_on_hyphens=False)))]
    )


def losses() -> str:
    """What the table shows to the method's disadvantage, in words."""
    record = load("demo.json")
    _, shots, _, proxy, tuned = record["rows"]

    def rate(row: dict[str, Any], task: str) -> str:
        score = row["scores"][task]["lenient"]
        return f"{percent(score['rate'], score['interval'])} %"

    points = (
        "**Speed matters most.** Every token needs a pass through three models, unless a gate spares the small ones.",
        "**The base lacks the skill.** The shift only brings out what the base can do. On Countdown, a search problem, "
        f"no model gets far: right in any form are {rate(shots, 'countdown')} of the base's answers with 3 shots, "
        f"{rate(proxy, 'countdown')} of the proxy's, {rate(tuned, 'countdown')} of the tuned model's. The gap is "
        "mostly the form; neither tuning nor the shift teaches the base to search.",
        "**A few solved examples in the prompt are enough.** The base with 3 shots gets, in any form, "
        f"{rate(shots, 'chain')} of the chains and {rate(shots, 'qa')} of the questions right, without a second model.",
        "**You can tune the large model and serve the result.** Compare *proxy* and *tuned directly* above.",
        "**There is no small model with the same vocabulary**, or you need continuous batching: refused with an error, "
        "because the result would be wrong.",
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


def sweep() -> str:
    """The sweep by which the bundled family's α was chosen."""
    record = bundled_record()
    lines = ["| α | " + " | ".join(HEADINGS.values()) + " |", "|---|" + "--:|" * len(HEADINGS)]
    for row in record["validation"]:
        alpha = f"**{row['alpha']:g}**" if row["alpha"] == record["alpha"] else f"{row['alpha']:g}"
        rates = (f"{100 * row['rates'][task]['strict']:.0f}" for task in HEADINGS)
        lines.append(f"| {alpha} | " + " | ".join(rates) + " |")
    return "\n".join(lines)
