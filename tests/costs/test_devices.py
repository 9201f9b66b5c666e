"""What a pass takes by its bytes, arithmetic and layers, and what that says of draft lengths."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import build

import proxytune
from proxytune.costs.devices import DECIDING, DRAWING, Machine, Work, draft_costs, machine_of
from proxytune.costs.model_size import pass_bytes, pass_work
from proxytune.costs.roofline import PassBytes
from proxytune.costs.speculation import best_draft_length
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.methods.speculation import ModelDraft
from proxytune.methods.speculation.model_drafts import ExpertDraft
from proxytune.throughput.byte_floors import floor_bytes

BILLION = 1e9


def work(parameters, layers):
    return Work(PassBytes(2 * parameters), parameters, layers)  # bfloat16


def test_a_pass_is_the_sum_on_a_cpu_and_the_longer_of_the_two_on_a_gpu():
    slow = Machine(bandwidth=10.0, operations=100.0, launch=1.0, at_once=False)
    fast = Machine(bandwidth=10.0, operations=100.0, launch=1.0, at_once=True)
    one = Work(PassBytes(200.0, 5.0), 50.0, 3)
    assert slow.seconds(one, rows=2, positions=4) == pytest.approx(3 * 1 + 200 / 10 + 2 * 50 * 2 * 4 / 100)
    assert fast.seconds(one, rows=2, positions=4) == pytest.approx(200 / 10 + 2 * 50 * 2 * 4 / 100)
    assert fast.seconds(Work(PassBytes(1.0), 1.0, 7), rows=1) == 7.0  # the device waits for the host


def test_a_model_tells_its_own_work():
    model = build("llama", 0, vocab=64).to(torch.bfloat16)
    found = pass_work(model)
    assert found.layers == 2
    looked_up = model.get_input_embeddings().weight.numel()
    assert found.parameters == model.num_parameters() - looked_up  # the head is apart, the table is looked up
    assert found.bytes.weights == 2 * found.parameters


@pytest.mark.parametrize(
    ("base", "small", "acceptance", "lengths"),
    [
        ((32 * BILLION, 64), (1.5 * BILLION, 28), 0.7, range(2, 7)),  # a light draft: far ahead
        ((13 * BILLION, 40), (7 * BILLION, 32), 0.7, range(1, 4)),  # a heavy one: not so far
        ((32 * BILLION, 64), (1.5 * BILLION, 28), 0.02, range(2)),  # nothing is accepted: hardly draft
    ],
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_draft_lengths_of_published_shapes(kind, base, small, acceptance, lengths):
    costs = draft_costs(machine_of(kind), [work(*base), work(*small)], work(*small), rows=1, member=True)
    assert best_draft_length(acceptance, costs, 16) in lengths


def test_more_rows_make_positions_dearer_on_a_cpu():
    base, small = work(BILLION, 16), work(BILLION / 20, 8)
    few, many = (draft_costs(machine_of("cpu"), [base, small], small, rows, member=True) for rows in (1, 32))
    assert many.position == pytest.approx(32 * few.position)
    assert best_draft_length(0.7, many, 16) < best_draft_length(0.7, few, 16)


@given(
    st.sampled_from(["cpu", "cuda", "mps"]),
    st.floats(1e5, 1e11),
    st.floats(1e5, 1e11),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 512),
    st.booleans(),
)
def test_costs_are_what_passes_take(kind, large, small, deep, shallow, rows, member):
    machine = machine_of(kind)
    base, draft = work(large, deep), work(small, shallow)
    costs = draft_costs(machine, [base], draft, rows, member=member)
    assert costs.round == pytest.approx(machine.seconds(base, rows) + DECIDING)
    assert costs.draft == pytest.approx(machine.seconds(draft, rows) + DRAWING)
    assert costs.position >= 0
    assert costs.of_round(0) == pytest.approx(machine.seconds(base, rows) + member * machine.seconds(draft, rows))
    assert draft_costs(machine, [base], None, rows, member=False).draft == 0


class Halved(ProxyTuning):
    """With weights that do not cancel, one model may be expert and antiexpert."""

    def weights(self):
        return (self.alpha, -self.alpha / 2)


def test_a_model_with_two_roles_runs_once():
    base, expert, antiexpert = build("llama", 1, hidden=64), build("llama", 2), build("llama", 3)
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, check_vocabulary=False)
    # Beside the composition the expert reads a cache of its own, and is asked again when it verifies.
    assert ModelDraft(expert).costs(model, 1) == ModelDraft(copy.deepcopy(expert)).costs(model, 1)
    assert ExpertDraft().costs(model, 1).round < ModelDraft(expert).costs(model, 1).round
    alike = proxytune.wrap(base, expert=expert, antiexpert=expert, formula=Halved(), check_vocabulary=False)
    own = draft_costs(machine_of("cpu"), [pass_work(base)], pass_work(expert), 1, member=True)
    assert ExpertDraft().costs(alike, 1) == own
    assert own.round < ExpertDraft().costs(model, 1).round


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_with_two_adapter_states_is_read_once_and_computed_twice():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    base, expert = build("llama", 1, hidden=64), peft.get_peft_model(build("llama", 2), config)
    pair = (expert, expert.get_base_model())
    one, both = pass_work(expert), pass_work(*pair)
    assert both.bytes == PassBytes(one.bytes.weights, 2 * one.bytes.cached)
    assert both.parameters == 2 * one.parameters
    assert both.layers == one.layers
    model = proxytune.wrap(base, expert=pair[0], antiexpert=pair[1], check_vocabulary=False)
    found, machine = ExpertDraft().costs(model, 1), machine_of("cpu")
    assert found.plain == machine.seconds(pass_work(base), 1) + machine.seconds(both, 1)
    apart = draft_costs(machine, [pass_work(base), one], one, 1, member=True)
    assert (found.round, found.draft) == (apart.round, apart.draft)  # a draft runs the expert alone
    assert found.plain < apart.plain
    small = floor_bytes(
        {"base": pass_bytes(base), "expert": one.bytes, "antiexpert": one.bytes},
        "loop",
        ("base", "expert", "antiexpert"),
        context=8.0,
        shared=both.bytes,
    )
    assert small == pass_bytes(base).at(context=8.0) + both.bytes.at(context=8.0)
