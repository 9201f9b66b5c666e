"""Results of policies on problems with known answers: which were right, and what each attempt cost.

`plan` and `allocate` decide by such a run. `proxytune.search.policy.run_policies` makes one, or your own records do. As
a file:

```json
{
  "format_version": 1,
  "budget": 512,
  "kinds": ["chain", "countdown"],
  "trials": [{"name": "vote-8", "form": "parallel", "level": 8, "right": [true, false], "tokens": [412, 512]}]
}
```
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxytune.errors import InputError
from proxytune.json_files import check_form, exchange, read, refuse_unknown
from proxytune.validation import choice, whole

__all__ = ["FORMAT_VERSION", "CalibrationRun", "PolicyForm", "Trial"]

FORMAT_VERSION = 1

PolicyForm = Literal["parallel", "sequential"]
"""Several samples and a vote; or one text that is extended or revised."""

_MOST = np.iinfo(np.int64).max
_TRIAL = ("name", "form", "level", "right", "tokens")


@dataclass(frozen=True, eq=False)
class Trial:
    """One policy's results on P problems.

    Attributes:
        right: `[P]`, bool: whether its answer was right; False if there was none.
        tokens: `[P]`, int64: what it charged, prompt included; at least 1.

    Raises:
        InputError: If a value is out of range, or `right` and `tokens` differ in length.
    """

    name: str
    form: PolicyForm
    level: int
    right: NDArray[np.bool_]
    tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError.of("name", expected="a string, not empty", got=repr(self.name), remedy="Name the policy.")
        choice(f"form of {self.name!r}", self.form, get_args(PolicyForm))
        object.__setattr__(self, "level", whole(f"level of {self.name!r}", self.level, "of samples or extensions"))
        right, tokens = _array(self.right), _array(self.tokens)
        if right.ndim != 1 or not right.size or not (right.dtype == bool or _zeros_and_ones(right)):
            raise InputError.of(
                f"right of {self.name!r}",
                expected="a boolean for each problem, at least one",
                got=_brief(right),
                remedy="Pass whether each answer is right.",
            )
        if tokens.shape != right.shape or tokens.dtype.kind not in "iu" or (tokens < 1).any() or (tokens > _MOST).any():
            raise InputError.of(
                f"tokens of {self.name!r}",
                expected=f"{len(right)} whole numbers, one for each problem, at least 1",
                got=_brief(tokens),
                remedy="Pass what each attempt charged to its ledger, the prompt included.",
            )
        object.__setattr__(self, "right", right.astype(bool))
        object.__setattr__(self, "tokens", tokens.astype(np.int64))


@dataclass(frozen=True, eq=False)
class CalibrationRun:
    """Several policies on the same P problems.

    Attributes:
        trials: One per policy.
        kinds: `[P]`, the kind of each problem, if kinds may need different forms; None for no kinds.
        budget: Most tokens that an attempt could spend; None for no limit, or an unknown one.

    Raises:
        InputError: If there is no trial, two have the same name, or they differ in their number of problems.
    """

    trials: tuple[Trial, ...]
    kinds: tuple[str, ...] | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", tuple(self.trials))
        names = [trial.name for trial in self.trials]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise InputError.of(
                "trials",
                expected="one for each policy, at least one, all of different names",
                got=f"{', '.join(map(repr, twice))} twice" if twice else "none",
                remedy="Put the level into the name, e.g. 'vote-8'.",
            )
        lengths = {trial.name: len(trial.right) for trial in self.trials}
        if len(set(lengths.values())) > 1:
            raise InputError.of(
                "trials",
                expected="the same problems in each, since levels are compared problem by problem",
                got=", ".join(f"{n} in {name!r}" for name, n in lengths.items()),
                remedy="Run every policy on every problem.",
            )
        if self.kinds is not None:
            kinds = tuple(self.kinds) if isinstance(self.kinds, Sequence) else ()
            if len(kinds) != self.problems or isinstance(self.kinds, str) or not all(isinstance(k, str) for k in kinds):
                raise InputError.of(
                    "kinds",
                    expected=f"{self.problems} strings, one for each problem, or None",
                    got=repr(self.kinds)[:80],
                    remedy="Pass the kind of each problem, in the order of the problems.",
                )
            object.__setattr__(self, "kinds", kinds)
        if self.budget is not None:
            most = max(int(trial.tokens.max()) for trial in self.trials)
            if whole("budget", self.budget, least=1) < most:
                raise InputError.of(
                    "budget",
                    expected=f"at least the {most} tokens that an attempt is said to have spent",
                    got=f"{self.budget}",
                    remedy="Pass the limit that the attempts had, or None.",
                )

    @property
    def problems(self) -> int:
        """P, the number of problems."""
        return len(self.trials[0].right)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the policies."""
        return tuple(trial.name for trial in self.trials)

    def of_kind(self, kind: str) -> NDArray[np.intp]:
        """`[n]`, indices of the problems of a kind; empty if there is no such kind."""
        return np.flatnonzero([k == kind for k in self.kinds or ()])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the run to a JSON file, atomically, and return its path; `InputError` if it cannot be written."""
        trials = [
            {
                "name": trial.name,
                "form": trial.form,
                "level": trial.level,
                "right": trial.right.tolist(),
                "tokens": trial.tokens.tolist(),
            }
            for trial in self.trials
        ]
        kinds = None if self.kinds is None else list(self.kinds)
        data = {"format_version": FORMAT_VERSION, "budget": self.budget, "kinds": kinds, "trials": trials}
        return exchange(Path(path), data, "calibration run")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationRun:
        """Read a run that `save` wrote.

        Raises:
            InputError: If it cannot be read, its format is newer, keys are missing or unknown, or a value is out of
                range.
        """
        what = "calibration run"
        found = read(Path(path), what, remedy="Give the file that CalibrationRun.save() wrote.")
        keys = ("format_version", "budget", "kinds", "trials")
        data = check_form(found, what, version=FORMAT_VERSION, keys=keys, see="proxytune.search.calibration_run")
        trials = data["trials"]
        if not isinstance(trials, list) or not all(isinstance(t, dict) and set(_TRIAL) <= set(t) for t in trials):
            raise InputError.of(
                f"{what} key 'trials'",
                expected=f"objects with {', '.join(_TRIAL)}",
                got=repr(trials)[:80],
                remedy="See proxytune.search.calibration_run for the form.",
            )
        for trial in trials:
            refuse_unknown(trial, _TRIAL, f"{what}: trial {trial['name']!r}")
        return cls(tuple(Trial(**trial) for trial in trials), data["kinds"], data["budget"])


def _array(values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # lists of different lengths
        return np.asarray(values, object)


def _zeros_and_ones(values: NDArray[Any]) -> bool:
    return values.dtype.kind in "iu" and bool(np.isin(values, (0, 1)).all())


def _brief(values: ArrayLike) -> str:
    array = _array(values)
    return f"shape {list(array.shape)}, {array.dtype}: {np.array2string(array, threshold=6)[:80]}"
