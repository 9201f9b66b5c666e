"""What every registered formula keeps to, and a few that are written down.

It is a value with one finite weight per companion, which a recipe gives back. Neutral, it is the base, bit for bit;
what the base forbids stays forbidden; rows are independent; both implementations decide alike; speculation and beams
are exact.

A new formula is a line in `proxytune.formulas.FORMULAS`; it then runs through these tests. If it needs settings besides
its strength, it has a line in `support/formulas.py`.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.formulas import CASES, OWN, batch_of, composed, generated, model_of, picked, rescored
from support.interpreter import patch_the_language_once_per_launch
from support.tiny import build

import proxytune
from proxytune import FusedDecoding, ProxyTunedModel, SpeculativeDecoding, ops
from proxytune.errors import InputError, RecipeError
from proxytune.formulas import FORMULAS, Formula, Linear, ProxyTuning
from proxytune.formulas.base import settings_of
from proxytune.formulas.checks import COMPANIONS, check_formula
from proxytune.formulas.registry import made
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft
from proxytune.models.weighing import Weighing

EACH = pytest.mark.parametrize("name", CASES)
STRENGTHS = pytest.mark.parametrize(
    ("name", "alpha"), [(name, alpha) for name, case in CASES.items() for alpha in case.alphas]
)


# --- a value ---------------------------------------------------------------------------------------------------------


@STRENGTHS
def test_a_formula_has_one_finite_weight_for_each_companion(name: str, alpha: float) -> None:
    formula = CASES[name].made(alpha)
    assert check_formula(formula) is formula
    assert (getattr(formula, "expression", formula.name), formula.alpha) == (CASES[name].name, alpha)
    assert len({*formula.roles}) == len(formula.roles) == len(formula.weights())
    assert "base" not in formula.roles
    assert all(role.isidentifier() for role in formula.roles)
    assert all(type(weight) is float and math.isfinite(weight) for weight in formula.weights())
    terms = formula.terms()
    assert terms[0].member == "base"
    assert {t.member for t in terms[1:]} <= {*formula.roles}
    if name in ("proxy-tuning", "dexperts", "emulated-fine-tuning", "scheduled", "gated"):
        assert tuple(formula.roles) == COMPANIONS


@EACH
def test_at_its_neutral_setting_the_base_is_left(name: str) -> None:
    formula = CASES[name].made().neutral()
    assert all(weight == 0 for weight in formula.weights())
    assert formula.terms()[0].weight == 1.0
    assert formula.mask is None
    assert formula.gate is None
    assert check_formula(formula) is formula


@EACH
def test_a_formula_is_a_value(name: str) -> None:
    case = CASES[name]
    first, second = case.alphas[:2]
    formula = case.made()
    other = formula.with_alpha(int(second) if second == int(second) else second)
    assert other == case.made(second) != formula
    assert hash(other) == hash(case.made(second))
    assert formula == case.made(first)  # with_alpha makes another one
    with pytest.raises((AttributeError, TypeError)):
        setattr(formula, formula.strength_field, 1.0)
    namespace = {**vars(proxytune.formulas), **vars(proxytune.formulas.schedules)}
    assert eval(repr(formula), namespace) == formula
    assert "gate=None" not in repr(formula)
    for again in (copy.deepcopy(formula), pickle.loads(pickle.dumps(formula))):
        assert again == formula
        assert hash(again) == hash(formula)


@EACH
@pytest.mark.parametrize("alpha", [math.nan, math.inf, "1.0", None, True])
def test_an_alpha_that_is_no_finite_number_is_refused(name: str, alpha: Any) -> None:
    field = CASES[name].made().strength_field
    what = "a number" if name == "nudging" else "a finite number"
    case = CASES[name]
    make: Any = FORMULAS.get(case.name, lambda **given: Linear(case.name, **given))
    with pytest.raises(InputError, match=f"^{field}: expected {what}.*got {alpha!r}"):
        make(**{field: alpha}, **case.settings)
    if alpha is not None:  # which is the formula's own strength in a recipe
        with pytest.raises(InputError, match=f"^{field}: expected {what}.*got {alpha!r}"):
            made(case.name, alpha, case.settings)
    with pytest.raises(InputError, match=f"^{field}: expected {what}.*got {alpha!r}"):
        CASES[name].made().with_alpha(alpha)


# --- what it does to rows --------------------------------------------------------------------------------------------


def rows_of(formula: Formula, seed: int = 0, width: int = 200) -> tuple[Weighing, list[torch.Tensor]]:
    """A weighing of as many members as there are roles, and their logits `[3, V]`."""
    roles = ("base", *formula.roles)
    generator = torch.Generator().manual_seed(seed)
    rows = [3.0 * torch.randn(3, width, generator=generator) for _ in roles]
    return Weighing(formula, {role: i for i, role in enumerate(roles)}), rows


def combined(weighing: Weighing, rows: list[torch.Tensor], generated: torch.Tensor) -> torch.Tensor:
    return weighing.combined([x[:, None] for x in rows], generated[:, None])[:, 0]


AT = torch.tensor([0, 1, 3])
"""How many tokens the rows have generated."""


@EACH
def test_what_the_base_forbids_stays_forbidden(name: str) -> None:
    weighing, rows = rows_of(CASES[name].made())
    rows[0][:, ::3] = -math.inf
    rows[0][1, 1:] = -math.inf  # a single token is left
    for z in rows[1:]:
        z[:, 0] = 50.0  # where a companion would have it
        z[:, 1::7] = -math.inf
    logits = combined(weighing, rows, AT)
    assert not logits.isnan().any()
    assert logits[rows[0] == -math.inf].isneginf().all()
    if weighing._mask is None:
        assert logits[rows[0] > -math.inf].isfinite().all()


@EACH
def test_rows_can_be_permuted(name: str) -> None:
    weighing, rows = rows_of(CASES[name].made())
    order = torch.tensor([2, 0, 1])
    whole = combined(weighing, rows, AT)
    assert combined(weighing, [x[order] for x in rows], AT[order]).equal(whole[order])
    model, batch = composed(CASES[name].made()), batch_of(CASES[name].made())
    plain = generated(model, batch)
    turned = generated(model, picked(batch, order.tolist()))
    assert turned.sequences.equal(plain.sequences[order])
    torch.testing.assert_close(torch.stack(turned.logits), torch.stack(plain.logits)[:, order], atol=1e-5, rtol=1e-5)
    sampled = {"do_sample": True, "top_k": 0}
    plain = generated(model, batch, custom_generate=FusedDecoding(seed=3), **sampled)
    ids = FusedDecoding(seed=3, stream_ids=order.tolist())
    turned = generated(model, picked(batch, order.tolist()), custom_generate=ids, **sampled)
    assert turned.sequences.equal(plain.sequences[order])


@EACH
def test_both_implementations_give_the_same_tokens(name: str) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        patch_the_language_once_per_launch()
    weighing, rows = rows_of(CASES[name].made(), width=61)
    found, weights = weighing([x.to(device) for x in rows], AT.to(device))
    sampling = ops.SamplingParams.of(3, temperature=0.8, top_p=0.95, device=device)
    noise = ops.Noise.of(3, seed=1, device=device)
    with np.errstate(all="ignore"):  # the interpreter's arithmetic is numpy's
        for given in ({}, {"sampling": sampling, "noise": noise}):
            one, two = (
                ops.step(found, weights, want=("tokens", "entropy"), impl=impl, **given) for impl in ("torch", "triton")
            )
            assert one.tokens is not None
            assert two.tokens is not None
            assert one.tokens.equal(two.tokens)
            torch.testing.assert_close(one.entropy, two.entropy, atol=1e-5, rtol=1e-5)


# --- in generate() ---------------------------------------------------------------------------------------------------


@EACH
def test_neutral_it_is_the_base_bit_for_bit(name: str) -> None:
    formula = CASES[name].made().neutral()
    model, base, batch = composed(formula), model_of("base"), batch_of(formula)
    for settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}, {"custom_generate": FusedDecoding()}):
        torch.manual_seed(1)
        mine = generated(model, batch, **settings)
        torch.manual_seed(1)
        # A prompt that is longer than the base's is padding to the base: its own bits are those of the padded prompt.
        theirs = generated(base, batch, **settings)
        assert mine.sequences.equal(theirs.sequences)
        if "prompts" not in batch:
            assert all(map(torch.equal, mine.logits, theirs.logits))
            assert all(map(torch.equal, mine.scores, theirs.scores))
        else:
            torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    if "prompts" not in batch:
        with torch.no_grad():
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            assert model(**batch).logits.equal(base(**batch, position_ids=positions).logits)
    idle = [role for role in model.token_forwards if role != "base"]
    assert all(model.token_forwards[role] == 0 for role in idle)  # they did not run


@EACH
def test_speculation_is_lossless(name: str) -> None:
    formula = CASES[name].made()
    model, batch = composed(formula), batch_of(formula)
    drafts: list[Any] = [PromptLookupDraft(), ModelDraft(model_of("expert"))]
    drafts += ["expert"] if "expert" in formula.roles else []
    greedy = generated(model, batch).sequences
    sampled = {"do_sample": True, "top_k": 0}
    fused = generated(model, batch, custom_generate=FusedDecoding(seed=5), **sampled).sequences
    for draft in drafts:
        loop = SpeculativeDecoding(draft=draft, draft_tokens=2, accept="coupled", seed=5)
        assert generated(model, batch, custom_generate=loop).sequences.equal(greedy)
        assert generated(model, batch, custom_generate=loop, **sampled).sequences.equal(fused)


@EACH
def test_beams_are_what_the_whole_text_says_when_it_is_read_again(name: str) -> None:
    formula = CASES[name].made()
    model, batch = composed(formula), batch_of(formula)
    several = 2 if formula.mask is None else 1  # a mask may leave fewer tokens than beams
    out = generated(model, batch, num_beams=3, num_return_sequences=several, length_penalty=0.0)
    rows = [row for row in range(3) for _ in range(several)]
    again = rescored(model, picked(batch, rows), out.sequences).sum(1)
    torch.testing.assert_close(out.sequences_scores, again, atol=1e-4, rtol=1e-4)


# --- in a recipe -----------------------------------------------------------------------------------------------------


def saved(folder: Path, roles: tuple[str, ...] = ("base", *COMPANIONS)) -> dict[str, str]:
    places = {role: str(folder / role) for role in roles}
    for seed, place in enumerate(places.values()):
        build("llama", seed).save_pretrained(place)
    return places


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    roles = {role: None for case in CASES.values() for role in ("base", *case.made().roles) if role not in OWN}
    return saved(tmp_path_factory.mktemp("members"), tuple(roles))


@EACH
def test_a_recipe_gives_the_formula_back(name: str, places: dict[str, str], tmp_path: Path) -> None:
    formula = CASES[name].made()
    model = composed(formula, sources=places)
    model.save_pretrained(tmp_path / "recipe")
    with pytest.warns(proxytune.errors.VocabularyWarning):
        again = ProxyTunedModel.from_pretrained(tmp_path / "recipe")
    assert again.formula == model.formula == formula
    assert (again.formula.gate, again.formula.mask) == (formula.gate, formula.mask)
    assert again.recipe.views == model.recipe.views
    assert [m.own_prompt for m in again.members] == [m.own_prompt for m in model.members]
    batch = batch_of(formula)
    mine, theirs = generated(model, batch), generated(again, batch)
    assert all(map(torch.equal, mine.logits, theirs.logits))
    kept = json.loads((tmp_path / "recipe" / "proxytune_config.json").read_text())
    assert made(kept["formula"], kept["alpha"], kept.get("settings", {})) == formula
    assert settings_of(formula) == kept.get("settings", {})


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


class HardlyDamped(Damped):
    """Another formula of the same name."""

    def weights(self) -> tuple[float, ...]:
        return (self.alpha, -0.9 * self.alpha)


def test_settings_are_kept_and_what_a_recipe_would_lose_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMULAS, "damped", Damped)
    members = saved(tmp_path)
    model = proxytune.wrap(**members, formula=Damped(alpha=0.7, share=0.2), check_vocabulary=False)
    model.save_pretrained(tmp_path / "recipe")
    with pytest.warns(proxytune.errors.VocabularyWarning):
        assert ProxyTunedModel.from_pretrained(tmp_path / "recipe").formula == Damped(alpha=0.7, share=0.2)
    model = proxytune.wrap(**members, formula=HardlyDamped(alpha=0.7), check_vocabulary=False)
    with pytest.raises(RecipeError, match=r"share=0.5\), which has other weights .*, under a name of its own"):
        model.save_pretrained(tmp_path / "another")
    assert not (tmp_path / "another").exists()


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
        (lambda: 0.5, "got 0.5"),
        (lambda: ["proxy-tuning"], r"got \['proxy-tuning'\]"),
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
