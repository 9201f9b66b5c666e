"""Adapters of models that recur: the registry, a model of one's own with a value head, and models that do not recur."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.recursion import CLOSE, SEED, SIZE, VOCAB, How, Recurring, hrm, model_of, padded, prompts, run
from support.tiny import BOS, EOS, PAD, shared
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import proxytune
from proxytune import RecursionDecoding
from proxytune.errors import InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.recursion import LatentRecursion, register_recursion
from proxytune.methods.recursion.adapters import HrmTextRecursion, recursion_of
from proxytune.methods.recursion.transition import Transition
from proxytune.models.members.cache_name import CACHE

# --- a model of one's own, with a value head ------------------------------------------------------------------------

CYCLES = 4


class Thinker(LlamaForCausalLM):
    """A transformer with a recurrent head: a state is made anew four times from itself and the last layer's output."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.core = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.q = torch.nn.Linear(config.hidden_size, 1)
        self.transition: Any = None

    def states(self, x: torch.Tensor, move: Any) -> torch.Tensor:
        h = x
        for cycle in range(CYCLES):
            h = move(torch.tanh(self.core(h) + x), cycle)
        return h

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs)

        def move(h: torch.Tensor, cycle: int) -> torch.Tensor:
            return h if self.transition is None else self.transition(h, cycle=cycle, positions=position_ids)

        h = self.states(outputs.last_hidden_state, move)
        return CausalLMOutputWithPast(logits=self.lm_head(h), **{CACHE: outputs.past_key_values})


class ThinkerRecursion:
    def cycles(self, model: Any) -> int:
        return CYCLES

    def state_size(self, model: Any) -> int:
        return int(model.config.hidden_size)

    @contextmanager
    def perturbed(self, model: Any, transition: Transition) -> Iterator[None]:
        model.transition = transition
        try:
            yield
        finally:
            model.transition = None

    def value_head(self, model: Any) -> Any:
        return lambda states: model.q(states)[:, 0]


@functools.cache
def thinker() -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Thinker(config).double().eval()
    model.generation_config.pad_token_id = PAD
    register_recursion(Thinker, ThinkerRecursion())
    return model


@torch.no_grad()
def thought(model: Any, text: list[int], how: How) -> tuple[torch.Tensor, float, int]:
    """Logits after a text, the value of its last state, and the cycles that it used."""
    x = model.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
    recurring = Recurring(how, len(text))
    h = model.states(x, recurring)
    return model.lm_head(h)[-1], float(model.q(h)[-1]), recurring.used[-1] or CYCLES


@pytest.mark.smoke
def test_a_registered_model_with_a_value_head() -> None:
    model, (ids, mask) = thinker(), padded()
    assert isinstance(recursion_of(model), ThinkerRecursion)
    how = How(sigma=0.5, at=tuple(range(CYCLES)), halt=0.9)
    loop = RecursionDecoding(sigma=0.5, trajectories=4, seed=SEED, select="value", halt=how.halt)
    free = run(model, loop, ids, mask)
    ends = int(free.trajectories.sequences[0, 1, 10])
    out = run(model, loop, ids, mask, eos_token_id=ends)
    assert len(set(out.trajectories.lengths.flatten().tolist())) > 1
    for b in range(3):
        values = []
        for i in range(4):
            mine = How(how.sigma, how.at, how.halt, b, i)
            text, cycles = ids[b][mask[b].bool()].tolist(), 0
            for token in out.trajectories.sequences[b, i, 8 : 8 + int(out.trajectories.lengths[b, i])].tolist():
                logits, value, used = thought(model, text, mine)
                assert int(logits.argmax()) == token
                cycles += used
                text.append(token)
            values.append(value)
            assert int(out.trajectories.cycles[b, i]) == cycles
        assert out.trajectories.values[b].tolist() == pytest.approx(values, abs=CLOSE)
        assert int(out.chosen[b]) == int(np.argmax(values))
    assert torch.equal(out.scores, out.trajectories.values)
    assert model.transition is None


def test_an_adapter_that_does_not_call_the_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(self: Any, model: Any, transition: Transition) -> Iterator[None]:
        yield

    monkeypatch.setattr(ThinkerRecursion, "perturbed", nothing)
    with pytest.raises(UnsupportedModeError, match="call the transition in every cycle"):
        run(thinker(), RecursionDecoding(sigma=0.5, trajectories=2), prompts(2))


def test_the_protocol() -> None:
    assert isinstance(HrmTextRecursion(), LatentRecursion)
    assert isinstance(recursion_of(model_of()), HrmTextRecursion)
    for kind, recursion in ((Thinker, object()), ("Thinker", ThinkerRecursion()), (Thinker, ThinkerRecursion)):
        with pytest.raises(InputError, match="register_recursion"):
            register_recursion(kind, recursion)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got Thinker\( and the class ThinkerRecursion\. .*value_head\.$"):
        register_recursion(thinker(), ThinkerRecursion)  # type: ignore[arg-type]


# --- models that do not recur ----------------------------------------------------------------------------------------


def test_models_that_do_not_recur() -> None:
    loop = RecursionDecoding(sigma=0.1)
    with pytest.raises(UnsupportedModelError, match="register_recursion"):
        run(shared("llama", 1), loop, prompts(2))
    base = hrm(dtype=torch.float32)
    members = {"expert": shared("llama", 1, VOCAB), "antiexpert": shared("llama", 2, VOCAB)}
    composed = proxytune.wrap(base, **members, alpha=0.5, check_vocabulary=False)
    with pytest.raises(UnsupportedModelError, match="base"):
        run(composed, loop, prompts(2))
    with pytest.raises(UnsupportedModeError, match="decoder-only"):
        run(shared("t5", 1), loop, prompts(2))
