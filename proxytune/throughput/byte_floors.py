"""What the measurements are compared with: the fewest bytes that a method has to read, and targets set beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from proxytune.costs.model_size import pass_bytes
from proxytune.costs.roofline import PassBytes, bytes_per_token
from proxytune.costs.speculation import DraftCosts, best_draft_length, time_per_token
from proxytune.throughput.methods import COMPOSITE, FUSED, GATED, SHARE, TRIO, TUNED
from proxytune.throughput.shapes import Trio

__all__ = ["LONGEST_DRAFT", "aims", "floor_bytes", "published_floors", "with_floors"]

LONGEST_DRAFT = 16
_MEMORY_BOUND = 50.0
"""Megabytes of a base's pass from which it is memory-bound; fewer fit into a cache."""
_SMALL = 0.10
"""Companions with at most this share of the base's bytes count as small."""
_OF_TUNED = {
    ("32B + 1.5B + 1.5B", 0.7): 0.55,
    ("8B + 1B + 1B", 0.7): 0.70,
    ("13B + 7B + 7B", 0.7): 1.30,
    ("13B + 7B + 7B", 0.9): 1.00,
}
"""Family and planted acceptance → target time per token, as a share of the tuned model's."""
_GATED = {
    ("13 : 7 : 7", "bfloat16"): 1.25,
    ("13 : 7 : 7", "float32"): 1.38,
    ("32 : 1.5 : 1.5", "bfloat16"): 1.06,
}
"""Family and dtype → target time per token under a gate, relative to the base, as large as the tuned model."""


def floor_bytes(
    bytes_of: Mapping[str, PassBytes],
    kind: str,
    roles: tuple[str, ...],
    *,
    context: float,
    rows: int = 1,
    acceptance: float | None = None,
    shared: PassBytes | None = None,
    passes: Mapping[str, float] | None = None,
) -> float:
    """Fewest bytes per token that a method has to read, given its kind and the roles it runs.

    `passes` is how often each role runs in a step, where that is not once: companions under a gate. `shared` is what
    expert and antiexpert read in one pass, if they are one model. Speculation: with the expert as
    draft, at the best draft length; an acceptance of None counts as 0. `context` is the mean number of tokens in the
    cache.
    """
    if kind != "speculation":
        pair = {"expert", "antiexpert"} <= set(roles) and shared is not None
        often = passes or {}
        apart = [role for role in roles if not (pair and role in ("expert", "antiexpert"))]
        run = [(often.get(role, 1.0), bytes_of[role]) for role in apart]
        if pair and shared is not None:
            run.append((often.get("expert", 1.0), shared))
        return bytes_per_token(run, rows, context=context, rows=rows)
    verifying = [bytes_of[role] for role in roles if role != "expert"]
    costs = DraftCosts.of_bytes(verifying, bytes_of["expert"], context=context, rows=rows)
    rate = acceptance or 0.0
    return time_per_token(rate, best_draft_length(rate, costs, LONGEST_DRAFT), costs) / rows


def published_floors(trio: Trio, rates: Sequence[float], *, context: float = 264.0) -> dict[str, Any]:
    """Floors of published shapes, relative to a tuned model of the base's size; no model is run.

    Returns:
        JSON values: the ratio of a `step` of all three models, and for each acceptance the ratio and the draft length.
    """
    base, small = (pass_bytes(shape.build(dtype=torch.bfloat16, device="meta")) for shape in (trio.base, trio.small))
    costs = DraftCosts.of_bytes([base, small], small, context=context)
    tuned = base.at(context=context)
    best = {rate: best_draft_length(rate, costs, LONGEST_DRAFT) for rate in rates}
    return {
        "name": trio.name,
        "step": round(costs.of_round(0) / tuned, 4),
        "speculation": [
            {"acceptance": rate, "drafted": k, "ratio": round(time_per_token(rate, k, costs) / tuned, 4)}
            for rate, k in best.items()
        ],
    }


def with_floors(cell: dict[str, Any], bytes_of: Mapping[str, PassBytes]) -> dict[str, Any]:
    """Add the floor of each method that ran to what `measure_cell` returned.

    The new keys are `floor_mb_per_token`, `floor_over_tuned` and `over_floor`: its time per token relative to the tuned
    model's, divided by the same ratio of the bytes alone.
    """
    context = cell["prompt"] + cell["new"] / 2
    tuned = floor_bytes(bytes_of, "alone", ("tuned",), context=context, rows=cell["rows"])
    methods = {}
    for name, found in cell["methods"].items():
        methods[name] = found
        if found["status"] != "run":
            continue
        floor = floor_bytes(
            bytes_of,
            found["kind"],
            TRIO if found["kind"] != "alone" else tuple(found["passes_per_token"]),
            context=context,
            rows=cell["rows"],
            acceptance=found.get("acceptance"),
            passes={role: n * cell["rows"] for role, n in found["passes_per_token"].items()}
            if name.startswith(GATED)
            else None,
        )
        methods[name] = found | {
            "floor_mb_per_token": round(floor / 1e6, 4),
            "floor_over_tuned": round(floor / tuned, 4),
        }
        if "over_tuned" in found:
            methods[name]["over_floor"] = {
                key: round(value * tuned / floor, 4) for key, value in found["over_tuned"].items()
            }
    return cell | {"methods": methods}


def aims(family: dict[str, Any], *, gpu: bool = False) -> list[dict[str, Any]]:
    """The targets, and the result of each in each cell of a measured family; one more target applies on a GPU.

    Returns:
        Entries with `aim`, `at`, `method`, `value` with its interval, `bound`, `met`, and `floor` where bytes alone
        limit the value.
    """
    return [one for cell in family["cells"] for one in _of_cell(family, cell, gpu)]


def _of_cell(family: dict[str, Any], cell: dict[str, Any], gpu: bool) -> Iterator[dict[str, Any]]:
    ran = {name: found for name, found in cell["methods"].items() if found["status"] == "run"}
    at = f"{cell['prompt']}→{cell['new']}, batch {cell['rows']}"
    if cell["setting"] != "greedy":
        return

    def judged(
        aim: str, name: str, value: dict[str, float], bound: float, floor: float | None = None
    ) -> dict[str, Any]:
        out = {"aim": aim, "at": at, "method": name, "value": value, "bound": bound, "met": value["value"] <= bound}
        return out if floor is None else out | {"floor": floor}

    for name in (COMPOSITE, FUSED):
        if name in ran:
            yield judged("At most 1.05 × the members' own passes", name, ran[name]["over_members"], 1.05)
    if cell["rows"] != 1:
        return
    if gpu and FUSED in ran and "over_naive" in ran[FUSED]:
        yield judged("At most 0.6 × the naive loop", FUSED, ran[FUSED]["over_naive"], 0.6)
    weights = family["mb_per_pass"]
    if cell["new"] <= 8 or TUNED not in ran or weights["base"] < _MEMORY_BOUND:  # too few tokens for a time per token
        return
    if FUSED in ran and max(weights["expert"], weights["antiexpert"]) <= _SMALL * weights["base"]:
        floor = ran[FUSED]["floor_over_tuned"]
        yield judged("Small companions: at most 1.10 × the tuned model", FUSED, ran[FUSED]["over_tuned"], 1.1, floor)
    for name, found in ran.items():
        if name.startswith(GATED) and (bound := _GATED.get((family["name"], family.get("dtype", "")))) is not None:
            aim = f"Gated at a share of {SHARE:g}: at most {bound:.2f} × the base"
            yield judged(aim, name, found["over_tuned"], bound, found["floor_over_tuned"])
        if found["kind"] == "speculation":
            yield judged("Speculation: at most 1.10 × its byte floor", name, found["over_floor"], 1.1)
            bound = _OF_TUNED.get((family["name"], found["planted"]))
            if bound is not None:
                aim = f"Speculation: at most {bound:.2f} × the tuned model"
                yield judged(aim, name, found["over_tuned"], bound, found["floor_over_tuned"])
