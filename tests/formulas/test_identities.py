"""Formulas against statements that others made: transformers' guidance, identities of the papers, a table by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulas import batch_of, composed, generated, model_of, picked, ragged, rescored
from support.tiny import build
from support.vision import prompts, seeing

import proxytune
from proxytune import ForkDecoding, FusedDecoding, SiblingDecoding
from proxytune.errors import CacheError, InputError, MemberError, UnsupportedModeError, UnsupportedModelError
from proxytune.formulas import (
    ClassifierFreeGuidance,
    ContextAware,
    ContrastiveDecoding,
    DeRa,
    EmulatedFineTuning,
    Formula,
    ProxyTuning,
    Schedule,
    View,
)
from proxytune.models.members.cache_name import CACHE, cache_of
from proxytune.models.weighing import Weighing

SAMPLED = {"do_sample": True, "top_k": 0}


def test_guidance_is_that_of_transformers_where_nothing_is_padded() -> None:
    model, base = composed(ClassifierFreeGuidance(gamma=1.7)), model_of("base")
    ids, negative = (ragged((length, length), seed)["input_ids"] for length, seed in ((6, 1), (4, 2)))
    ours = generated(model, {"input_ids": ids, "prompts": {"negative": negative}})
    theirs = generated(base, {"input_ids": ids}, guidance_scale=1.7, negative_prompt_ids=negative)
    assert ours.sequences.equal(theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)


def test_emulated_fine_tuning_is_proxy_tuning_in_law() -> None:
    batch = batch_of(ProxyTuning())
    eft, proxy = (generated(composed(f(alpha=1.0)), batch) for f in (EmulatedFineTuning, ProxyTuning))
    for one, two in zip(eft.logits, proxy.logits, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), two.log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert eft.sequences.equal(proxy.sequences)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_dera_is_each_of_its_models_at_its_ends(lam: float) -> None:
    formula = DeRa(lam=lam)
    model, batch = composed(formula), batch_of(formula)
    alone = generated(model_of("aligned" if lam else "base"), batch)
    out = generated(model, batch)
    assert out.sequences.equal(alone.sequences)
    assert all(map(torch.equal, out.logits, alone.logits))
    with pytest.raises(MemberError, match="weights add up to 0"):  # the same model twice is no line
        proxytune.wrap(
            model_of("base"),
            formula=formula.with_alpha(0.5),
            members={"aligned": model_of("base")},
            check_vocabulary=False,
        )


def test_contrastive_decoding_of_a_table() -> None:
    """Logs of p = (.50, .30, .15, .05) and q = (.60, .10, .15, .15): with β = 1, p²/q, where p ≥ .2 · .50."""
    p, q = (torch.tensor([x]).log() for x in ((0.50, 0.30, 0.15, 0.05), (0.60, 0.10, 0.15, 0.15)))
    index = {"base": 0, "amateur": 1}
    got = Weighing(ContrastiveDecoding(beta=1.0, share=0.2), index).combined([p[:, None], q[:, None]])[0, 0]
    torch.testing.assert_close(got[:3].exp(), torch.tensor([0.25 / 0.60, 0.09 / 0.10, 0.0225 / 0.15]))
    assert got[3] == -torch.inf  # .05 < .10
    assert int(got.argmax()) == 1  # the base alone writes token 0
    kept = Weighing(ContrastiveDecoding(beta=1.0, share=0.3), index).combined([p[:, None], q[:, None]])[0, 0]
    assert kept.isneginf().tolist() == [False, False, False, True]  # .15 is .3 of the largest: kept
    every = Weighing(ContrastiveDecoding(beta=1.0, share=None), index).combined([p[:, None], q[:, None]])[0, 0]
    torch.testing.assert_close(every[3].exp(), torch.tensor(0.0025 / 0.15))


# --- own prompts, and schedules, beside other things ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["context-aware", "scheduled"])
@pytest.mark.parametrize("loop", [ForkDecoding, SiblingDecoding])
def test_trees_are_what_the_whole_texts_say(name: str, loop: Any) -> None:
    strength = Schedule.linear(2.0, 0.0, 3)
    formula = ContextAware(alpha=1.5) if name == "context-aware" else ProxyTuning(alpha=strength)
    model, batch = composed(formula), batch_of(formula)
    how = loop(threshold=2.0, seed=1, **({"branches": 3} if loop is ForkDecoding else {"siblings": 3}))
    out = generated(model, batch, custom_generate=how, output_scores=False, output_logits=False, **SAMPLED)
    leaves = [(tree.prompt, leaf) for tree in out.trees for leaf in tree]
    width = batch["input_ids"].shape[1]
    texts = torch.tensor([batch["input_ids"][row].tolist() + leaf.along("tokens") for row, leaf in leaves])
    wanted = rescored(model, picked(batch, [row for row, _ in leaves]), texts)
    got = torch.tensor([leaf.along("logprobs") for _, leaf in leaves])
    assert texts.shape[1] == width + 4
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("formula", [ContextAware(alpha=1.5), ProxyTuning(alpha=Schedule.cosine(2.0, 0.0, 3))])
def test_a_kept_cache_goes_on(formula: Formula) -> None:
    model, batch = composed(formula), batch_of(formula)
    whole = generated(model, batch)
    begun = generated(model, batch, max_new_tokens=2)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    rest = {"input_ids": begun.sequences, "attention_mask": mask}
    if isinstance(formula, ContextAware):  # a schedule would begin anew: what was generated is the prompt now
        assert generated(model, rest, max_new_tokens=2, **{CACHE: cache_of(begun)}).sequences.equal(whole.sequences)
        again = {**rest, "prompts": batch["prompts"]}
        with pytest.raises(
            InputError, match="prompts: expected none beside a filled cache, .*got prompts for no_context"
        ):
            generated(model, again, **{CACHE: cache_of(whole)})
    else:
        anew = generated(model, rest, max_new_tokens=2)
        kept = generated(model, rest, max_new_tokens=2, **{CACHE: cache_of(begun)})
        assert kept.sequences.equal(anew.sequences)


def test_own_prompts_beside_positions_lengths_and_a_draft_of_another_model() -> None:
    formula = ContextAware(alpha=1.5)
    model, batch = composed(formula), batch_of(formula)  # one of its own prompts is the longest
    plain = generated(model, batch).sequences
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert generated(model, {**batch, "position_ids": positions}).sequences.equal(plain)
    assert model.generate(**batch, max_length=plain.shape[1], do_sample=False, eos_token_id=None).equal(plain)
    one = picked(batch, [1])
    assert generated(model, one, assistant_model=model_of("expert")).sequences.equal(plain[1:2])
    one = {**one, "input_ids": one["input_ids"].repeat(2, 1), "attention_mask": one["attention_mask"].repeat(2, 1)}
    assert generated(model, one).sequences.equal(plain[[1, 1]])  # one prompt for all rows


def test_where_own_prompts_cannot_be() -> None:
    formula = ContextAware(alpha=1.5)
    model, batch = composed(formula), batch_of(formula)
    with pytest.raises(UnsupportedModeError, match=r"guidance_scale: .*got guidance_scale=1.5 and the no_context"):
        generated(model, batch, guidance_scale=1.5)
    with pytest.raises(CacheError, match="expected a DynamicCache, for members with a prompt of their own"):
        generated(model, batch, cache_implementation="static")
    with pytest.raises(UnsupportedModelError, match="the no_context: expected members that all read the same source"):
        proxytune.wrap(build("t5", 0), formula=formula, check_vocabulary=False)
    sees = proxytune.wrap(seeing("llava"), formula=formula, check_vocabulary=False)
    given = prompts("llava", [5, -1, 6])
    with pytest.raises(
        UnsupportedModeError, match="images: expected members that all read the base's prompt; got the no"
    ):
        sees.generate(**given, prompts={"no_context": torch.tensor([[5, 6]])}, max_new_tokens=2)


def test_a_model_in_two_roles_runs_once_but_for_another_prompt() -> None:
    base, small = model_of("base"), model_of("expert")
    given: dict[str, Any] = {"check_vocabulary": False, "end_tokens": "base"}
    model = proxytune.wrap(base, formula="base + x + 0.5*y - z", members={"x": small, "y": small, "z": base}, **given)
    assert [m.role for m in model.members] == ["base", "x"]
    assert model.weighing.numbers == (0.0, 1.5)
    model = proxytune.wrap(base, formula="base + x - y", members={"x": small, "y": View("x", prompt=True)}, **given)
    batch = ragged((5, 7), 1)
    out = generated(model, {**batch, "prompts": {"y": batch}})
    assert out.sequences.equal(generated(base, batch).sequences)  # the same prompt: no shift
    assert len(set(model.token_forwards.values())) == 1
    model.alpha = 0.0
    before = model.token_forwards
    generated(model, {**batch, "prompts": {"y": batch}})
    assert {role for role, n in model.token_forwards.items() if n > before[role]} == {"base"}


def test_a_cache_that_idle_members_have_not_read() -> None:
    model, batch = composed(ProxyTuning(alpha=0.0)), batch_of(ProxyTuning())
    begun = generated(model, batch, max_new_tokens=2)
    rest = {
        "input_ids": begun.sequences,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1),
    }
    model.alpha = 1.0
    with pytest.raises(CacheError, match="all members with a weight have read; .*Start without it"):
        generated(model, rest, **{CACHE: cache_of(begun)})
    assert generated(model, rest, custom_generate=FusedDecoding()).sequences.equal(generated(model, rest).sequences)


# --- schedules with images and with encoder-decoders ------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, [[0, 7, 9]]])
def test_a_schedule_with_encoder_decoders(start: Any) -> None:
    base, expert, antiexpert = (build("t5", seed) for seed in range(3))
    given: dict[str, Any] = {"expert": expert, "antiexpert": antiexpert, "check_vocabulary": False}
    ids = torch.arange(3, 9)[None]
    more = {} if start is None else {"decoder_input_ids": torch.tensor(start)}
    run = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3, "do_sample": False, **more}
    model = proxytune.wrap(base, alpha=Schedule.step(1.5, 0.0, 2), **given)
    out = model.generate(ids, eos_token_id=None, **run)
    first = 1 if start is None else 3
    for step, alpha in enumerate((1.5, 1.5, 0.0)):
        of = model.member_logits(ids, decoder_input_ids=out.sequences[:, : first + step])
        wanted = of["base"] + alpha * (of["expert"] - of["antiexpert"])
        torch.testing.assert_close(out.logits[step], wanted[:, -1], atol=1e-4, rtol=1e-4)


def test_a_schedule_with_images() -> None:
    def run(alpha: Any) -> Any:
        base = seeing("llava")
        model = proxytune.wrap(
            base, expert=build("llama", 2, 128), antiexpert=build("llama", 3, 128), alpha=alpha, check_vocabulary=False
        )
        return generated(model, prompts("llava", [5, -1, 6], [7, 8, -1, 9]), max_new_tokens=2)

    changing, full = run(Schedule.step(1.5, 0.0, 1)), run(1.5)
    assert changing.logits[0].equal(full.logits[0])
    base = generated(seeing("llava"), prompts("llava", [5, -1, 6], [7, 8, -1, 9]), max_new_tokens=2)
    assert not changing.logits[1].equal(full.logits[1])
    if changing.sequences[:, :-1].equal(base.sequences[:, :-1]):
        assert changing.logits[1].equal(base.logits[1])


def test_a_schedule_on_a_static_cache() -> None:
    """Which counts its columns in place, so that they are other ones after the pass."""
    formula = ProxyTuning(alpha=Schedule.linear(2.0, 0.0, 3))
    model, batch = composed(formula), batch_of(formula)
    plain, static = generated(model, batch), generated(model, batch, cache_implementation="static")
    torch.testing.assert_close(static.logits, plain.logits, atol=1e-4, rtol=1e-4)
