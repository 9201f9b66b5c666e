"""Stochastic recursion of models that run over some of their layers several times."""

from __future__ import annotations

import pytest
import torch
from support.looped import looped, shared, thought
from support.recursion import CLOSE, MODES, NEW, SEED, How, hooks_of, padded, run

from proxytune import RecursionDecoding
from proxytune.errors import UnsupportedModelError
from proxytune.methods.recursion.adapters import LoopedRecursion, recursion_of


@pytest.mark.parametrize(("kind", "mode"), [("inkling", "chunked"), ("dory", "cache"), ("dory", "no-cache")])
def test_every_trajectory_is_that_of_the_reference(kind: str, mode: str) -> None:
    dtype = torch.float64 if kind == "dory" else torch.float32  # the other routes in float32
    model, (ids, mask) = shared(kind, dtype=dtype), padded()
    assert isinstance(recursion_of(model), LoopedRecursion)
    loop = RecursionDecoding(sigma=0.3, when=(0, 2), trajectories=[0, 5], seed=SEED, select=None)
    out = run(model, loop, ids, mask, **MODES[mode])
    greedy = run(model, RecursionDecoding(sigma=0.0, trajectories=1, seed=SEED), ids, mask)
    assert not torch.equal(out.trajectories.sequences[:, 0], greedy.sequences)  # the noise matters
    for b, number in ((0, 5), (1, 0))[kind == "inkling" :]:  # it is slow
        i, text, total = [0, 5].index(number), ids[b][mask[b].bool()].tolist(), 0.0
        for token in out.trajectories.sequences[b, i, ids.shape[1] :].tolist():
            logits = thought(model, text, How(at=(0, 2), row=b, trajectory=number))
            assert int(logits.argmax()) == token
            total += float(logits.log_softmax(-1)[token])
            text.append(token)
        assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(total / NEW, abs=CLOSE)
    assert hooks_of(model) == 0


def test_passes_that_cannot_be_told_apart() -> None:
    model = looped("dory", recurrent_kv_cache_mode="last_loop")
    with pytest.raises(UnsupportedModelError, match='recurrent_kv_cache_mode="per_loop"'):
        run(model, RecursionDecoding(sigma=0.1, trajectories=2), padded()[0])
