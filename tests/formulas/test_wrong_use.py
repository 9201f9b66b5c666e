"""Wrong formulas, members, views and prompts: each says what was expected, what came, and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import shared

import proxytune
from proxytune import SpeculativeDecoding
from proxytune.errors import InputError, MemberError
from proxytune.formulas import (
    ContextAware,
    ContrastiveDecoding,
    DeRa,
    Experts,
    Formula,
    Gate,
    Nudging,
    Plausibility,
    PromptView,
    ProxyTuning,
    Schedule,
    View,
)

BASE, EXPERT, OTHER = (shared("llama", seed) for seed in (1, 2, 3))
THREE = {"expert": EXPERT, "antiexpert": OTHER}
ALIGNED = {"aligned": EXPERT}


def wrap(base: Any = BASE, **given: Any) -> Any:
    return proxytune.wrap(base, **{"check_vocabulary": False, "end_tokens": "base", **given})


WRAP: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: wrap(formula=ContextAware), r"got the class ContextAware\. Pass e\.g\. ProxyTuning"),
    "a name": (lambda: wrap(formula="contrastiv"), r"one of proxy-tuning, .*got 'contrastiv'\. Did you mean 'contras"),
    "no name": (lambda: wrap(formula=""), r"a weighted sum of members, and this is no complete expression; got ''"),
    "a number": (lambda: wrap(formula=0.5), r"expected a formula .*got 0\.5"),
    "settings": (lambda: wrap(formula="experts"), r"experts: expected a weight for each .*Experts\(experts="),
    "no base": (lambda: wrap(formula="expert - antiexpert", **THREE), r"the base among them; got 'expert - anti"),
    "the base alone": (lambda: wrap(formula="2*base"), r"expected 1 to 7 members beside the base; got 0"),
    "a product": (lambda: wrap(formula="base*expert", expert=EXPERT), r"members cannot be multiplied \(base, expert\)"),
    "a power": (lambda: wrap(formula="base ** 2", expert=EXPERT), r"'base \*\* 2' is no number, member, log_p"),
    "a call": (lambda: wrap(formula="base + log_p(a + b)"), r"'log_p\(a \+ b\)' is no number, member"),
    "an infinite weight": (lambda: wrap(formula="base + 1e999*expert", expert=EXPERT), r"finite weight .*\(inf,\)"),
    "two strengths": (lambda: wrap(formula=DeRa(), alpha=1, members=ALIGNED), r"alpha or formula; got both, alpha=1"),
    "NaN": (lambda: wrap(formula="dera", alpha=float("nan"), members=ALIGNED), r"lam: expected a finite .*got nan"),
    "both forms": (lambda: wrap(formula="base + log_p(base)+x"), r"logits or log-probabilities of base, not both"),
    "both forms, folded": (
        lambda: wrap(formula="base + log_p(x)", members={"x": View()}),
        r"both of the member that is the x: two roles are the same model",
    ),
    "many members": (
        lambda: wrap(formula="base + " + " + ".join("abcdefgh")),
        r"expected 1 to 7 members beside the base; got 8: a, b, .*Leave some out",
    ),
    "members of no role": (
        lambda: wrap(formula="dera", members={"alligned": EXPERT}),
        r"the alligned: expected a role of the formula: aligned; got a LlamaForCausalLM\. Did you mean 'aligned'\?",
    ),
    "one too many": (
        lambda: wrap(formula="dera", members={**ALIGNED, "x": OTHER}),
        r"the x: expected a role of the formula: aligned; got a Llama\w+\. Leave it out, or name it in the formula",
    ),
    "an expert": (lambda: wrap(formula="dera", expert=EXPERT, members=ALIGNED), r"the expert: expected a role of the"),
    "a list": (lambda: wrap(formula="dera", members=[EXPERT]), r"members: expected role → a model.*got a list\. Pass"),
    "none": (lambda: wrap(formula="dera"), r"the aligned: expected a member .*Pass members={'aligned': …}"),
    "a place": (
        lambda: wrap(members=THREE),
        r"members: expected .*got expert: a Llama\w+\. Pass the expert as expert=",
    ),
    "not a model": (
        lambda: wrap(formula="dera", members={"aligned": 3}),
        r"the aligned: expected a model, .*got a int",
    ),
    "no expert": (lambda: wrap(antiexpert=OTHER), r"the expert: expected a model.*Proxy-tuning needs a base"),
    "a base of the base": (lambda: wrap(View(), formula="dera", members=ALIGNED), r"the base: expected a model.*got V"),
    "the class View": (
        lambda: wrap(formula="dera", members={"aligned": View}),
        r"the aligned: expected a View, .*got the class View\. Pass e\.g\. View\('base', prompt=",
    ),
    "a PromptView": (
        lambda: wrap(formula=ContextAware(), members={"no_context": PromptView(text="x")}),
        r"the no_context: expected a View: .*got PromptView\(.*Pass e\.g\. View\('base', prompt=PromptView",
    ),
    "of no role": (
        lambda: wrap(formula="dera", members={"aligned": View("expertt")}),
        r"the aligned: expected a model, or a View of a role that has one; got a View of 'expertt'.*Pass members=",
    ),
    "a circle": (
        lambda: wrap(formula="base + x - y", members={"x": View("y"), "y": View("x")}),
        r"the x: .*got views in a circle: x, y\. Pass members={'x': …}",
    ),
    "a gate": (lambda: wrap(**THREE, gate=0.5), r"gate: expected a Gate; got 0\.5\. Pass e\.g\. Gate\(entropy=0\.1\)"),
    "two gates": (
        lambda: wrap(**THREE, formula=ProxyTuning(gate=Gate(entropy=1)), gate=Gate(entropy=2)),
        r"expected one gate; got two, gate=Gate\(entropy=2.*Leave one of them out",
    ),
    "a gate of another": (lambda: Nudging(gate=Gate(top1=0.9)), r"gate of Nudging: expected none.*Set gamma"),
    "a gate in a formula": (lambda: ProxyTuning(gate=0.5), r"gate of ProxyTuning: expected a Gate; got 0\.5"),
    "a mask": (lambda: Formula.parse("base + x", plausible=0.1), r"plausible: expected a Plausibility; got 0\.1"),
    "a mask of no role": (
        lambda: wrap(
            formula=Formula.parse("2*base - expert", plausible=Plausibility(of="x", share=0.1)), expert=EXPERT
        ),
        r"the x: expected a member for each role of the formula: expert, x; got None",
    ),
    "two masks": (lambda: Plausibility(share=0.1, top_p=0.1), r"expected share or top_p; got both"),
    "no share": (lambda: ContrastiveDecoding(share=0), r"share: expected a number in \(0, 1\]; got 0"),
    "experts as a list": (lambda: Experts(experts=["math"]), r"experts: expected a weight for each .*got \['math'\]"),
    "an expert of NaN": (lambda: Experts(experts={"m": float("nan")}), r"weight of m: expected a finite number.*nan"),
    "no steps": (lambda: Schedule.linear(1, 0, 0), r"tokens of a schedule: expected a whole number.*got 0"),
    "a short schedule": (lambda: Formula.parse("base + linear(1, 0)*x"), r"'linear\(1, 0\)' is no number"),
    "half a token": (lambda: Formula.parse("base + linear(1, 0, 2.5)*x"), r"2\.5 generated tokens are no whole number"),
    "a prompt as text": (lambda: View(prompt="x"), r"View\(prompt=\): expected True, False or a PromptView; got 'x'"),
    "a view of nothing": (lambda: View(None), r"View\(of=\): expected the name of a role.*got None"),
    "a view of a model": (lambda: View(EXPERT), r"View\(of=\): expected the name .*got LlamaForCausalLM\(\. Pass e\.g"),
    "an adapter": (lambda: View(adapter=True), r"View\(adapter=\): expected an adapter's name, False .*got True"),
    "no change": (lambda: PromptView(), r"PromptView: expected one of drop, .*got none"),
    "one role": (lambda: PromptView(drop="system"), r"PromptView\(drop=\): expected roles, such as \('system',\)"),
    "a role of 3": (lambda: PromptView(drop=3), r"PromptView\(drop=\): expected roles.*got 3"),
    "one marker": (lambda: PromptView(without="<c>"), r"PromptView\(without=\): expected two markers.*got '<c>'"),
    "a marker of 3": (lambda: PromptView(without=3), r"PromptView\(without=\): expected two markers.*got 3"),
    "three markers": (lambda: PromptView(without=("a", "b", "c")), r"expected two markers.*got \('a', 'b', 'c'\)"),
    "no marker": (lambda: PromptView(without=("a", "")), r"two markers, neither of them empty; got \('a', ''\)"),
    "no text": (lambda: PromptView(text=""), r"PromptView\(text=\): expected a text that is not empty; got ''"),
    "no template": (lambda: PromptView(template=""), r"PromptView\(template=\): expected a chat template; got ''"),
    "no keys": (lambda: PromptView.from_json({"txt": "x"}), r"a PromptView: expected an object with keys out of drop"),
}


@pytest.mark.parametrize("what", WRAP)
def test_what_is_composed(what: str) -> None:
    call, message = WRAP[what]
    with pytest.raises(InputError, match=message):
        call()


def test_a_view_that_changes_nothing_leaves_no_shift() -> None:
    with pytest.raises(MemberError, match="the base and aligned: their weights add up to 0, .*or a View of it with"):
        wrap(formula="dera", members={"aligned": View()})


IDS = torch.arange(3, 13).view(2, 5)
RUN: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap(formula=ContextAware())


GIVEN: dict[str, tuple[Any, str]] = {
    "nothing": (None, r"prompts: expected a prompt for each .*: no_context; got None\. Call generate\(…, prompts={'no"),
    "an empty one": ({}, r"prompts: expected a prompt for each .*got \[\]"),
    "a tensor": (IDS, r"prompts: expected a prompt for each .*got a Tensor\. Call generate\(…, prompts={'no_context'"),
    "another role": (
        {"no_contxt": IDS},
        r"expected prompts for no_context; got prompts for no_contxt\. .*names are no_c",
    ),
    "the base": ({"no_context": IDS, "base": IDS}, r"got prompts for base\. The base's prompt is input_ids"),
    "other rows": ({"no_context": IDS.repeat(2, 1)}, r"one prompt for each of the base's 2, or one for all; got 4"),
    "a text": ({"no_context": "Hi"}, r"prompts\['no_context'\]: expected token ids \[B, T\].*got 'Hi'\. Pass what tok"),
    "a row": ({"no_context": IDS[0]}, r"expected token ids \[B, T\], at least one; got shape \[5\]"),
    "no tokens": ({"no_context": IDS[:, :0]}, r"expected token ids \[B, T\], at least one; got shape \[2, 0\]"),
    "floats": ({"no_context": IDS.float()}, r"got shape \[2, 5\], torch.float32"),
    "a mask": (
        {"no_context": {"input_ids": IDS, "attention_mask": IDS[:, :2]}},
        r"the shape of its ids, \[2, 5\]; got",
    ),
    "only padding": (
        {"no_context": {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}},
        r"prompts\['no_context'\]: expected at least one token in each row; got row 1, all of which is padding",
    ),
    "ids beyond": ({"no_context": IDS + 1000}, r"prompts\['no_context'\]: expected ids from 0 to 255.*got id 1012"),
    "ids below": ({"no_context": IDS - 100}, r"prompts\['no_context'\]: expected ids from 0 to 255.*got id -97"),
}


@pytest.mark.parametrize("what", GIVEN)
def test_prompts(model: Any, what: str) -> None:
    given, message = GIVEN[what]
    with pytest.raises(InputError, match=message):
        model.generate(IDS, prompts=given, **RUN)


def test_prompts_elsewhere(model: Any) -> None:
    with pytest.raises(
        InputError, match=r"prompts: expected none: all members read the base's prompt; got .*for expert"
    ):
        wrap(**THREE).generate(IDS, prompts={"expert": IDS}, **RUN)
    with pytest.raises(InputError, match=r"prompts: expected them in generate\(\) alone; got forward.*scoring.score"):
        model(IDS, prompts={"no_context": IDS})
    with pytest.raises(InputError, match=r"input_ids: expected the base's prompt beside prompts=; got None"):
        model.generate(prompts={"no_context": IDS}, **RUN)
    with pytest.raises(InputError, match=r"member_logits: expected members that all read the same text; got the no_c"):
        model.member_logits(IDS)


def test_padding_may_stand_on_any_side(model: Any) -> None:
    own = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    left = {"input_ids": torch.tensor([[0, 5, 6, 7], [0, 0, 8, 9]]), "attention_mask": own.ne(0).long().flip(1)}
    right = {"input_ids": own, "attention_mask": own.ne(0).long()}
    bare = left["input_ids"]
    out = [model.generate(IDS, prompts={"no_context": given}, **RUN) for given in (left, right, bare)]
    assert out[0].equal(out[1])
    assert out[0].equal(out[2])
    with pytest.raises(InputError, match=r"a mask, since a prompt ends like padding; got None; row 0 ends"):
        model.generate(IDS, prompts={"no_context": own}, **RUN)


def test_what_is_set_on_a_model(model: Any) -> None:
    before = model.formula
    with pytest.raises(
        InputError, match=r"a formula of base, no_context, .*got ProxyTuning\(.*role 'expert'.*wrap again"
    ):
        model.formula = ProxyTuning()
    with pytest.raises(InputError, match="expected a formula with a name"):
        model.formula = "dera"
    with pytest.raises(
        InputError, match=r"gate: expected an attribute of the formula; got model.gate = Gate\(.*replace"
    ):
        model.gate = Gate(entropy=1.0)
    assert model.formula is before
    model.formula = dataclasses.replace(before, gate=Gate(entropy=1.0))
    model.formula = Formula.parse("3*base - 2*no_context")  # of the same roles
    assert model.weighing.numbers == (3.0, -2.0)
    model.formula = before


def test_a_draft_of_an_expert_that_cannot_draft(model: Any) -> None:
    message = r"draft: expected a draft of another kind .*got 'expert' and members base, .*PromptLookupDraft"
    with pytest.raises(InputError, match=message):
        model.generate(IDS, prompts={"no_context": IDS}, custom_generate=SpeculativeDecoding(), **RUN)
    own = wrap(expert=View(prompt=True), antiexpert=OTHER)
    with pytest.raises(InputError, match=message):
        own.generate(IDS, prompts={"expert": IDS}, custom_generate=SpeculativeDecoding(), **RUN)
