"""Time methods in turns and count what each does.

All methods generate the same number of tokens under one generation config. Within a round each has its turn, in an
order that changes, so background load affects all alike. Ratios are taken within a round, with intervals over rounds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from proxytune.models.members.cache_name import CACHE
from proxytune.throughput.counters import FirstToken, LiveBytes, Passes, counting, now
from proxytune.throughput.methods import COMPOSITE, NAIVE, TRIO, TUNED, Method, Ran
from proxytune.throughput.subjects import Cell, Subject

__all__ = ["Taken", "measure_cell", "members_alone", "ratio"]

Taken = tuple[float, float]
"""Seconds to the first token, and of the whole generation."""


def measure_cell(
    subject: Subject,
    cell: Cell,
    methods: Sequence[Method],
    *,
    rounds: int,
    least: int = 2,
    until: float = math.inf,
    report: Callable[[str, float], object] = lambda *_: None,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Count and time all methods in one cell of the protocol; those that cannot run report why.

    After `least` rounds, it stops at `rounds` rounds or at the time `until` (of `time.perf_counter`). `report` is
    called before each measurement with its name and the rounds done, of which the one that counts is the first; `keep`
    after each round but the last with the results so far.

    Returns:
        JSON values: the cell, `members` (times of each one's own passes) and `methods`, with counts and times.
    """
    ids = subject.prompts(cell)
    able = [method for method in methods if method.missing(subject) is None]
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, torch.Tensor] = {}
    for i, method in enumerate(able):
        report(f"{subject.name}, {cell.name}: {method.name}, counted", i / len(able))
        found[method.name], texts[method.name] = _counted(subject, cell, method, ids)
    alone: list[dict[str, Taken]] = []
    taken: dict[str, list[Taken]] = {method.name: [] for method in able}
    done = 0

    def results() -> dict[str, Any]:
        ran = {method.name: found[method.name] | _times(method.name, taken, alone, cell) for method in able}
        for method in able:
            if cell.setting == "greedy" and method.kind != "alone" and COMPOSITE in texts:
                same = texts[method.name] == texts[COMPOSITE]
                ran[method.name]["same_tokens"] = round(float(same[:, cell.prompt :].float().mean()), 4)
        return {
            "prompt": cell.prompt,
            "new": cell.new,
            "rows": cell.rows,
            "setting": cell.setting,
            "rounds": done,
            "members": {
                role: {
                    "ms_first": _median([1000 * one[role][0] for one in alone]),
                    "ms_per_token": _median([_step_ms(one[role], cell) for one in alone]),
                }
                for role in alone[0]
            },
            "methods": {
                method.name: ran.get(method.name, {"status": f"not run: {method.missing(subject)}"})
                for method in methods
            },
        }

    with _no_collection():
        while done < least or (done < rounds and time.perf_counter() < until):
            if done:
                keep(results())
            report(f"{subject.name}, {cell.name}: round {done + 1}", 1 + done)
            # Odd rounds run backwards, and each starts elsewhere: no method always follows the same one.
            order = able[done % len(able) :] + able[: done % len(able)]
            for method in order[:: -1 if done % 2 else 1]:
                taken[method.name].append(_timed(subject, cell, method, ids))
            alone.append(members_alone(subject, ids, texts.get(COMPOSITE, texts[able[0].name]), cell))
            done += 1
    return results()


def members_alone(subject: Subject, ids: torch.Tensor, text: torch.Tensor, cell: Cell) -> dict[str, Taken]:
    """Time only the forward passes that each member needs for a text: a lower bound for the three models.

    `ids` are the prompts, `[B, P]`, and `text` the prompts and what followed, `[B, P + new]`; the last token is not
    forwarded.

    Returns:
        Role → seconds of the prompt, and of all passes.
    """
    out = {}
    mask = torch.ones_like(text)
    for role in TRIO:
        model: Any = subject.models[role]
        with torch.no_grad():
            began = now(subject.device)
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, attention_mask=mask[:, : cell.prompt], **{CACHE: cache}, logits_to_keep=1)
            first = now(subject.device)
            for end in range(cell.prompt + 1, cell.prompt + cell.new):
                model(input_ids=text[:, end - 1 : end], attention_mask=mask[:, :end], **{CACHE: cache})
            out[role] = (first - began, now(subject.device) - began)
    return out


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, two-sided, with 1, 2, … degrees of freedom."""


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median ratio of paired figures `[R]`, with the 95 % interval of Student's t on the ratios' logarithms.

    With two or three pairs it is as wide as so little can tell; resampled pairs would hide that. One pair has none.
    """
    each = np.asarray(above, np.float64) / np.asarray(below, np.float64)
    value, logs, free = float(np.median(each)), np.log(each), len(each) - 1
    low = high = value
    if free:
        t = _T[free - 1] if free <= len(_T) else 1.96 + 2.37 / free + 2.82 / free**2
        half = t * logs.std(ddof=1) / math.sqrt(len(each))
        low, high = (min(value, math.exp(logs.mean() - half)), max(value, math.exp(logs.mean() + half)))
    # To five digits, not places: a low end of two noisy pairs is small, but not 0.
    return {name: float(f"{x:.5g}") for name, x in (("value", value), ("low", low), ("high", high))}


def _timed(subject: Subject, cell: Cell, method: Method, ids: torch.Tensor) -> Taken:
    told = FirstToken(subject.device)
    began, ended, _ = _run(subject, cell, method, ids, told)
    assert told.at is not None
    return told.at - began, ended - began


def _run(subject: Subject, cell: Cell, method: Method, ids: torch.Tensor, told: FirstToken) -> tuple[float, float, Ran]:
    if method.rate is not None:
        subject.accept(method.rate, unsure=method.unsure)
    run, config = method.prepare(subject), cell.config
    torch.manual_seed(0)
    began = now(subject.device)
    ran = run(ids, config, told)
    ended = now(subject.device)
    if method.unsure:
        subject.accept(1.0)  # the others draw from a base that is sure
    return began, ended, ran


def _counted(subject: Subject, cell: Cell, method: Method, ids: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Run once and return counts and text; this is also the warm-up."""
    models = {role: subject.models[role] for role in method.roles if method.hooked}
    with counting(models) as passes, _memory(subject.device) as peak:
        told = FirstToken(subject.device, passes)
        _, _, ran = _run(subject, cell, method, ids, told)
    made = ran.sequences.shape[1] - cell.prompt
    assert made == cell.new, f"{method.name} made {made} of {cell.new} tokens"
    out: dict[str, Any] = {"status": "run", "kind": method.kind, "peak_mb": round(peak() / 1e6, 3)}
    if method.kind == "speculation":
        out |= {
            "acceptance": None if ran.acceptance is None or math.isnan(ran.acceptance) else round(ran.acceptance, 4),
            "planted": method.rate,
            "rounds": ran.rounds,
        }
    return out | _reads(subject, cell, passes, method), ran.sequences


def _reads(subject: Subject, cell: Cell, passes: Passes, method: Method) -> dict[str, Any]:
    """Passes and bytes per token, after the first token."""
    tokens = cell.rows * (cell.new - 1)
    if not tokens or not passes.of:
        return {}
    each = subject.bytes
    read = sum(
        reads.passes * each[role].weights + reads.context * each[role].cached for role, reads in passes.of.items()
    )
    return {
        "passes_per_token": {role: round(reads.passes / tokens, 4) for role, reads in passes.of.items()},
        "mb_per_token": round(read / tokens / 1e6, 4),
    }


def _times(
    name: str, taken: Mapping[str, Sequence[Taken]], alone: Sequence[Mapping[str, Taken]], cell: Cell
) -> dict[str, Any]:
    mine = taken[name]
    whole = [seconds for _, seconds in mine]
    out: dict[str, Any] = {
        "tokens_per_s": round(cell.rows * cell.new / _median(whole), 3),
        "ms_first": _median([1000 * first for first, _ in mine]),
        "ms_per_token": _median([_step_ms(one, cell) for one in mine]),
        "over_members": ratio(whole, [sum(seconds for _, seconds in one.values()) for one in alone]),
    }
    if TUNED in taken:
        out["over_tuned"] = ratio([_step_ms(x, cell) for x in mine], [_step_ms(x, cell) for x in taken[TUNED]])
    if NAIVE in taken:
        out["over_naive"] = ratio(whole, [seconds for _, seconds in taken[NAIVE]])
    return out


def _step_ms(taken: Taken, cell: Cell) -> float:
    """Milliseconds per token after the first, per row; of the whole generation if there is only one token."""
    first, whole = taken
    return 1000 * ((whole - first) / (cell.new - 1) if cell.new > 1 else whole)


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 4)


@contextlib.contextmanager
def _memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak bytes in addition to those held at the start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with LiveBytes() as live:
        yield lambda: live.peak


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
