"""What every registered formula keeps to: a value with one finite weight per companion, which a recipe gives back.

A new formula is a line in `proxytune.formulas.FORMULAS`; it then runs through these tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.tiny import build

import proxytune
from proxytune import ProxyTunedModel
from proxytune.errors import InputError, RecipeError
from proxytune.formulas import FORMULAS, Formula, ProxyTuning
from proxytune.formulas.checks import COMPANIONS, check_formula

ALPHAS = [-2.0, 0.0, 0.5, 1.0, 3.0]
REGISTERED = pytest.mark.parametrize("name", FORMULAS)


@REGISTERED
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_formula_has_one_finite_weight_for_each_companion(name: str, alpha: float) -> None:
    formula = FORMULAS[name](alpha=alpha)
    assert check_formula(formula) is formula
    assert (formula.name, formula.alpha) == (name, alpha)
    assert tuple(formula.roles) == COMPANIONS
    assert all(type(weight) is float and math.isfinite(weight) for weight in formula.weights())


@REGISTERED
def test_at_alpha_zero_the_base_is_left(name: str) -> None:
    assert all(weight == 0 for weight in FORMULAS[name](alpha=0.0).weights())


@REGISTERED
def test_a_formula_is_a_value(name: str) -> None:
    formula = FORMULAS[name](alpha=0.5)
    other = formula.with_alpha(2)
    assert other == FORMULAS[name](alpha=2.0) != formula
    assert hash(other) == hash(FORMULAS[name](alpha=2.0))
    assert formula == FORMULAS[name](alpha=0.5)  # with_alpha makes another one
    with pytest.raises((AttributeError, TypeError)):
        formula.alpha = 1.0  # type: ignore[misc]


@REGISTERED
@pytest.mark.parametrize("alpha", [math.nan, math.inf, "1.0", None, True])
def test_an_alpha_that_is_no_finite_number_is_refused(name: str, alpha: Any) -> None:
    with pytest.raises(InputError, match="alpha: expected a finite number"):
        FORMULAS[name](alpha=alpha)
    with pytest.raises(InputError, match="alpha: expected a finite number"):
        FORMULAS[name](alpha=1.0).with_alpha(alpha)


def saved(folder: Path) -> dict[str, str]:
    places = {role: str(folder / role) for role in ("base", *COMPANIONS)}
    for seed, place in enumerate(places.values()):
        build("llama", seed).save_pretrained(place)
    return places


@REGISTERED
def test_a_recipe_gives_the_formula_back(name: str, tmp_path: Path) -> None:
    model = proxytune.wrap(**saved(tmp_path), formula=FORMULAS[name](alpha=0.7), check_vocabulary=False)
    model.save_pretrained(tmp_path / "recipe")
    with pytest.warns(proxytune.errors.VocabularyWarning):
        again = ProxyTunedModel.from_pretrained(tmp_path / "recipe")
    assert again.formula == model.formula
    ids = torch.arange(3, 11)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


# --- a formula of one's own ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Damped(ProxyTuning):
    """Takes off less of the antiexpert than it adds of the expert."""

    name: ClassVar[str] = "damped"
    share: float = 0.5

    def weights(self) -> tuple[float, ...]:
        return (self.alpha, -self.share * self.alpha)


def test_a_formula_of_ones_own_works_once_it_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = proxytune.wrap(**saved(tmp_path), formula=Damped(alpha=0.7), check_vocabulary=False)
    ids = torch.arange(3, 11)[None]
    of = model.member_logits(ids)
    torch.testing.assert_close(model(ids).logits, of["base"] + (0.7 * of["expert"] - 0.35 * of["antiexpert"]))
    with pytest.raises(RecipeError, match=r"got Damped\(alpha=0.7, share=0.5\), which is not in .*Register it first"):
        model.save_pretrained(tmp_path / "recipe")
    assert not (tmp_path / "recipe").exists()
    monkeypatch.setitem(FORMULAS, "damped", Damped)
    model.save_pretrained(tmp_path / "recipe")
    with pytest.warns(proxytune.errors.VocabularyWarning):
        assert ProxyTunedModel.from_pretrained(tmp_path / "recipe").formula == model.formula
    monkeypatch.delitem(FORMULAS, "damped")
    with pytest.raises(RecipeError, match="got 'damped'.*first import the module that adds it"):
        ProxyTunedModel.from_pretrained(tmp_path / "recipe")


def test_settings_that_a_recipe_would_lose_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMULAS, "damped", Damped)
    model = proxytune.wrap(**saved(tmp_path), formula=Damped(alpha=0.7, share=0.2), check_vocabulary=False)
    with pytest.raises(RecipeError, match=r"share=0.2\), which has other weights .*; other settings need another name"):
        model.save_pretrained(tmp_path / "recipe")


class Bare:
    """A formula that checks nothing itself."""

    name, roles, alpha = "bare", COMPANIONS, 1.0

    def __init__(self, **other: Any) -> None:
        self.__dict__.update(other)

    def weights(self) -> tuple[Any, ...]:
        return self.__dict__.get("own", (1.0, -1.0))

    def with_alpha(self, alpha: Any) -> Formula:
        return Bare(alpha=alpha)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: "proxy-tuning", "got 'proxy-tuning'"),
        (lambda: ProxyTuning, "got the class ProxyTuning"),
        (lambda: Bare(own=(1.0,)), r"got alpha=1.0, roles \('expert', 'antiexpert'\) and weights \(1.0,\)"),
        (lambda: Bare(own=(1.0, math.nan)), r"weights \(1.0, nan\)"),
        (lambda: Bare(own=(1.0, "1")), r"weights \(1.0, '1'\)"),
        (lambda: Bare(alpha=math.inf), "got alpha=inf"),
        (lambda: Bare(roles=("expert",)), r"roles \('expert',\)"),
    ],
)
def test_what_is_no_formula_is_refused_before_a_model_is_loaded(make: Callable[[], Any], got: str) -> None:
    with pytest.raises(InputError, match=f"formula.*: expected a formula with a name.*{got}.*ProxyTuning.alpha=0.5"):
        proxytune.wrap("no", expert="such", antiexpert="model", formula=make())


def test_an_alpha_that_a_formula_lets_through_is_refused_when_it_is_set() -> None:
    members = {role: build("llama", seed) for seed, role in enumerate(("base", *COMPANIONS))}
    model = proxytune.wrap(**members, formula=Bare(), check_vocabulary=False)
    with pytest.raises(InputError, match="formula 'bare': expected .* a finite α.*; got alpha='x'"):
        model.alpha = "x"
    assert model.alpha == 1.0
