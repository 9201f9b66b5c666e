"""The throughput bench's results as text, for the command line, the README and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "COUNTED",
    "DRAFTS",
    "METHODS",
    "NAMES",
    "RANKED",
    "bar",
    "cell_name",
    "cheapest",
    "counted",
    "drafts",
    "interval",
    "lines",
    "markdown",
    "summary",
    "verdicts",
    "way",
]

METHODS = ("method", "tokens/s", "first, ms", "ms/token", "× tuned [95 %]", "bytes alone", "accepted")
COUNTED = ("", "passes per token", "MB read", "at least", "MB held")
DRAFTS = ("drafted", "tokens per round", "ms per round", "ms per token")
WAYS = {
    "the tuned model itself": ("tuned alone",),
    "three models, hand-written loop": ("naive loop",),
    "`ProxyTuningLogitsProcessor`": ("processor door",),
    "`model.generate()`": ("composite door",),
    "`FusedDecoding`": ("fused loop",),
    "`FusedDecoding`, gated": ("fused, gated", "fused, gated, 0.2 planted"),
    "`FusedDecoding`, two streams": ("fused, overlap",),
    "`FusedDecoding`, compiled": ("fused, graphs",),
    "`SpeculativeDecoding`, drafts never right": ("speculation, 0 planted",),
    "…, half of the time": ("speculation, 0.5 planted",),
    "…, mostly": ("speculation", "speculation, 0.7 planted"),
    "…, nearly always": ("speculation, 0.9 planted",),
}
"""Ways to decode, in words, and the methods of the bench that measure them."""
RANKED = 4
"""Rounds from which ways are ranked."""
_OFF = 1.1
"""Two that are one, or a way and its bound, may differ so much in a run that ranks."""
_BOUND_BY_BYTES = 50.0
"""Megabytes of a base's pass from which memory bounds its time on a CPU."""
_FULL, _MARK, _EMPTY = "█", "│", " "


def cell_name(cell: Mapping[str, Any]) -> str:
    """The name of a cell of the protocol."""
    sampled = "" if cell["setting"] == "greedy" else ", sampled"
    return f"{cell['prompt']}→{cell['new']}, batch {cell['rows']}{sampled}"


def interval(found: Mapping[str, float]) -> str:
    """A value with its interval."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def lines(cell: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the `METHODS` table for a cell with floors: one per method that ran."""
    out = []
    for name, found in cell["methods"].items():
        if found["status"] != "run":
            continue
        accepted = found.get("acceptance")
        out.append(
            [
                name,
                f"{found['tokens_per_s']:,.0f}" if found["tokens_per_s"] >= 100 else f"{found['tokens_per_s']:.1f}",
                f"{found['ms_first']:.0f}",
                f"{found['ms_per_token']:.1f}" if found["ms_per_token"] >= 10 else f"{found['ms_per_token']:.2f}",
                interval(found["over_tuned"]) if "over_tuned" in found else "",
                f"{found['floor_over_tuned']:.2f}",
                "" if accepted is None else f"{accepted:.2f}",
            ]
        )
    return out


def bar(value: float, mark: float, most: float, width: int) -> str:
    """A text bar of `width` characters: full at `most`, filled up to `value`, with a line at `mark`."""
    length = max(0, min(width, round(width * value / most)))
    place = max(0, min(width - 1, round(width * mark / most) - 1))
    filled = _FULL * length + _EMPTY * (width - length)
    return filled[:place] + _MARK + filled[place + 1 :]


def counted(cell: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the `COUNTED` table for a cell with floors: one per method that was counted."""
    return [
        [
            name,
            " ".join(f"{count:.2f}" for count in found["passes_per_token"].values()),
            f"{found['mb_per_token']:.1f}",
            f"{found['floor_mb_per_token']:.1f}",
            f"{found['peak_mb']:.1f}",
        ]
        for name, found in cell["methods"].items()
        if "mb_per_token" in found
    ]


def drafts(family: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the `DRAFTS` table of a family, one per draft length; none if drafts were not compared."""
    return [
        [
            str(line["draft_length"]),
            *(
                f"{line[what]['predicted']:.2f} · {line[what]['measured']:.2f}"
                for what in ("tokens_per_round", "ms_per_round", "ms_per_token")
            ),
        ]
        for line in family.get("drafting", {}).get("lines", [])
    ]


def verdicts(family: Mapping[str, Any]) -> list[str]:
    """A sentence for each target of a family: how often it was met, and the worst value."""
    by_aim: dict[str, list[Mapping[str, Any]]] = {}
    for one in family["aims"]:
        by_aim.setdefault(one["aim"], []).append(one)
    out = []
    for aim, found in by_aim.items():
        met = sum(one["met"] for one in found)
        worst = max(found, key=lambda one: one["value"]["value"])
        where = f"{worst['method']}, {worst['at']}"
        text = f"{aim}: met in {met} of {len(found)}, worst {interval(worst['value'])} ({where})"
        floors = [one["floor"] for one in found if "floor" in one]
        if floors and max(floors) > worst["bound"]:
            text += f"; out of reach, since bytes alone give {max(floors):.2f}"
        out.append(text)
    return out


def way(method: str) -> str:
    """A method of the bench in the words of `WAYS`; its own name if it is not there."""
    if method == "speculation":
        return "`SpeculativeDecoding`"
    words = next((words for words, names in WAYS.items() if method in names), method)
    return words.replace("…,", "`SpeculativeDecoding`, drafts right")


NAMES = "; ".join(f"{name} = {way(name)}" for name in ("naive loop", "processor door", "composite door", "fused loop"))
"""What the bench's names for the ways without drafts stand for."""


def cheapest(family: Mapping[str, Any]) -> str:
    """A sentence: the cheapest way to steer in the first cell, what is as cheap, and what planted members would give.

    Two ways are as cheap as each other where their intervals overlap, or differ by no more than two models of one shape
    did in that run. Nothing is ranked by fewer than `RANKED` rounds, nor in a run that contradicts itself.
    """
    cell = family["cells"][0]
    at = f"{family['name']}, {cell_name(cell)}"
    if found := _disturbed(family, cell):
        return f"{at}. This run was disturbed, so nothing is ranked: {found}. Run it again with nothing beside it."
    if cell["rounds"] < RANKED:
        return f"{at}. Too few rounds to rank anything: {cell['rounds']}, and {RANKED} are needed."
    ran = {
        name: found["over_tuned"]
        for name, found in cell["methods"].items()
        if found["status"] == "run" and found["kind"] != "alone" and "over_tuned" in found
    }
    own = {name: ratio for name, ratio in ran.items() if "planted" not in name}
    planted = {name: ratio for name, ratio in ran.items() if name not in own}
    if not own:
        return f"{at}. No way to steer was timed beside the tuned model, so nothing is ranked."
    best = min(own, key=lambda name: own[name]["value"])
    least = own[best]["high"] * _between_twins(family, cell)
    alike = [way(name) for name, ratio in own.items() if name != best and ratio["low"] <= least]
    floor = cell["methods"][best]["floor_over_tuned"]
    text = (
        f"{at}. Cheapest to steer: {way(best)}, at {interval(own[best])} × a tuned model's time per token (by bytes "
        f"alone {floor:.2f})."
    )
    if alike:
        text += f" Not told apart from it: {' · '.join(alike)}."
    if planted:
        name = min(planted, key=lambda name: planted[name]["value"])
        text += f" If your members were as planted: {way(name)}, at {interval(planted[name])}."
    return text


def _between_twins(family: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    """How many times as long one of base and tuned model took as the other, if they are of one shape; else 1."""
    sizes = family.get("parameters", {})
    base = cell["methods"].get("base alone", {})
    if sizes.get("base") != sizes.get("tuned") or "over_tuned" not in base:
        return 1.0
    value = float(base["over_tuned"]["value"])
    return max(value, 1 / value)


def _disturbed(family: Mapping[str, Any], cell: Mapping[str, Any]) -> str | None:
    """What cannot be in a cell that was measured, in words; None if nothing."""
    if _between_twins(family, cell) > _OFF:
        ratio = cell["methods"]["base alone"]["over_tuned"]
        return f"the base alone took {interval(ratio)} × the time of the tuned model, which has its shape"
    if family.get("device", "cpu") != "cpu" or family.get("mb_per_pass", {}).get("base", 0.0) < _BOUND_BY_BYTES:
        return None  # Python's time and the launches', not bytes, which a method can save
    for name, found in cell["methods"].items():
        if found["status"] != "run" or found["kind"] == "alone":
            continue
        every = found["kind"] == "steered" and "gated" not in name
        bounds = {"over_floor": "what its bytes take"} | ({"over_members": "the members' own passes"} if every else {})
        for key, words in bounds.items():
            if key in found and found[key]["high"] < 1 and found[key]["value"] * _OFF < 1:
                return f"{way(name)} took {interval(found[key])} × {words}, less than it can"
    return None


def summary(part: Mapping[str, Any]) -> str:
    """What a token costs in the first cell of each family that `measure` measured, and the bytes' bound: one table."""
    families = part["families"]
    cells = [family["cells"][0] for family in families]
    rows = [[way, *(_cost(cell["methods"], names) for cell in cells)] for way, names in WAYS.items()]
    heads = [f"{family['name']}, {cell_name(cell)}" for family, cell in zip(families, cells, strict=True)]
    return _table(["a token's time, tuned model = 1 (by bytes alone)", *heads], [row for row in rows if any(row[1:])])


def _cost(methods: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these methods that ran; it loses if its interval lies above that of the hand-written loop."""
    found = next((methods[name] for name in names if methods.get(name, {}).get("status") == "run"), None)
    if found is None:
        return ""
    text = f"{found['over_tuned']['value']:.2f} ({found['floor_over_tuned']:.2f})"
    if found["kind"] == "steered" and found["passes_per_token"]["expert"] < found["passes_per_token"]["base"]:
        text += f", {100 * found['passes_per_token']['expert']:.0f} % of steps"
    if found.get("acceptance") is not None:
        text += f", {100 * found['acceptance']:.0f} % right"
    naive = methods.get("naive loop", {})
    if naive.get("status") == "run" and found["over_tuned"]["low"] > naive["over_tuned"]["high"]:
        text += ", **loses**"
    return text


def markdown(part: Mapping[str, Any]) -> str:
    """What `measure` returned, as Markdown: the first cell of each family, the targets, the cost model."""
    families = part["families"]
    firsts = [family["cells"][0] for family in families]
    names = list(dict.fromkeys(name for cell in firsts for name in cell["methods"]))
    heads = [f"{family['name']}, {cell_name(cell)}" for family, cell in zip(families, firsts, strict=True)]
    rows = [[name, *(_beside(cell["methods"].get(name, {})) for cell in firsts)] for name in names]
    blocks = [_table(["time per token, tuned = 1 (by bytes alone)", *heads], [row for row in rows if any(row[1:])])]
    blocks.append(f"{NAMES}.")
    blocks += [f"- {cheapest(family)}" for family in families]
    compared = [family for family in families if "drafting" in family]
    if compared:
        lengths = dict.fromkeys(line["draft_length"] for family in compared for line in family["drafting"]["lines"])
        rows = [[str(k), *(_predicted(family, k) for family in compared)] for k in lengths]
        heads = [f"{family['name']}: tokens per round; ms per token" for family in compared]
        blocks.append(_table(["draft length", *heads], rows))
    aims = [one for family in families for one in family["aims"]]
    blocks += [
        f"Of {len(aims)} targets that were set beforehand, {sum(one['met'] for one in aims)} were met. They say where "
        "the loops can still be made faster, not which one to take.",
        "<details><summary>The targets, and the worst value for each</summary>",
        *(f"- **{family['name']}**: {'. '.join(verdicts(family))}." for family in families),
        "</details>",
    ]
    of = part["machine"]
    blocks.append(
        f"{of['processor']}, {of['cores']} cores (load at the start: {of['load']}), threads: {of['threads']}, "
        f"torch {of['torch']}; took {part['seconds']:.0f} s. In the cost model's table: predicted · measured."
    )
    return "\n\n".join(blocks).replace(".\n\n- ", ".\n- ")


def _beside(found: Mapping[str, Any]) -> str:
    if found.get("status") != "run":
        return ""
    accepted = found.get("acceptance")
    said = "" if accepted is None else f", {accepted:.2f} accepted"
    return f"{interval(found['over_tuned'])} ({found['floor_over_tuned']:.2f}){said}"


def _predicted(family: Mapping[str, Any], length: int) -> str:
    for line in family["drafting"]["lines"]:
        if line["draft_length"] == length:
            tokens, took = line["tokens_per_round"], line["ms_per_token"]
            return (
                f"{tokens['predicted']:.2f} · {tokens['measured']:.2f}; "
                f"{took['predicted']:.1f} · {took['measured']:.1f}"
            )
    return ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines_of = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines_of + ["| " + " | ".join(row) + " |" for row in rows])
