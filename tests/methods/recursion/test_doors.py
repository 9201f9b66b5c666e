"""What recursion decoding refuses, and that nothing stays on the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.recursion import MODES, NEW, SEED, hooks_of, hrm, model_of, prompts, run
from transformers import LogitsProcessor, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from proxytune import RecursionDecoding
from proxytune.errors import InputError, NumericalError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": True}, "sigma"),
        ({"trajectories": 0}, "trajectories"),
        ({"trajectories": []}, "trajectories"),
        ({"trajectories": [1, 1]}, "different whole numbers"),
        ({"trajectories": [-1]}, "trajectories"),
        ({"trajectories": 2.0}, "trajectories"),
        ({"when": "twice"}, "when"),
        ({"when": ()}, "when"),
        ({"when": (-1,)}, "when"),
        ({"when": 1}, r"got 1\. Leave it out for 'cycle', or pass e\.g\. when=\(0, 1\)"),
        ({"select": "best"}, "'logprob', 'vote', 'value'"),
        ({"answer": len}, "select='vote'"),
        ({"halt": 0.0}, "halt"),
        ({"halt": float("inf")}, "halt"),
        ({"seed": 0.5}, "seed"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecursionDecoding(**{"sigma": 0.1} | settings)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"when": (3,)}, {}, "cycles from 0 to 2"),
        ({"select": "value"}, {}, "no value head"),
        ({"stream_ids": [0]}, {}, "row"),
        ({"stream_ids": [0, -1]}, {}, "row"),
        ({}, {"num_beams": 2}, "greedy decoding or sampling"),
        ({}, {"prompt_lookup_num_tokens": 2}, "greedy decoding or sampling"),
        ({}, {"guidance_scale": 1.5}, "guidance_scale"),
        ({}, {"output_scores": True}, "output_scores"),
        ({}, {"output_hidden_states": True}, "output_hidden_states"),
        ({}, {"compile_config": CompileConfig()}, "compile"),
    ],
)
def test_calls_that_are_refused(settings: dict[str, Any], call: dict[str, Any], message: str) -> None:
    model = model_of()
    with pytest.raises((InputError, UnsupportedModeError), match=message):
        run(model, RecursionDecoding(**{"sigma": 0.1} | settings), prompts(2), **call)
    assert hooks_of(model) == 0


def test_a_cache_that_holds_something_is_refused() -> None:
    model, ids = model_of(), prompts(2)
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(UnsupportedModeError, match=CACHE):
        run(model, RecursionDecoding(sigma=0.1), ids, **{CACHE: cache})
    # An empty one is taken, whatever its size.
    empty = StaticCache(config=model.config, max_cache_len=32)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    out = run(model, loop, ids, **{CACHE: empty})
    assert torch.equal(out.sequences, run(model, loop, ids).sequences)


def test_compiled_models_are_refused() -> None:
    loop = RecursionDecoding(sigma=0.1)
    whole, inside, forward = hrm(), hrm(), hrm()
    whole.compile(backend="eager")
    inside.model.H_module.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for model in (whole, inside, forward):
        with pytest.raises(UnsupportedModeError, match="compiled"):
            run(model, loop, prompts(2))
    # torch.compile's wrapper hands over the model as it is, which runs eagerly.
    out = run(torch.compile(model_of(), backend="eager"), RecursionDecoding(sigma=0.3, seed=SEED), prompts(2))
    assert torch.equal(out.sequences, run(model_of(), RecursionDecoding(sigma=0.3, seed=SEED), prompts(2)).sequences)


def test_nothing_is_compiled_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU transformers compiles by itself where the cache is static; here as if this were one.
    model = hrm()
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, _, config: not config.disable_compile)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *_: pytest.fail("a compiled forward pass"))
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    for mode in ("static", "static-chunked"):
        out = run(model, loop, prompts(2), **MODES[mode])
        assert torch.equal(out.sequences, run(model_of(), loop, prompts(2)).sequences)


class Fails(LogitsProcessor):
    """Fails at the third token, or leaves no token there."""

    def __init__(self, *, mask: bool = False) -> None:
        self.mask = mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 10 and not self.mask:
            raise RuntimeError("a processor's own")
        return scores.fill_(-torch.inf) if input_ids.shape[1] == 10 else scores


def test_nothing_stays_on_the_model() -> None:
    model, ids = hrm(), prompts(2)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    for processor, error in ((Fails(), RuntimeError), (Fails(mask=True), NumericalError)):
        with pytest.raises(error):
            run(model, loop, ids, logits_processor=[processor])
        assert hooks_of(model) == 0

    def bad(_: list[int]) -> float:
        raise KeyError("a verifier's own")

    with pytest.raises(KeyError, match="verifier"):
        run(model, RecursionDecoding(sigma=0.3, select=bad), ids)
    first = run(model, loop, ids).sequences
    assert hooks_of(model) == 0
    twin = copy.deepcopy(model)
    assert hooks_of(twin) == 0
    assert torch.equal(run(twin, loop, ids).sequences, first)
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **plain), hrm().generate(ids, **plain))


class Meddles(LogitsProcessor):
    """Runs the model for a row of its own meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.model(input_ids=input_ids[:1])
        return scores


def test_another_forward_pass_of_the_model_is_refused() -> None:
    model = hrm()
    with pytest.raises(UnsupportedModeError, match="another thread"):
        run(model, RecursionDecoding(sigma=0.3), prompts(2), logits_processor=[Meddles(model)])
    assert hooks_of(model) == 0
