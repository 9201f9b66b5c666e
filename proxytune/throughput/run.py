"""Which families, cells and methods `proxytune bench` and `benches/bench_throughput.py` measure.

On a CPU: the lab's family, and random members of scaled-down shapes; on a GPU: random members of the published shapes.
`quick` takes minutes; `full` has the protocol's own lengths on the lab's family (cut to its context), and longer texts
elsewhere. Each family has a share of the time, so a busy machine gets fewer rounds instead of a longer wait.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import proxytune
from proxytune.throughput.byte_floors import aims, with_floors
from proxytune.throughput.draft_costs import LENGTHS, compare_drafts
from proxytune.throughput.measure import measure_cell
from proxytune.throughput.methods import RATES, methods_for
from proxytune.throughput.report import RANKED
from proxytune.throughput.shapes import PUBLISHED, SCALED
from proxytune.throughput.subjects import PROTOCOL, Cell, Subject, lab_subject, random_subject

__all__ = ["Plan", "Size", "cpu_plans", "gpu_plans", "machine", "measure", "measure_family"]

Size = Literal["quick", "full"]

_SHORT = (
    Cell(8, 40), Cell(128, 8), Cell(8, 8), Cell(8, 8, 8), Cell(8, 4, 32), Cell(8, 10, 1, "sampled"),
)  # fmt: skip
_LONG = (
    Cell(8, 128), Cell(512, 8), Cell(8, 8), Cell(8, 32, 8), Cell(8, 16, 32), Cell(8, 32, 1, "sampled"),
)  # fmt: skip
_LAB = (
    Cell(8, 64), Cell(500, 8), Cell(8, 8), Cell(8, 16, 8), Cell(8, 16, 32), Cell(8, 16, 1, "sampled"),
)  # fmt: skip
_GPU = (
    Cell(8, 96), Cell(512, 8), Cell(8, 8), Cell(8, 32, 8), Cell(8, 32, 32), Cell(8, 32, 1, "sampled"),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured on a family.

    Attributes:
        build: Makes the family.
        cells: The cells of the protocol.
        rounds: Most rounds per cell.
        seconds: Time for all cells; each cell gets at least two rounds, the first at least `RANKED` of four or more.
        rates: The acceptances planted in random members, in the first cell.
        drafting: The cell in which the cost model is compared; None to leave it out.
        rate: The acceptance planted there, and in all other cells.
        lengths: The draft lengths compared there.
        graphs: Whether the members are compiled, in the first cell.
        only: The methods that are measured, by name; None for all.
    """

    build: Callable[[], Subject]
    cells: tuple[Cell, ...]
    rounds: int = 5
    seconds: float = 90.0
    rates: tuple[float, ...] = RATES
    drafting: Cell | None = None
    rate: float = 0.7
    lengths: tuple[int, ...] = LENGTHS
    graphs: bool = False
    only: tuple[str, ...] | None = None

    @property
    def draft_rounds(self) -> int:
        """Rounds of each draft length, apart from the first, which warms up."""
        return min(3, self.rounds)

    @property
    def least(self) -> int:
        """Rounds of each cell, however long they take."""
        return min(2, self.rounds)

    def share(self, cells: int) -> float:
        """The share of the time that is up after so many cells; the first, whose methods are ranked, has three."""
        return (cells + 2) / (len(self.cells) + 2)

    def rounds_from(self, cell: int, timed: int) -> int:
        """Rounds from a cell on, with `timed` ones each: one more that counts, and then those of the cost model."""
        return (len(self.cells) - cell) * (1 + timed) + (0 if self.drafting is None else 1 + self.draft_rounds)


def cpu_plans(size: Size = "quick", folder: Path | None = None, alpha: float | None = None) -> list[Plan]:
    """The CPU set: the lab's family (see `lab_subject`), and two trios of random members."""
    quick = size == "quick"
    seconds = (45.0, 110.0, 95.0) if quick else (600.0, 900.0, 900.0)
    lab_cells = _LAB if quick else tuple(_fitted(cell, 512) for cell in PROTOCOL)
    rounds, cells = (4, _SHORT) if quick else (7, _LONG)
    drafting = cells[0]
    return [
        Plan(lambda: lab_subject(folder, alpha), lab_cells, rounds, seconds[0], drafting=drafting),
        *(
            Plan(lambda trio=trio: random_subject(trio), cells, rounds, some, drafting=drafting)  # type: ignore[misc]
            for trio, some in zip(SCALED, seconds[1:], strict=True)
        ),
    ]


def gpu_plans(size: Size = "quick", device: str = "cuda") -> list[Plan]:
    """The GPU set: members of the published shapes, with random weights in bfloat16.

    `size` "quick" takes under ten minutes, "full" has the protocol's own lengths.
    """
    quick = size == "quick"
    return [
        Plan(
            lambda trio=trio: random_subject(trio, device=device),  # type: ignore[misc]
            _GPU if quick else PROTOCOL,
            3 if quick else 7,
            seconds if quick else 3600.0,
            drafting=_GPU[0],
            graphs=not quick,
        )
        for trio, seconds in zip(PUBLISHED, (140.0, 190.0, 110.0), strict=True)
    ]


def measure(
    plans: Sequence[Plan],
    *,
    gpu: bool = False,
    deadline: float = math.inf,
    report: Callable[[str, float, int], object] = lambda *_: None,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Measure families, one after the other; after `deadline` seconds no further family is started.

    `report` is called before each measurement with its name, the rounds done, and how many there will be if the rest is
    as fast; `keep` after each round with the results so far.

    Returns:
        JSON values: `status`, the `machine`, `families`, how many were `left_out` by the deadline, and `seconds`.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {"status": "run", "machine": machine(gpu=gpu), "families": [], "left_out": len(plans)}
    done = 0.0  # rounds of the families before
    for i, plan in enumerate(plans):
        if time.perf_counter() - began > deadline:
            break
        told = _Told(report, began, plan, plans[i + 1 :], done)
        told("building models", 0, 0.0)
        before = list(record["families"])
        keep_family = functools.partial(_kept_family, record, before, began, keep)
        record["families"] = [*before, measure_family(plan, gpu=gpu, report=told, keep=keep_family)]
        done = told.done
        gc.collect()  # models hold reference cycles; the next ones may need the memory
        if gpu:
            torch.cuda.empty_cache()
        record |= {"left_out": record["left_out"] - 1, "seconds": round(time.perf_counter() - began, 1)}
        keep(record)
    return record


def _kept_family(
    record: dict[str, Any],
    before: list[dict[str, Any]],
    began: float,
    keep: Callable[[dict[str, Any]], object],
    family: dict[str, Any],
) -> None:
    """Keep what is known of a family that is being measured, beside those before."""
    seconds = round(time.perf_counter() - began, 1)
    keep(record | {"status": "partly run", "families": [*before, family], "seconds": seconds})


class _Told:
    """What a family reports, as rounds of the whole run: those done, and how many there will be."""

    def __init__(
        self,
        report: Callable[[str, float, int], object],
        began: float,
        plan: Plan,
        later: Sequence[Plan],
        before: float,
    ) -> None:
        self._report, self._began, self._plan, self._later = report, began, plan, later
        self._family_began = time.perf_counter()
        self._before = before  # rounds done before this cell
        self._cell, self._rounds = 0, 0.0

    @property
    def done(self) -> float:
        """Rounds done when the cell is: its last one was reported when it began."""
        return self._before + math.floor(self._rounds) + 1

    def __call__(self, what: str, cell: int, rounds: float) -> None:
        if cell != self._cell:
            self._before, self._cell = self.done, cell
        self._rounds = rounds
        done, plan, now = self._before + rounds, self._plan, time.perf_counter()
        least = plan.rounds_from(cell, plan.least) - rounds + sum(of.rounds_from(0, of.least) for of in self._later)
        most = plan.rounds_from(cell, plan.rounds) - rounds + sum(of.rounds_from(0, of.rounds) for of in self._later)
        # A busy machine gets fewer rounds in the same time.
        seconds = max(0.0, plan.seconds - (now - self._family_began)) + sum(of.seconds for of in self._later)
        affordable = most if done == 0 else seconds * done / (now - self._began)
        self._report(what, done, round(done + min(most, max(least, affordable))))


def measure_family(
    plan: Plan,
    *,
    gpu: bool = False,
    report: Callable[[str, int, float], object] = lambda *_: None,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Measure one family.

    `report` is called before each measurement with its name, the number of the cell (for the cost model, how many cells
    there are), and the rounds done in it; `keep` after each round with the results so far.

    Returns:
        JSON values: `name`, `parameters`, `mb_per_pass`, `cells` with floors, `aims`, and `drafting`, the cost model
            compared with measurement.
    """
    began = time.perf_counter()
    subject = plan.build()
    bytes_of = subject.bytes
    cells: list[dict[str, Any]] = []

    def so_far(*more: dict[str, Any]) -> dict[str, Any]:
        family: dict[str, Any] = {
            "name": subject.name,
            "trained": subject.trained,
            "device": subject.device.type,
            "dtype": str(next(subject.steered.base.parameters()).dtype).removeprefix("torch."),
            "parameters": {role: model.num_parameters() for role, model in subject.models.items()},
            "mb_per_pass": {role: round(of.weights / 1e6, 3) for role, of in bytes_of.items()},
            "cells": [*cells, *(with_floors(one, bytes_of) for one in more)],
        }
        return family | {"aims": aims(family, gpu=gpu)}

    for i, cell in enumerate(plan.cells):
        # One acceptance in the other cells: more would only repeat the first cell's result.
        rates = plan.rates if i == 0 else (plan.rate,)
        methods = methods_for(subject, rates, graphs=plan.graphs and i == 0)
        measured = measure_cell(
            subject,
            cell,
            [method for method in methods if plan.only is None or method.name in plan.only],
            rounds=plan.rounds,
            least=RANKED if i == 0 and plan.rounds >= RANKED else plan.least,
            until=began + plan.seconds * plan.share(i + 1),
            report=lambda what, rounds, cell=i: report(what, cell, rounds),  # type: ignore[misc]
            keep=lambda one: keep(so_far(one)),
        )
        cells.append(with_floors(measured, bytes_of))
        keep(so_far())
    family = so_far()
    if plan.drafting is not None:
        rate = None if subject.trained else plan.rate
        family["drafting"] = compare_drafts(
            subject,
            plan.drafting,
            rate=rate,
            lengths=plan.lengths,
            rounds=plan.draft_rounds,
            report=lambda what, rounds: report(what, len(plan.cells), rounds),
        )
    return family


def machine(*, gpu: bool = False) -> dict[str, Any]:
    """What the figures depend on: processor, load, threads and versions; no host names."""
    return {
        "processor": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {_capability()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "proxytune": proxytune.__version__,
    }


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _fitted(cell: Cell, context: int) -> Cell:
    """A cell cut to fit a context, at the expense of its longer part."""
    over = cell.prompt + cell.new - context
    if over <= 0:
        return cell
    return replace(cell, prompt=cell.prompt - over) if cell.prompt > cell.new else replace(cell, new=cell.new - over)
