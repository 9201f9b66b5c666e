"""Gates go with their beams."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gates import CLOSE, CLOSE3, PLAIN, Row, measured, watched
from support.tiny import BOS, PAD, shared
from transformers import LogitsProcessor

from proxytune.methods.latent.decoding import LatentDecoding
from proxytune.methods.latent.gate_state import GateState
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import LatentMixture


class Witness(LogitsProcessor):
    """Keeps the texts and the scores of each step; a power makes some of them cold."""

    function_of_ids = True  # it must not see a step twice

    def __init__(self, power: float) -> None:
        self.power = power
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = (scores * self.power).log_softmax(-1)
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores


def beams(
    gates: LatentGates, prompts: list[list[int]], *, count: int = 4, new: int = 12, power: float = 1.7
) -> tuple[int, int, Any]:
    """How often what a beam was fed is not what the reference says; how often a beam went elsewhere; the output.

    The reference of a text is that of the text it goes on from, wherever that one stood.
    """
    model, witness, ids = shared("llama", 1), Witness(power), torch.tensor(prompts)
    with watched(model) as fed:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=LatentDecoding(LatentMixture(kind="mean"), gates, seed=1),
            logits_processor=[witness],
            num_beams=count,
            do_sample=False,
            eos_token_id=None,
            max_new_tokens=new,
            return_dict_in_generate=True,
        )
    table = model.get_input_embeddings().weight
    known: dict[tuple[int, ...], Row] = {}
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    place: dict[tuple[int, ...], int] = {}
    wrong = moved = 0
    special = gates.with_discrete([PAD, BOS])
    for t, (texts, scores) in enumerate(witness.seen):
        now: dict[tuple[int, ...], Row] = {}
        for b, text in enumerate(texts.tolist()):
            key = (b // count, *text)
            if t == 0:
                now[key] = Row(special, text)
                continue
            before = key[:-1]
            row = copy.deepcopy(known[before])
            due = row.due()
            assert due in (-1, text[-1])
            distribution = kept[before]
            if due >= 0:
                distribution = torch.full_like(distribution, -math.inf)
                distribution[due] = 0.0
            soft = row.step(text[-1], *measured(distribution, text[-1]))
            wrong += torch.equal(fed[t - 1][b], table[text[-1]]) == soft
            moved += t > 1 and place[before] != b and differs(known, before, b, place)
            now[key] = row
        known = now
        kept = {(b // count, *text): scores[b] for b, text in enumerate(texts.tolist())}
        place = {(b // count, *text): b for b, text in enumerate(texts.tolist())}
    return wrong, moved, out


def differs(
    known: dict[tuple[int, ...], Row], before: tuple[int, ...], b: int, place: dict[tuple[int, ...], int]
) -> bool:
    """Whether the beam that stood there had another state than the one that this beam goes on from."""
    here = next(known[key] for key, at in place.items() if at == b)
    facts = [(r.cold, r.run, r.stopped, r.latent) for r in (here, known[before])]
    return facts[0] != facts[1]


BEAMS = {
    "run": replace(PLAIN, max_run=2, min_entropy=0.5),
    "dwell": replace(PLAIN, dwell=(2, 1)),
    "cold": replace(PLAIN, cold_steps=2, cold_entropy=2.5),
    "cold, with a span": replace(PLAIN, cold_steps=1, cold_entropy=2.0, end_ids=CLOSE3),
    "all": replace(PLAIN, dwell=1, max_run=3, loop_ngram=1, loop_repeats=2, cold_steps=6, cold_entropy=2.0),
}
PROMPTS = [[33, 44, 55], [60, 71, 82], [9, 8, 7]]


@pytest.mark.parametrize("name", BEAMS)
def test_beams_carry_their_gates_with_them(name: str) -> None:
    wrong, moved, _ = beams(BEAMS[name], PROMPTS, new=14)
    assert wrong == 0
    assert moved > 3


def test_a_control_states_that_stay_behind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GateState, "of", lambda self, parents: self)
    for name, gates in BEAMS.items():
        assert beams(gates, PROMPTS, new=14)[0] > 0, name


@pytest.mark.parametrize("end", [CLOSE, CLOSE3])
def test_cold_stop_ends_the_span_of_every_beam(end: list[int]) -> None:
    gates = replace(PLAIN, end_ids=end, cold_steps=3, cold_entropy=99.0)
    wrong, _, out = beams(gates, PROMPTS, count=3, new=9)
    assert wrong == 0
    assert out.sequences[:, 6 : 6 + len(end)].tolist() == [end] * 3
    _, _, without = beams(replace(gates, cold_steps=None), PROMPTS, count=3, new=9)
    assert (without.sequences[:, 6] != end[0]).all()
