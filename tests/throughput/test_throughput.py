"""The throughput bench in parts, each against something independent: known text, counts by hand, no caches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import build
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from proxytune.costs.model_size import pass_bytes
from proxytune.costs.speculation import expected_tokens
from proxytune.errors import InputError
from proxytune.methods.speculation.decoding import SpeculativeDecoding
from proxytune.throughput import run as throughput
from proxytune.throughput.byte_floors import aims, floor_bytes, published_floors, with_floors
from proxytune.throughput.counters import FirstToken, LiveBytes, counting
from proxytune.throughput.draft_costs import compare_drafts
from proxytune.throughput.measure import measure_cell, members_alone, ratio
from proxytune.throughput.methods import (
    BASE,
    COMPOSITE,
    FUSED,
    GATED,
    GRAPHS,
    NAIVE,
    OVERLAP,
    TUNED,
    methods_for,
)
from proxytune.throughput.naive_loop import _warped, naive_generate
from proxytune.throughput.planted_models import plant, successors
from proxytune.throughput.report import COUNTED, METHODS, bar, cheapest, counted, lines, markdown, summary, verdicts
from proxytune.throughput.shapes import PUBLISHED, SCALED, Shape, Trio
from proxytune.throughput.subjects import PROTOCOL, Cell, Subject, lab_subject, random_subject

# Two heads' worth of width, so that planted tokens stand far from the others; a narrower head for the small ones.
TINY = Trio("tiny", Shape(128, 2, 4, 2, 96, 97), Shape(96, 1, 4, 4, 64, 90, tied=True))
CELL = Cell(5, 24, 2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject(TINY, dtype=torch.float32)


# --- planted text ----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.floats(0, 1), st.integers(0, 5))
def test_successors_are_one_cycle_and_agree_at_the_rate(width: int, rate: float, seed: int) -> None:
    right, expert = successors(width, rate, seed=seed)
    token, seen = 0, set()
    for _ in range(width):
        seen.add(token)
        token = int(right[token])
    assert seen == set(range(width))
    assert token == 0
    higher = successors(width, min(1.0, rate + 0.1), seed=seed)[1]
    assert ((expert == right) <= (higher == right)).all()
    wide_right, wide_expert = successors(4000, rate, seed=seed)
    agreed, token = [], 0
    for _ in range(4000):
        agreed.append(int(wide_right[token] == wide_expert[token]))
        token = int(wide_right[token])
    for start in range(0, 4000, 400):  # not only on the whole
        assert sum(agreed[start : start + 400]) / 400 == pytest.approx(rate, abs=0.1)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_text_is_the_planted_one_and_the_acceptance_the_rate(subject: Subject, rate: float) -> None:
    subject.accept(rate)
    right, expert = successors(90, rate, seed=0)
    cell = Cell(5, 80, 1)
    ids = subject.prompts(cell)
    out = subject.steered.generate(
        ids,
        generation_config=cell.config,
        custom_generate=SpeculativeDecoding(draft_tokens=3),
        return_dict_in_generate=True,
    )
    text = out.sequences[0].tolist()
    assert text[5:] == [int(right[token]) for token in text[4:-1]]
    # What was drafted and decided upon, played over the known text.
    at, accepted, rejected = 5, 0, 0
    while at < 84:
        for _ in range(min(3, 84 - at)):
            agreed = int(expert[text[at]]) == text[at + 1]
            at, accepted, rejected = at + agreed, accepted + agreed, rejected + (not agreed)
            if not agreed:
                break
        at += 1
    assert (int(out.accepted), int(out.rejected)) == pytest.approx((accepted, rejected), abs=1)
    assert out.acceptance == pytest.approx(rate, abs=0.2)


def test_planting_refuses_what_cannot_be_planted() -> None:
    tied = TINY.small.build(dtype=torch.float32)
    with pytest.raises(InputError, match="expert.*untied head.*a tied head"):
        plant({"expert": tied}, 0.5)
    with pytest.raises(InputError, match="rate"):
        successors(8, 1.5, seed=0)


def test_a_pass_over_planted_weights_takes_the_same_operators() -> None:
    """What is planted are values only: no shape, no dtype, and so no time."""
    plain = TINY.base.build(dtype=torch.float32)
    planted = random_subject(TINY, dtype=torch.float32).models["base"]
    for (name, one), (other_name, other) in zip(plain.named_parameters(), planted.named_parameters(), strict=True):
        assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)


# --- shapes and bytes ------------------------------------------------------------------------------------------------

BILLIONS = {
    "13B + 7B + 7B": (13.016, 6.738),
    "32B + 1.5B + 1.5B": (32.76, 1.543),
    "8B + 1B + 1B": (8.030, 1.236),
}


@pytest.mark.parametrize("trio", PUBLISHED, ids=lambda trio: trio.name)
def test_published_shapes_have_their_published_parameters(trio: Trio) -> None:
    sizes = [shape.build(dtype=torch.bfloat16, device="meta").num_parameters() for shape in (trio.base, trio.small)]
    assert sizes == pytest.approx([1e9 * size for size in BILLIONS[trio.name]], rel=1e-3)


@pytest.mark.parametrize(
    ("scaled", "published"), list(zip(SCALED, PUBLISHED, strict=False)), ids=lambda trio: trio.name
)
def test_scaled_shapes_keep_the_ratio(scaled: Trio, published: Trio) -> None:
    def ratio_of(trio: Trio) -> float:
        base, small = (s.build(dtype=torch.bfloat16, device="meta").num_parameters() for s in (trio.base, trio.small))
        return base / small

    assert ratio_of(scaled) == pytest.approx(ratio_of(published), rel=0.08)


def test_an_untied_head_changes_no_bytes_of_a_pass() -> None:
    tied = TINY.small.build(dtype=torch.float32)
    apart = replace(TINY.small, tied=False).build(dtype=torch.float32)
    assert pass_bytes(tied).weights == pass_bytes(apart).weights == 4 * tied.num_parameters()
    assert pass_bytes(tied).cached == 2 * 1 * 96 * 4


def test_the_protocol_is_pinned_and_has_no_end_of_text() -> None:
    assert [(c.prompt, c.new, c.rows) for c in PROTOCOL[:5]] == [
        (8, 512, 1), (512, 8, 1), (8, 8, 1), (8, 128, 8), (8, 128, 32),
    ]  # fmt: skip
    for cell in PROTOCOL:
        config = cell.config
        assert config.min_new_tokens == config.max_new_tokens == cell.new
        assert config.eos_token_id is None


def test_lab_prompts_end_in_a_question_and_fit(subject: Subject) -> None:
    lab = lab_subject()
    prompts = lab.prompts(Cell(40, 8, 3))
    assert prompts.shape == (3, 40)
    assert torch.equal(prompts[0], lab.text[-40:])
    assert len({tuple(row) for row in prompts.tolist()}) == 3
    assert lab.longest == 512
    assert max(c.prompt + c.new for c in throughput.cpu_plans("full")[0].cells) <= 512
    with pytest.raises(InputError, match="prompts from a text"):
        lab.prompts(Cell(4000, 8))


# --- the naive loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_the_naive_loop_is_proxy_tuning(rows: int) -> None:
    """Against no cache at all, and one position at a time."""
    members = [build("llama", seed) for seed in (1, 2, 3)]
    ids = torch.randint(3, 240, (rows, 6))
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    seen: list[int] = []
    got = naive_generate(members, 0.8, ids, config, lambda: seen.append(1))
    want = ids
    with torch.no_grad():
        for _ in range(8):
            base, expert, antiexpert = (member(input_ids=want).logits[:, -1].float() for member in members)
            want = torch.cat([want, (base + 0.8 * (expert - antiexpert)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want)
    assert len(seen) == 8


def test_the_naive_loop_draws_from_the_truncated_law() -> None:
    logits = 3 * torch.randn(5, 50)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, top_p=0.8)
    want = logits.clone()
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        want = warper(None, want)
    torch.testing.assert_close(_warped(logits, config), want)
    members = [build("llama", seed) for seed in (1, 2, 3)]
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=1.0, top_k=4, top_p=0.9)
    ids = torch.randint(3, 240, (4, 6))
    torch.manual_seed(1)
    one = naive_generate(members, 1.0, ids, config)
    torch.manual_seed(1)
    assert torch.equal(one, naive_generate(members, 1.0, ids, config))


# --- counting --------------------------------------------------------------------------------------------------------


def test_passes_and_contexts_are_those_of_the_generation(subject: Subject) -> None:
    ids = subject.prompts(CELL)
    with counting(subject.models) as passes:
        subject.steered.generate(ids, generation_config=CELL.config)
    assert set(passes.of) == {"base", "expert", "antiexpert"}  # the tuned model is the base
    for reads in passes.of.values():
        assert reads.passes == CELL.new
        assert reads.positions == CELL.rows * (CELL.prompt + CELL.new - 1)
        assert reads.context == CELL.rows * sum(CELL.prompt + i for i in range(CELL.new))
    before = {role: reads.passes for role, reads in passes.of.items()}
    subject.steered.generate(ids, generation_config=CELL.config)
    assert {role: reads.passes for role, reads in passes.of.items()} == before, "the hooks are still there"


def test_the_first_token_ends_the_prompt(subject: Subject) -> None:
    with counting(subject.models) as passes:
        told = FirstToken(torch.device("cpu"), passes)
        subject.steered.generate(subject.prompts(CELL), generation_config=CELL.config, stopping_criteria=[told])
    assert told.at is not None
    assert told.calls == CELL.new
    assert {reads.passes for reads in passes.of.values()} == {CELL.new - 1}


def test_live_bytes_follow_what_is_made_and_dropped() -> None:
    outside = torch.zeros(10_000)
    with LiveBytes() as live:
        a = torch.zeros(250)  # 1000 bytes
        b = a.view(10, 25)  # shares them
        c = b + 1.0
        assert live.held == 2000
        del a, b
        assert live.held == 1000
        outside.view(100, 100).add_(1.0)  # was there before
        assert live.held == 1000
        for _ in range(5):
            c = c * 2.0
        assert (live.held, live.peak) == (1000, 2000)
    del c
    assert live.held == 0


def test_live_bytes_of_a_generation_are_its_caches_and_more(subject: Subject) -> None:
    cache = CELL.rows * (CELL.prompt + CELL.new - 1) * pass_bytes(subject.models["base"]).cached
    peaks = []
    for new in (CELL.new, 2 * CELL.new):
        cell = Cell(CELL.prompt, new, CELL.rows)
        with LiveBytes() as live:
            subject.models["base"].generate(subject.prompts(cell), generation_config=cell.config)
        peaks.append(live.peak)
    assert peaks[0] > cache
    # Twice the tokens: twice the cache, and one layer's more while it is made anew.
    grown = CELL.rows * CELL.new * pass_bytes(subject.models["base"]).cached
    assert grown <= peaks[1] - peaks[0] <= 2 * grown


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(subject: Subject) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        # By what the host takes per round, models so small would not be worth drafting for.
        patch.setattr("proxytune.costs.devices.DECIDING", 0.0)
        patch.setattr("proxytune.costs.devices.DRAWING", 0.0)
        cell = measure_cell(subject, CELL, methods_for(subject, (0.5, 1.0)), rounds=2)
    return with_floors(cell, subject.bytes)


def test_every_method_is_counted_and_timed(measured: dict[str, Any]) -> None:
    ran = {name: found for name, found in measured["methods"].items() if found["status"] == "run"}
    assert set(ran) == set(measured["methods"]) - {OVERLAP, GRAPHS}
    for name in (OVERLAP, GRAPHS):
        assert measured["methods"][name]["status"] == "not run: no CUDA device"
    for name, found in ran.items():
        assert found["tokens_per_s"] > 0, name
        assert found["ms_first"] > 0, name
        assert found["peak_mb"] > 0, name
        for key in ("over_members", "over_tuned", "over_naive", "over_floor"):
            assert 0 < found[key]["low"] <= found[key]["value"] <= found[key]["high"], (name, key)
        if found["kind"] != "alone":
            assert found["same_tokens"] == 1.0, name
    assert ran[TUNED]["over_tuned"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert ran[NAIVE]["over_naive"]["value"] == 1.0
    assert set(measured["members"]) == {"base", "expert", "antiexpert"}
    assert ran[BASE]["passes_per_token"] == {"base": 0.5}  # two rows in a pass
    for name in (NAIVE, "processor door", COMPOSITE, FUSED):
        assert ran[name]["passes_per_token"] == dict.fromkeys(("base", "expert", "antiexpert"), 0.5)


def test_bytes_are_never_below_their_floor(measured: dict[str, Any]) -> None:
    for name, found in measured["methods"].items():
        if found["status"] != "run":
            continue
        if found["kind"] == "speculation":
            # The floor is at the best length throughout, and in the limit of long texts.
            assert found["mb_per_token"] >= 0.9 * found["floor_mb_per_token"], name
        elif name.startswith(GATED):  # whose companions run at some contexts, not at the mean one
            assert found["mb_per_token"] == pytest.approx(found["floor_mb_per_token"], rel=1e-2), name
            assert found["mb_per_token"] < measured["methods"][FUSED]["mb_per_token"], name
        else:
            assert found["mb_per_token"] == pytest.approx(found["floor_mb_per_token"], rel=1e-3), name


def test_all_accepted_costs_fewer_passes_than_half(measured: dict[str, Any]) -> None:
    half, every = (measured["methods"][f"speculation, {rate} planted"] for rate in ("0.5", "1"))
    assert every["acceptance"] == 1.0
    assert half["acceptance"] == pytest.approx(0.5, abs=0.25)
    assert every["rounds"] < half["rounds"]
    assert every["passes_per_token"]["base"] < half["passes_per_token"]["base"] < 0.5
    assert every["floor_over_tuned"] < half["floor_over_tuned"]


def test_the_floor_by_hand(subject: Subject) -> None:
    each = subject.bytes
    weights = {role: of.weights for role, of in each.items()}
    cached = {role: of.cached for role, of in each.items()}
    trio = ("base", "expert", "antiexpert")
    got = floor_bytes(each, "steered", trio, context=10, rows=2)
    assert got == pytest.approx(sum(weights[r] + 20 * cached[r] for r in trio) / 2)
    alone = floor_bytes(each, "speculation", trio, context=0, acceptance=0.0)
    assert alone == pytest.approx(sum(weights[r] for r in trio))
    best = min(
        (weights["base"] + weights["antiexpert"] + (k + 0.8**k) * weights["expert"]) / expected_tokens(0.8, k)
        for k in range(17)
    )
    assert floor_bytes(each, "speculation", trio, context=0, acceptance=0.8) == pytest.approx(best)


def test_floors_of_published_shapes_by_hand() -> None:
    """Qwen's 31.98 billion read per pass of the large model, 1.54 of a small one; no cache."""
    found = published_floors(PUBLISHED[1], (0.0, 0.7), context=0.0)
    assert found["step"] == pytest.approx((31.985 + 2 * 1.5437) / 31.985, abs=1e-3)
    assert found["speculation"][0] == {"acceptance": 0.0, "drafted": 0, "ratio": found["step"]}
    spoken = found["speculation"][1]
    tokens = sum(0.7**i for i in range(spoken["drafted"] + 1))
    want = (31.985 + 1.5437 * (1 + spoken["drafted"] + 0.7 ** spoken["drafted"])) / tokens / 31.985
    assert spoken["ratio"] == pytest.approx(want, abs=1e-3)
    others = [(31.985 + 1.5437 * (1 + k + 0.7**k)) / sum(0.7**i for i in range(k + 1)) / 31.985 for k in range(12)]
    assert spoken["ratio"] == pytest.approx(min(others), abs=1e-3)


def test_members_alone_make_the_passes_of_a_generation_and_no_more(subject: Subject) -> None:
    ids = subject.prompts(CELL)
    text = subject.steered.generate(ids, generation_config=CELL.config)
    with counting(subject.models) as passes:
        taken = members_alone(subject, ids, text, CELL)
    for role, reads in passes.of.items():
        assert reads.passes == CELL.new
        assert reads.context == CELL.rows * sum(CELL.prompt + i for i in range(CELL.new))
        first, whole = taken[role]
        assert 0 < first < whole


def test_ratios_are_paired_medians() -> None:
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])["value"] == 3.0
    noisy = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(0.5)
    found = ratio((2 * noisy).tolist(), noisy.tolist())
    assert found == {"value": 2.0, "low": 2.0, "high": 2.0}  # what falls on both cancels out
    found = ratio(noisy.tolist(), [1.0] * 40)
    assert found["low"] < found["value"] < found["high"]


def test_aims_say_whether_they_were_met_and_what_bytes_alone_would_make(measured: dict[str, Any]) -> None:
    base = {"status": "run", "over_members": {"value": 1.04, "low": 1.0, "high": 1.1}}
    value = {"value": 1.2, "low": 1.1, "high": 1.3}
    alone = {"kind": "steered", "over_tuned": value, "over_naive": value, "floor_over_tuned": 1.09}
    spoken = {"kind": "speculation", "planted": 0.7, "over_tuned": value, "over_floor": value, "floor_over_tuned": 1.4}
    family = {
        "name": "13B + 7B + 7B",
        "mb_per_pass": {"base": 1000, "expert": 50, "antiexpert": 50},
        "cells": [
            {
                "prompt": 8, "new": 512, "rows": 1, "setting": "greedy",
                "methods": {TUNED: base | alone, FUSED: base | alone, "s": base | spoken, "x": {"status": "not run"}},
            }
        ],
    }  # fmt: skip
    got = {one["aim"]: one for one in aims(family, gpu=True)}
    assert [one["met"] for one in got.values()] == [True, False, False, False, True]
    assert got["Speculation: at most 1.30 × the tuned model"]["floor"] == 1.4
    assert "At most 0.6 × the naive loop" not in {one["aim"] for one in aims(family)}
    text = "\n".join(verdicts(family | {"aims": aims(family, gpu=True)}))
    assert "1.30 × the tuned model: met in 1 of 1" in text
    assert "out of reach, since bytes alone give 1.40" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_set_on_a_gpu_has_every_method() -> None:
    trio = random_subject(TINY, dtype=torch.bfloat16, device="cuda")
    found = measure_cell(trio, CELL, methods_for(trio, (0.7,), graphs=True), rounds=2)["methods"]
    assert {one["status"] for one in found.values()} == {"run"}
    assert {one["same_tokens"] for one in found.values() if one["kind"] != "alone"} == {1.0}
    assert all(one["peak_mb"] > 0 for one in found.values())


# --- the cost model --------------------------------------------------------------------------------------------------


def test_tokens_per_round_are_those_of_the_cost_model(subject: Subject) -> None:
    """Counts, not times: what is generated in a round at the acceptance that was measured."""
    found = compare_drafts(subject, Cell(5, 85), rate=0.7, lengths=(0, 2, 5), rounds=1)
    for line in found["lines"]:
        predicted, got = line["tokens_per_round"]["predicted"], line["tokens_per_round"]["measured"]
        # Runs of agreement are those of one cycle of planted tokens, not their mean over all there might be.
        assert got == pytest.approx(predicted, rel=0.15), line
        assert math.isfinite(line["ms_per_token"]["measured"])
    assert found["lines"][0]["tokens_per_round"] == {"predicted": 1.0, "measured": 1.0}


@pytest.mark.slow
def test_rounds_take_what_the_cost_model_says() -> None:
    """Ratios between draft lengths, in which the speed of the machine cancels out; wide, since others use it too."""
    subject = random_subject(SCALED[0])
    found = compare_drafts(subject, Cell(8, 24), rate=0.7, lengths=(0, 2, 6), rounds=5)
    took = {line["draft_length"]: line["ms_per_round"] for line in found["lines"]}
    for k in (2, 6):
        predicted = took[k]["predicted"] / took[0]["predicted"]
        assert took[k]["measured"] / took[0]["measured"] == pytest.approx(predicted, rel=0.5)
    assert took[6]["measured"] > took[0]["measured"]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_small_set_is_measured_and_said() -> None:
    kept: list[int] = []
    plan = throughput.Plan(
        lambda: random_subject(TINY, dtype=torch.float32),
        (CELL, Cell(9, 4, 1, "sampled")),
        1,
        0.0,
        (0.7,),
        CELL,
        lengths=(0, 2),
    )
    record = throughput.measure([plan], keep=lambda so_far: kept.append(len(so_far["families"])))
    assert kept == [1, 1, 1]  # after each cell, and in the end
    assert (record["left_out"], record["status"]) == (0, "run")
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    (family,) = record["families"]
    assert [cell["rounds"] for cell in family["cells"]] == [1, 1]
    text = markdown(record)
    assert "nan" not in text
    assert text.count("| speculation, 0.7 planted |") == 1
    for table in text.split("\n\n"):
        assert len({row.count("|") for row in table.split("\n") if row.startswith("|")}) <= 1
    late = throughput.measure([plan], deadline=-1.0)
    assert (late["families"], late["left_out"]) == ([], 1)


def ran_in(rounds: int, methods: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A family of one cell."""
    cell = {"prompt": 8, "new": 64, "rows": 1, "setting": "greedy", "rounds": rounds, "methods": methods}
    return {"name": "f", "cells": [cell], "parameters": {"base": 9, "tuned": 9}, **more}


def one(value: float, kind: str = "steered", off: float = 0.1, **more: Any) -> dict[str, Any]:
    """A method of that time per token."""
    ratio = {"value": value, "low": value - off, "high": value + off}
    return {"status": "run", "kind": kind, "over_tuned": ratio, "floor_over_tuned": 1.1} | more


def test_the_cheapest_way_to_steer_is_said_with_what_is_as_cheap() -> None:
    methods = {TUNED: one(1.0, "alone"), "naive loop": one(2.5), FUSED: one(2.0), COMPOSITE: one(2.1)}
    methods |= {"speculation, 0.9 planted": one(1.4, "speculation"), "e": {"status": "not run: no CUDA device"}}
    family = ran_in(4, methods)
    assert cheapest(family) == (
        "f, 8→64, batch 1. Cheapest to steer: `FusedDecoding`, at 2.00 [1.90, 2.10] × a tuned model's time per token "
        "(by bytes alone 1.10). Not told apart from it: `model.generate()`. If your members were as planted: "
        "`SpeculativeDecoding`, drafts right nearly always, at 1.40 [1.30, 1.50]."
    )
    del methods[COMPOSITE], methods["speculation, 0.9 planted"]
    assert cheapest(family).endswith("(by bytes alone 1.10).")
    # Two models of one shape differ by 1.08 ×, and so might these.
    methods |= {COMPOSITE: one(2.25), BASE: one(1.08, "alone")}
    assert cheapest(family).endswith("Not told apart from it: `model.generate()`.")
    methods |= {"speculation": one(1.5, "speculation")}
    assert ". Cheapest to steer: `SpeculativeDecoding`, at 1.50" in cheapest(family)


def test_a_run_of_few_rounds_or_that_contradicts_itself_ranks_nothing() -> None:
    methods = {TUNED: one(1.0, "alone"), FUSED: one(2.0, off=0.0), COMPOSITE: one(2.1, off=0.0)}
    assert cheapest(ran_in(3, methods)).endswith("Too few rounds to rank anything: 3, and 4 are needed.")
    twins = methods | {BASE: one(2.47, "alone", 1.5)}
    assert cheapest(ran_in(7, twins)) == (
        "f, 8→64, batch 1. This run was disturbed, so nothing is ranked: the base alone took 2.47 [0.97, 3.97] × the "
        "time of the tuned model, which has its shape. Run it again with nothing beside it."
    )
    assert "disturbed" not in cheapest(ran_in(7, twins) | {"parameters": {"base": 9, "tuned": 8}})
    assert cheapest(ran_in(7, {FUSED: {"status": "run", "kind": "steered"}})).endswith("so nothing is ranked.")
    fast = {"value": 0.74, "low": 0.7, "high": 0.8}
    quick = methods | {FUSED: methods[FUSED] | {"over_members": fast}}
    large = {"mb_per_pass": {"base": 137.0}}
    said = "nothing is ranked: `FusedDecoding` took 0.74 [0.70, 0.80] × the members' own passes, less than it can."
    assert said in cheapest(ran_in(7, quick, **large))
    for may in (ran_in(7, quick, mb_per_pass={"base": 3.0}), ran_in(7, quick, **large, device="cuda")):
        assert "Cheapest to steer: `FusedDecoding`" in cheapest(may)
    gated = methods | {"fused, gated": one(1.5, over_members=fast)}
    assert "Cheapest to steer: `FusedDecoding`, gated" in cheapest(ran_in(7, gated, **large))
    gated["fused, gated"]["over_floor"] = fast
    assert "`FusedDecoding`, gated took 0.74 [0.70, 0.80] × what its bytes take" in cheapest(ran_in(7, gated, **large))


def test_intervals_of_few_rounds_are_as_wide_as_they_tell() -> None:
    """How often an interval of so many rounds has the true ratio: about 95 %, as it says."""
    draws = np.random.default_rng(0).lognormal(0.0, 0.1, (400, 6))
    for rounds in (2, 3, 4, 6):
        found = [ratio(row[:rounds], [1.0] * rounds) for row in draws]
        assert 0.92 < np.mean([one["low"] <= 1.0 <= one["high"] for one in found]) < 0.98, rounds
        assert all(one["low"] <= one["value"] <= one["high"] for one in found)
    assert ratio([2.0], [1.0]) == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_the_cell_whose_methods_are_ranked_has_rounds_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(throughput, "measure_cell", lambda *_, **keys: asked.append(keys))
    for name in ("with_floors", "aims"):
        monkeypatch.setattr(throughput, name, lambda *_, **__: None)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 0.0)
    for rounds, first in ((4, 4), (3, 2), (1, 1)):
        asked.clear()
        throughput.measure_family(
            throughput.Plan(lambda: random_subject(TINY, dtype=torch.float32), (CELL,) * 3, rounds, 100.0)
        )
        assert [keys["least"] for keys in asked] == [first, min(2, rounds), min(2, rounds)]
        assert [keys["until"] for keys in asked] == [60.0, 80.0, 100.0]


def test_bars_are_as_long_as_their_values() -> None:
    assert bar(1.0, 0.0, 2.0, 10) == "│████     "[:9] + " "
    assert bar(2.0, 2.0, 2.0, 10) == "█████████│"
    assert bar(0.0, 1.0, 2.0, 10) == "    │     "
    assert all(len(bar(value, mark, 2.0, 10)) == 10 for value in (0, 0.7, 2) for mark in (0, 1.3, 2))


def test_lines_have_a_text_for_each_heading(measured: dict[str, Any]) -> None:
    assert {len(line) for line in lines(measured)} == {len(METHODS)}
    assert {len(line) for line in counted(measured)} == {len(COUNTED)}


def test_the_rounds_to_come_are_those_that_there_is_time_for(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    first, second = (throughput.Plan(lambda: None, (Cell(4, 4),) * n, 4, 100.0) for n in (2, 2))
    seen: list[tuple[str, float, int]] = []
    told = throughput._Told(lambda *what: seen.append(what), 0.0, first, [second], 0.0)
    # Each cell has one round that counts, and two to four timed ones: 20 at most, 12 at least.
    for seconds, cell, rounds, total in (
        (0.0, 0, 0.0, 20),  # no pace yet
        (10.0, 0, 1.0, 20),  # 190 seconds for 19 rounds
        (24.0, 0, 2.0, 17),  # 12 seconds each: 176 seconds for 14.7 rounds
        (40.0, 0, 2.0, 12),  # 20 seconds each: 8 rounds would fit, 10 are the least
        (150.0, 1, 0.0, 12),  # the cell ended after its third round
    ):
        clock[0] = seconds
        told("x", cell, rounds)
        assert seen[-1][2] == total, seconds
    assert [done for _, done, _ in seen] == [0, 1, 2, 2, 3]
    told("x", 1, 2.0)
    assert told.done == 6


def test_the_summary_names_what_loses_and_what_its_methods_met() -> None:
    def ran(value: float, kind: str = "steered", **more: Any) -> dict[str, Any]:
        ratio = {"value": value, "low": value - 0.1, "high": value + 0.1}
        passes = {"base": 1.0, "expert": 1.0}
        return {
            "status": "run", "kind": kind, "over_tuned": ratio, "floor_over_tuned": 1.1, "passes_per_token": passes
        } | more  # fmt: skip

    methods = {TUNED: ran(1.0, "alone"), "naive loop": ran(2.0), "composite door": ran(2.15), "fused loop": ran(2.25)}
    methods["fused, gated"] = ran(1.5, passes_per_token={"base": 1.0, "expert": 0.41})
    methods["speculation, 0 planted"] = ran(2.5, "speculation", acceptance=0.0)
    methods["speculation"] = {"status": "not run: no draft"}
    family = {"name": "f", "cells": [{"prompt": 8, "new": 64, "rows": 1, "setting": "greedy", "methods": methods}]}
    assert summary({"families": [family]}).split("\n")[2:] == [
        "| the tuned model itself | 1.00 (1.10) |",
        "| three models, hand-written loop | 2.00 (1.10) |",
        "| `model.generate()` | 2.15 (1.10) |",
        "| `FusedDecoding` | 2.25 (1.10), **loses** |",
        "| `FusedDecoding`, gated | 1.50 (1.10), 41 % of steps |",
        "| `SpeculativeDecoding`, drafts never right | 2.50 (1.10), 0 % right, **loses** |",
    ]


def test_the_interval_of_two_noisy_pairs_is_wide_and_above_zero() -> None:
    found = ratio([1.0, 8.0], [1.0, 0.5])
    assert 0 < found["low"] < 1e-4
    assert found["high"] > 1e5
