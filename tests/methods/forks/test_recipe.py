"""A fork threshold in a recipe: read, refused by name, written."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proxytune.errors import InputError, RecipeError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.recipe import RECIPE_FILE, ForkCalibration, Recipe, write_fork_threshold

NAN = torch.nan
CALIBRATION = ForkCalibration(share=0.2, nats=0.41, tokens=1234, temperature=1.0, measure="raw", alpha=0.5)
PLAIN: dict[str, Any] = {
    "format_version": 1,
    "base": {"id": "base", "revision": None},
    "expert": {"id": "org/small-tuned", "revision": "v2"},
    "antiexpert": {"id": "org/small", "revision": None},
    "formula": "proxy-tuning",
    "alpha": 0.5,
}
WRITTEN = {"share": 0.2, "nats": 0.41, "tokens": 1234, "temperature": 1.0, "measure": "raw", "alpha": 0.5}


def test_a_recipe_holds_it_and_older_ones_are_read() -> None:
    assert Recipe.from_json(PLAIN).fork_threshold is None
    assert "fork_threshold" not in Recipe.from_json(PLAIN).to_json()
    assert Recipe.from_json(PLAIN | {"fork_threshold": None}).fork_threshold is None
    recipe = Recipe.from_json(PLAIN | {"fork_threshold": WRITTEN})
    assert recipe.fork_threshold == CALIBRATION
    assert recipe.to_json() == PLAIN | {"format_version": 2, "fork_threshold": WRITTEN}
    assert Recipe.from_json(json.loads(recipe.dumps())) == recipe
    assert hash(recipe) != hash(Recipe.from_json(PLAIN))
    few = Recipe.from_json(PLAIN | {"fork_threshold": {"share": 0.2, "nats": 0.41, "tokens": 1234}})
    assert few.fork_threshold == ForkCalibration(share=0.2, nats=0.41, tokens=1234)
    threshold = ForkThreshold.of(CALIBRATION)
    assert (threshold.nats, threshold.share, threshold.measure, threshold.alpha) == (0.41, 0.2, "raw", 0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.41, "recipe key 'fork_threshold': expected an object with share, nats and tokens; got float"),
        ({"share": 0.2}, "; got no nats, tokens. Run proxytune calibrate"),
        (WRITTEN | {"bits": 1}, "recipe key 'fork_threshold': expected only the keys share, nats, tokens, .* 'bits'"),
        (WRITTEN | {"share": 20}, r"recipe key 'fork_threshold': share: expected a number in \(0, 1\); got 20"),
        (WRITTEN | {"nats": "0.4"}, "nats: expected a finite number; got '0.4'"),
        (WRITTEN | {"nats": NAN}, "nats: expected a finite number; got nan"),
        (WRITTEN | {"tokens": 0}, "tokens: expected a whole number of tokens, at least 1"),
        (WRITTEN | {"tokens": 2.5}, "tokens: expected a whole number of tokens, at least 1"),
        (WRITTEN | {"temperature": 0}, "temperature: expected a finite number > 0; got 0"),
        (WRITTEN | {"measure": ["raw"]}, "measure: expected 'raw', 'scaled' or 'truncated'"),
        (WRITTEN | {"alpha": True}, "alpha: expected a finite number; got True"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(PLAIN | {"fork_threshold": value})


def test_it_is_written_into_a_recipe_that_is_otherwise_left_alone(tmp_path: Path) -> None:
    # A relative folder must stay one, or the recipe could not be moved any more.
    (tmp_path / "base").mkdir()
    file = tmp_path / RECIPE_FILE
    file.write_text(json.dumps(PLAIN))
    for where in (tmp_path, file):
        assert write_fork_threshold(where, CALIBRATION) == file
        assert json.loads(file.read_text()) == PLAIN | {"fork_threshold": WRITTEN}
    assert Recipe.load(tmp_path).fork_threshold == CALIBRATION
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", RECIPE_FILE]

    file.write_text(json.dumps(PLAIN | {"alpha": "high"}))
    before = file.read_text()
    with pytest.raises(RecipeError, match="alpha"):
        write_fork_threshold(tmp_path, CALIBRATION)
    assert file.read_text() == before
    with pytest.raises(RecipeError, match="got no file at"):
        write_fork_threshold(tmp_path / "nowhere", CALIBRATION)


def test_numbers_of_other_libraries_are_written_as_json() -> None:
    found = ForkCalibration(share=np.float32(0.25), nats=np.float16(1.5), tokens=np.int64(5), alpha=np.float64(0.5))
    assert json.loads(json.dumps(asdict(found)))["tokens"] == 5
    assert (found.share, found.nats, found.alpha) == (0.25, 1.5, 0.5)


def test_a_recipe_without_a_calibration_says_so() -> None:
    with pytest.raises(InputError, match="calibration: .*; got None: this recipe is not calibrated. `proxytune"):
        ForkThreshold.of(Recipe.from_json(PLAIN).fork_threshold)
