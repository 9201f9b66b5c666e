"""Latent steps on a GPU: the CPU's tokens, compiled static caches, and steps in which the host does not wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import EOS, PAD, build

from proxytune import FusedDecoding, LatentDecoding
from proxytune.methods.latent import LatentGates, LatentMixture
from proxytune.methods.latent.steps import LatentSteps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 240, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = PAD, 0
    return ids, mask


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, **kwargs)


@pytest.mark.parametrize("kind", ["onehot", "moi", "gumbel", "dirichlet", "multiplex", "gaussian"])
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "none", "beams"])
def test_the_tokens_are_those_of_the_cpu(kind: Any, settings: dict[str, Any]) -> None:
    ids, mask = prompts()
    # float64: the devices' float32 rounding would be fed back. The weights themselves are float32 on both.
    model = build("llama", 1).double()
    sampler = LatentDecoding(kind, seed=5)
    want = run(model, ids, mask, **settings, custom_generate=sampler)
    got = run(model.cuda(), ids.cuda(), mask.cuda(), **settings, custom_generate=sampler)
    assert torch.equal(got.cpu(), want)


def test_a_compiled_static_cache_gives_the_same_tokens() -> None:
    ids, mask = (x.cuda() for x in prompts())
    model = build("llama", 1).cuda()
    sampler = LatentDecoding("gumbel", seed=5)
    want = run(model, ids, mask, cache_implementation="static", disable_compile=True, custom_generate=sampler)
    assert torch.equal(run(model, ids, mask, cache_implementation="static", custom_generate=sampler), want)


@pytest.mark.parametrize("kind", ["gumbel", "dirichlet", "multiplex", "moi"])
def test_nothing_waits_for_the_device_in_a_step(kind: Any) -> None:
    model = build("llama", 1).cuda()
    ids = prompts()[0].cuda()
    gates = LatentGates(begin_ids=[7], end_ids=[8, 9], min_entropy=0.1, dwell=2, max_run=5, discrete_ids=[PAD, EOS])
    feedback = LatentSteps(model, LatentMixture(kind=kind, sigma=0.1), gates, seed=3, lengths=12)
    scores = model(ids).logits[:, -1].float()
    feedback.capture(ids, scores)  # the first makes what stays on the device
    for step in range(3):
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
        inputs = {"input_ids": ids[:, -1:]}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            fed = feedback.feed(inputs, ids)
            feedback.capture(ids, scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert fed["inputs_embeds"].isfinite().all()


def test_a_row_of_a_batch_can_be_drawn_again() -> None:
    ids, mask = (x.cuda() for x in prompts())
    model = build("llama", 1).double().cuda()
    settings = {"do_sample": True, "top_k": 0}
    both = LatentDecoding("gumbel", seed=4, loop=FusedDecoding(seed=9))
    alone = LatentDecoding("gumbel", seed=4, stream_ids=[2], loop=FusedDecoding(seed=9, stream_ids=[2]))
    together = run(model, ids, mask, **settings, custom_generate=both)
    again = run(model, ids[2:], mask[2:], **settings, custom_generate=alone)
    assert torch.equal(again[0], together[2, : again.shape[1]])
