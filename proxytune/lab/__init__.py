"""A synthetic world with programmatic verifiers, four small Llamas trained on it, and more models for studies.

The table of contents. `NOTES.md` in this folder says what the world is and what was measured. Names are imported on
first use, so that the verifiers can be used without torch.

================ ====================================================================================================
`bundled`        the folder of a bundled model, for `AutoModelForCausalLM.from_pretrained`
`bundled_record` what was recorded when the bundled family was trained: alpha, seed, figures
`build_world`    the people and their facts
`problems`       held-out problems of one task
`grade`          the verdict of a task's verifier, lenient and strict
`Problem`        a question with a checkable answer
`Grade`          such a verdict
`World`          all people
`train_family`   train the four models from nothing
`family_rows`    ask a family held-out problems, one row per way of answering
`train_studies`  train the models of the studies: known forks, answers that swing with their length, a collapsed policy
`load_study`     open one of them
`route_law`      what a model answers to a route (`proxytune.lab.routes`), exactly
`PUZZLES`        tasks with several solutions, all of which are known: colouring, queens, Countdown with a scratchpad
`train_puzzlers` train small models on them, in twins that vary their answers or do not
`load_puzzler`   open one of those
================ ====================================================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.lab.bundle import bundled, bundled_record
    from proxytune.lab.evaluation import family_rows
    from proxytune.lab.family import train_family
    from proxytune.lab.laws import route_law
    from proxytune.lab.puzzlers import load_puzzler, train_puzzlers
    from proxytune.lab.puzzles import PUZZLES
    from proxytune.lab.studies import load_study, train_studies
    from proxytune.lab.tasks import Problem, problems
    from proxytune.lab.verifiers import Grade, grade
    from proxytune.lab.world import World, build_world

__all__ = [
    "PUZZLES",
    "Grade",
    "Problem",
    "World",
    "build_world",
    "bundled",
    "bundled_record",
    "family_rows",
    "grade",
    "load_puzzler",
    "load_study",
    "problems",
    "route_law",
    "train_family",
    "train_puzzlers",
    "train_studies",
]

_HOME = {
    "PUZZLES": "proxytune.lab.puzzles",
    "Grade": "proxytune.lab.verifiers",
    "Problem": "proxytune.lab.tasks",
    "World": "proxytune.lab.world",
    "build_world": "proxytune.lab.world",
    "bundled": "proxytune.lab.bundle",
    "bundled_record": "proxytune.lab.bundle",
    "family_rows": "proxytune.lab.evaluation",
    "grade": "proxytune.lab.verifiers",
    "problems": "proxytune.lab.tasks",
    "load_puzzler": "proxytune.lab.puzzlers",
    "load_study": "proxytune.lab.studies",
    "route_law": "proxytune.lab.laws",
    "train_family": "proxytune.lab.family",
    "train_puzzlers": "proxytune.lab.puzzlers",
    "train_studies": "proxytune.lab.studies",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'proxytune.lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
