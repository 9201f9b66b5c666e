"""What the gates remember, in scripted steps, against one row at a time in plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gates import Row

from proxytune.methods.latent.gate_state import GateState
from proxytune.methods.latent.gates import LatentGates

NAN = math.nan
LETTERS = 5
ENTROPIES = [0.0, 0.0078125, 0.25, 1.0, 2.5, math.inf, NAN]
SPREADS = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0, NAN]  # exact in float32, so that equality is equality


def least_or_none(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.integers(low, high))


@st.composite
def gate_settings(draw: st.DrawFn) -> LatentGates:
    pattern = st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=3)
    end = draw(st.one_of(st.none(), pattern))
    pair = st.tuples(st.integers(0, 3), st.integers(0, 3))
    return LatentGates(
        begin_ids=draw(st.one_of(st.none(), pattern.filter(lambda ids: ids != end))) if end else None,
        end_ids=end,
        discrete_ids=draw(st.lists(st.integers(0, LETTERS - 1), max_size=1)),
        min_entropy=draw(st.sampled_from([0.0, 0.0, 0.25, 0.75])),
        dwell=draw(st.one_of(st.none(), st.integers(0, 3), pair)),
        cold_steps=draw(least_or_none(1, 4)),
        cold_entropy=draw(st.sampled_from([0.0, 0.0078125, 0.25, 2.0, 99.0])),
        max_run=draw(least_or_none(1, 4)),
        loop_ngram=draw(least_or_none(1, 3)),
        loop_repeats=draw(st.integers(2, 3)),
    )


@given(gates=gate_settings(), data=st.data())
@settings(max_examples=250, deadline=None)
def test_all_gates_together_follow_the_reference(gates: LatentGates, data: st.DataObject) -> None:
    """Random texts, entropies and settings; rows are reordered and copied as beams are, and due tokens are written."""
    count, prompt = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    letter = st.integers(0, LETTERS - 1)
    rows = [Row(gates, data.draw(st.lists(letter, min_size=prompt, max_size=prompt))) for _ in range(count)]
    state = GateState.begin(gates, count, torch.device("cpu"), prompt)
    for _ in range(data.draw(st.integers(1, 14))):
        due = state.due(gates, torch.tensor([row.text for row in rows], dtype=torch.int64).view(count, -1))
        wanted = [row.due() for row in rows]
        assert (due is None and wanted == [-1] * count) or (due is not None and due.tolist() == wanted)
        if data.draw(st.booleans()):
            parents = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
            rows = [copy.deepcopy(rows[i]) for i in parents]
            state = state.of(torch.tensor(parents))
            wanted = [wanted[i] for i in parents]
        tokens = [data.draw(letter) if token < 0 else token for token in wanted]
        entropy = [data.draw(st.sampled_from(ENTROPIES)) for _ in rows]
        spread = [data.draw(st.sampled_from(SPREADS)) for _ in rows]
        expected = [row.step(*x) for row, *x in zip(rows, tokens, entropy, spread, strict=True)]
        ids = torch.tensor([row.text for row in rows])
        before = copy.deepcopy(state)
        soft, after = state.step(gates, ids, torch.tensor(entropy), torch.tensor(spread))
        assert soft.tolist() == expected
        assert all(torch.equal(x, y) or x.isnan().any() for x, y in tensors(before, state))  # nothing in place
        state = after


def tensors(*states: GateState) -> list[tuple[torch.Tensor, ...]]:
    names = ("cold", "run", "stopped", "latent_mode", "block", "reference")
    return [tuple(getattr(state, name) for state in states) for name in names]


def driven(
    gates: LatentGates, tokens: Sequence[int], spreads: Sequence[float] = (), entropies: Sequence[float] = ()
) -> str:
    """One row without a prompt; "S" for soft, "." for discrete."""
    state, out, text = GateState.begin(gates, 1, torch.device("cpu"), 0), "", torch.zeros(1, 0, dtype=torch.int64)
    for i, token in enumerate(tokens):
        text = torch.cat([text, torch.tensor([[token]])], 1)
        h = torch.tensor([entropies[i] if entropies else 1.0])
        soft, state = state.step(gates, text, h, torch.tensor([spreads[i] if spreads else 0.5]))
        out += "S" if soft else "."
    return out


def test_gates_by_hand() -> None:
    """A reference can be wrong too: what the settings say, written out."""
    seven = list(range(20, 27))
    assert driven(LatentGates(), seven) == "SSSSSSS"
    assert driven(LatentGates(end_ids=22), seven) == "SS....."
    assert driven(LatentGates(begin_ids=21, end_ids=24), seven) == "..SS..."
    assert driven(LatentGates(begin_ids=[20, 21], end_ids=[24, 25]), seven) == "..SS..."
    assert driven(LatentGates(begin_ids=21, end_ids=24), [21, 5, 24, 5, 21, 5, 5]) == ".S...SS"
    assert driven(LatentGates(discrete_ids=[21, 25]), seven) == "S.SSS.S"
    assert driven(LatentGates(end_ids=0), [3, 0, 3]) == "S.."  # 0 is an id
    assert driven(LatentGates(min_entropy=0.5), seven, [0.5, 0.49, 0.51, 0, 1, NAN, 0.5]) == "S.S.S.S"
    assert driven(LatentGates(max_run=2), seven) == "SS.SS.S"
    cold = [0.005, 0.005, 1.0, 0.005, 0.009, 0.0, 1.0]
    assert driven(LatentGates(cold_steps=3), seven, (), cold) == "SSSSS.."
    assert driven(LatentGates(cold_steps=2), seven, (), cold) == "S......"
    assert driven(LatentGates(cold_steps=4), seven, (), cold) == "SSSSSSS"
    assert driven(LatentGates(cold_steps=3, cold_entropy=0.005), seven, (), cold) == "SSSSSSS"  # below, not at
    assert driven(LatentGates(loop_ngram=2, loop_repeats=2), [5, 6, 5, 6, 5, 7, 5]) == "SSS..SS"
    assert driven(LatentGates(loop_ngram=1, loop_repeats=3), [5, 5, 5, 6, 5, 6, 6]) == "SS.S.S."
    falls = [0.5, 0.4, 0.3, 0.35, 0.6, 0.2, 0.7]
    assert driven(LatentGates(dwell=1), seven, falls) == "S...S.S"
    assert driven(LatentGates(dwell=(3, 1)), seven, [0.5, 0.4, 0.3, 0.3, 0.6, 0.5, 0.7]) == "SSS.SSS"
    assert driven(LatentGates(dwell=(1, 3)), seven, [0.5, 0.4, 0.6, 0.6, 0.6, 0.7, 0.5]) == "S...SS."
    assert driven(LatentGates(dwell=1), seven, [0.5] * 7) == "SSSSSSS"
    # After the span a new one begins with a latent block, whatever the last one was.
    again = [0.9, 0.5, 0.4, 0.3, 0.9, 0.2, 0.3]
    assert driven(LatentGates(dwell=(1, 9), begin_ids=1, end_ids=2), [1, 5, 5, 2, 1, 6, 7], again) == ".S...SS"


def test_a_state_goes_with_its_row() -> None:
    gates = LatentGates(max_run=3, dwell=1, cold_steps=9, begin_ids=1, end_ids=2)
    state = GateState.begin(gates, 3, torch.device("cpu"), 2)
    state = replace(
        state,
        cold=torch.tensor([1, 2, 3]),
        run=torch.tensor([4, 5, 6]),
        stopped=torch.tensor([True, False, False]),
        latent_mode=torch.tensor([False, True, False]),
        block=torch.tensor([7, 8, 9]),
        reference=torch.tensor([0.1, 0.2, 0.3]),
    )
    parents = torch.tensor([2, 2, 0])
    for before, after in tensors(state, state.of(parents)):
        assert torch.equal(after, before[parents])
    assert state.of(parents).start == 2
    assert state.of(parents).listed.tolist() == [1, 2]
