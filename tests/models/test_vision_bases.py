"""Vision-language bases with text-only companions: the base sees the images, the companions read the text alone."""

from typing import Any

import pytest
import torch
from support.tiny import shared
from support.vision import PICTURE, VOCAB, SeeingReference, prompts, seeing
from transformers import DynamicCache, StaticCache

import proxytune
from proxytune import FusedDecoding, LatentDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import CacheError, InputError, UnsupportedModeError
from proxytune.methods.latent import LatentLogitsProcessor, LatentMixture
from proxytune.methods.trees import ForkDecoding, SiblingDecoding
from proxytune.models.members.cache_name import CACHE, cache_of

NEW = 6
# Rows of different lengths, one of them without an image; then two images in a row, and an image at its end.
RAGGED = ([1, 5, 6, -1, 7, 8], [1, 9, 10])
MANY = ([1, 5, -1, 7, -1, 6], [1, 4, -1])
# A placeholder that the model drew by itself would stand for no image.
PLAIN: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "suppress_tokens": list(range(PICTURE, VOCAB)),
}
GREEDY = {"output_logits": True}
SAMPLED = {"do_sample": True, "num_return_sequences": 2}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
MODES = pytest.mark.parametrize("mode", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampling", "beams"])
FAMILIES = pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])


def composed(kind: str, alpha: float = 0.7, *, text: str = "llama", vocab: int = VOCAB) -> proxytune.ProxyTunedModel:
    expert, antiexpert = shared(text, 11, vocab), shared(text, 12, vocab)
    return proxytune.wrap(seeing(kind), expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


def generate(model: Any, given: dict[str, Any], mode: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return model.generate(**given, **(PLAIN | mode), return_dict_in_generate=True, output_scores=True)


def attached(model: proxytune.ProxyTunedModel) -> ProxyTuningLogitsProcessor:
    processor = ProxyTuningLogitsProcessor(model.expert, model.antiexpert, model.alpha, check_vocabulary=False)
    return processor.attach(model.base)


@FAMILIES
@MODES
def test_off_is_the_base_alone_to_the_bit(kind: str, mode: dict[str, Any]) -> None:
    given, model = prompts(kind, *RAGGED), composed(kind, 0.0)
    out, alone = generate(model, given, mode), generate(model.base, given, mode)
    torch.testing.assert_close(out.sequences, alone.sequences, rtol=0, atol=0)
    torch.testing.assert_close(out.scores, alone.scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "rows", "text"),
    [
        ("llava", RAGGED, "gemma3"),  # windows of eight tokens, of which the placeholders take none
        ("qwen2_5_vl", RAGGED, "gpt2"),
        ("qwen2_5_vl", MANY, "llama"),
    ],
)
@MODES
def test_both_doors_are_the_slow_reference(kind: str, rows: Any, text: str, mode: dict[str, Any]) -> None:
    given, model = prompts(kind, *rows), composed(kind, text=text)
    slow = generate(SeeingReference([m.model for m in model.members], 0.7, kind, given), text_of(given), mode)
    out = generate(model, given, mode)
    torch.testing.assert_close(out.sequences, slow.sequences, rtol=0, atol=0)
    if "num_beams" in mode:
        torch.testing.assert_close(out.sequences_scores, slow.sequences_scores, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(out.scores, slow.scores, rtol=0, atol=1e-4)
    with attached(model):
        by_processor = generate(model.base, given, mode)
    torch.testing.assert_close(by_processor.sequences, slow.sequences, rtol=0, atol=0)


def text_of(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}
