"""Latent steps in every mode of generate() × every family, against the cache-free reference; and what is refused.

Models are in float64: a mixture is fed back in full precision, so rounding that a discrete token would absorb goes on.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from support.latent_reference import LatentReference, warp
from support.tiny import BOS, EOS, PAD, build
from transformers import (
    PreTrainedModel,
)

import proxytune
from proxytune import LatentDecoding
from proxytune.methods.latent.mixture import Kind

KINDS = get_args(Kind)
NEW = 10  # with prompts of 12: past the sliding window of 8, in the prompt and in the generated text
SPECIAL = (PAD, BOS, EOS)
FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma3", "mamba", "lfm2")
COMPOSED = {"llama": ("llama", "gpt2", 250), "gemma3": ("gemma3", "qwen3", 262)}
WARPED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": WARPED,
    "plain-sampling": {"do_sample": True, "top_k": 0},
    "return-3": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beam-4": {"num_beams": 4},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "beam-3-return-2": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no-cache": {"use_cache": False},
    "no-cache-beam": {"use_cache": False, "num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 5},
    "chunked-static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
}
CACHE_ONLY = ("cache_implementation", "prefill_chunk_size", "use_cache")
NO_CHUNKS = ("mamba",)  # transformers chunks no prompt without an attention cache


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded at the left."""
    ids = torch.randint(3, 240, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: build(family, 1).double() for family in FAMILIES}


@pytest.fixture(scope="module", params=[pytest.param(f, marks=pytest.mark.smoke) for f in COMPOSED])
def composed(request: pytest.FixtureRequest) -> tuple[proxytune.ProxyTunedModel, list[PreTrainedModel]]:
    base, small, vocab = COMPOSED[request.param]
    members = [build(base, 1).double(), build(small, 2, vocab).double(), build(small, 3, vocab).double()]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], alpha=0.7, check_vocabulary=False)
    return model, members


def run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, **kwargs})


def reference_of(members: list[PreTrainedModel], mode: dict[str, Any], **settings: Any) -> LatentReference:
    warped = {k: v for k, v in mode.items() if k in ("temperature", "top_k", "top_p")} if mode.get("do_sample") else {}
    if mode.get("do_sample"):
        warped.setdefault("top_k", 50)  # transformers' default
    return LatentReference(members, 0.7, prompt=12, warp=warp(**warped), discrete=SPECIAL, **settings)


def uncached(mode: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in mode.items() if k not in CACHE_ONLY}


# --- what is fed back is what the definitions say ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["greedy", "sampling", "return-3", "no-cache", "static-cache"])
@pytest.mark.smoke
def test_tokens_and_logits_are_those_of_the_reference(
    models: dict[str, PreTrainedModel], kind: Kind, mode: str
) -> None:
    ids, mask = padded()
    settings = MODES[mode]
    sigma = {"sigma": 0.1} if kind == "gaussian" else {}
    expected = reference_of([models["llama"]], settings, kind=kind, seed=5, **sigma)
    show = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 7}
    want = run(expected, ids, mask, **uncached(settings), **show)
    # As float32 log-probabilities of about 5 are off; those of Gamma variates of small shapes reach −100.
    nudge = 2.0**-17 if kind == "dirichlet" else 2.0**-21
    nudged = reference_of([models["llama"]], settings, kind=kind, seed=5, nudged=nudge, **sigma)
    off = run(nudged, ids, mask, **uncached(settings), **show)
    got = run(models["llama"], ids, mask, **settings, **show, custom_generate=LatentDecoding(kind, seed=5))
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(off.sequences, want.sequences)
    room = 0.0
    live = (got.sequences[:, 12:] == EOS).cumsum(1) == 0
    for step, (ours, theirs, nearby) in enumerate(zip(got.logits, want.logits, off.logits, strict=True)):
        row = torch.ones(len(ours), dtype=torch.bool) if step == 0 else live[:, step - 1]
        assert theirs[row].isfinite().all()
        # Weights are float32, and the model magnifies what they are off by, about threefold in each step: no more than
        # four times what a reference is off whose weights were moved as much.
        room = max(room, float((nearby - theirs)[row].abs().max()))
        assert float((ours - theirs)[row].abs().max()) <= 4 * room + 1e-5
    if kind == "onehot":
        return
    plain = run(models["llama"], ids, mask, **settings, **show)
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(got.logits[1:], plain.logits[1:], strict=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_every_family_is_that_of_the_reference(
    models: dict[str, PreTrainedModel], family: str, mode: str
) -> None:
    if family in NO_CHUNKS and ("chunk" in mode or "static" in mode):
        pytest.skip("transformers itself refuses this mode")
    model, settings = models[family], MODES[mode]
    ids, mask = padded()
    if family == "mamba":  # a recurrent state reads the padding too
        ids, mask = ids[:1], mask[:1]
    # Penalties change what p is made of: a law that is a function of the text, and the scores are asked for.
    if "repetition_penalty" in settings:
        sampler = LatentDecoding("moi")
        with_cache = run(model, ids, mask, **settings, custom_generate=sampler)
        without = run(model, ids, mask, **settings, use_cache=False, custom_generate=sampler)
        assert torch.equal(with_cache, without)
        return
    # With beams, which stream a text draws from depends on its place: there a law without noise.
    kind: Kind = "moi" if "num_beams" in settings else "gumbel"
    want = run(reference_of([model], settings, kind=kind, seed=5), ids, mask, **uncached(settings))
    got = run(model, ids, mask, **settings, custom_generate=LatentDecoding(kind, seed=5))
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_every_member_of_a_composition_gets_the_mixture_of_its_own_embeddings(
    composed: tuple[proxytune.ProxyTunedModel, list[PreTrainedModel]], mode: str
) -> None:
    model, members = composed
    ids, mask = padded()
    settings = uncached(MODES[mode]) if "repetition_penalty" in MODES[mode] else MODES[mode]
    if "repetition_penalty" in settings:
        pytest.skip("compared with and without a cache for plain models")
    kind: Kind = "mean" if "num_beams" in settings else "dirichlet"
    want = run(reference_of(members, settings, kind=kind, seed=3), ids, mask, **uncached(settings))
    got = run(model, ids, mask, **settings, custom_generate=LatentDecoding(kind, seed=3))
    assert torch.equal(got, want)
