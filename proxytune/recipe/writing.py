"""What commands write into a recipe, which stays as it is otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from proxytune.errors import RecipeError
from proxytune.json_files import exchange
from proxytune.recipe.adapter import FORMAT_VERSION, RECIPE_FILE, Recipe, read_json
from proxytune.recipe.fork_calibration import ForkCalibration

__all__ = ["write_fork_threshold", "write_tuned"]


def write_fork_threshold(path: str | Path, calibration: ForkCalibration) -> Path:
    """Write a calibration into a recipe (file or folder) and change nothing else; relative folders stay relative.

    The file is replaced atomically, or left unchanged. Returns the file.

    Raises:
        RecipeError: If there is no such recipe, it is refused (see `Recipe.from_json`), or it cannot be written.
    """
    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    data = read_json(file)
    Recipe.from_json(data)
    return exchange(file, data | {"fork_threshold": asdict(calibration)}, "recipe", error=RecipeError)


def write_tuned(
    path: str | Path, formula: Any, knob: str, evidence: Mapping[str, Any], test: Sequence[Mapping[str, str]] = ()
) -> Path:
    """Write a tuned formula into a recipe (file or folder) with its evidence; what else it holds stays as it is.

    Under `evidence`, `tune` keeps the newest evidence of each knob, and `test` the files that are held out: each with
    its `file` name and `sha256`. A recipe of format 1 becomes one of the newest format. The file is replaced
    atomically, or left unchanged.

    Args:
        path: The recipe.
        formula: The formula at the chosen value.
        knob: What was tuned.
        evidence: JSON values: the file's name and SHA-256, the number of items, the curve, the chosen value.
        test: Files that nothing may be tuned on.

    Returns:
        The file.

    Raises:
        RecipeError: If there is no such recipe, it is refused (see `Recipe.from_json`), or it cannot be written.
    """
    from proxytune.formulas.registry import recipe_of

    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    data = read_json(file)
    kept = Recipe.from_json(data).evidence or {}
    held_out = {one["sha256"]: one for one in (*kept.get("test", ()), *test)}
    found = {**kept, "tune": {**kept.get("tune", {}), knob: dict(evidence)}}
    if held_out:
        found["test"] = [dict(one) for one in held_out.values()]
    data |= recipe_of(formula) | {"format_version": FORMAT_VERSION, "evidence": found}
    if not data["settings"]:
        del data["settings"]
    Recipe.from_json(data)
    return exchange(file, data, "recipe", error=RecipeError)
