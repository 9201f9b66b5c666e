"""Vision-language bases with text-only companions: the base sees the images, the companions read the text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import shared
from support.vision import PICTURE, TEXT, VOCAB, SeeingReference, prompts, seeing
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    StaticCache,
)

import proxytune
from proxytune import FusedDecoding, LatentDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import CacheError, InputError, RecipeError, UnsupportedModeError
from proxytune.methods.latent import LatentLogitsProcessor, LatentMixture
from proxytune.methods.speculation import PromptLookupDraft
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
        ("qwen2_5_vl", MANY, "qwen3_next"),  # a state of all tokens, which cannot skip any later on
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


def test_placeholders_cost_companions_nothing_and_need_no_embedding() -> None:
    given, model = prompts("llava", *RAGGED), composed("llava", vocab=PICTURE)
    # The ids around an image are text, which all members have to embed.
    given["input_ids"] = given["input_ids"].where(given["input_ids"] <= PICTURE, 11)
    slow = SeeingReference([m.model for m in model.members], 0.7, "llava", given)
    out = generate(model, given, {})
    torch.testing.assert_close(out.sequences, generate(slow, text_of(given), {}).sequences, rtol=0, atol=0)
    (_, width), text = given["input_ids"].shape, 7
    assert model.token_forwards == {"base": 2 * (width + NEW - 1)} | dict.fromkeys(
        ("expert", "antiexpert"), 2 * (text + NEW - 1)
    )
    with attached(model) as processor:
        generate(model.base, given, {})
    assert processor.token_forwards["expert"] == 2 * (text + NEW - 1)


@FAMILIES
def test_fused_decoding_sees(kind: str) -> None:
    given, model = prompts(kind, *RAGGED), composed(kind)
    out, fused = generate(model, given, {}), {"custom_generate": FusedDecoding()}
    torch.testing.assert_close(generate(model, given, fused).sequences, out.sequences, rtol=0, atol=0)
    with attached(model):
        torch.testing.assert_close(generate(model.base, given, fused).sequences, out.sequences, rtol=0, atol=0)
        alone = prompts(kind, RAGGED[0])
        drafted = generate(model.base, alone, {"prompt_lookup_num_tokens": 2}).sequences
    torch.testing.assert_close(drafted, generate(model, alone, {}).sequences, rtol=0, atol=0)


def test_text_after_images_has_its_own_positions() -> None:
    """The base keeps the offsets of its last images, which a text in a loop of one's own must not get."""
    model, ids = composed("qwen2_5_vl"), torch.tensor([[1, 5, 6, 7, 8, 9]])
    model.generate(**prompts("qwen2_5_vl", RAGGED[0]), **PLAIN)
    assert model.base.model.rope_deltas.any()
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        parts = torch.cat([first.logits, model(ids[:, 4:], **{CACHE: cache_of(first)}).logits], 1)
        torch.testing.assert_close(parts, model(ids).logits)
    as_companion = proxytune.wrap(
        model.expert, expert=model.base, antiexpert=model.antiexpert, alpha=0.7, check_vocabulary=False
    )
    with torch.no_grad():
        first = as_companion(ids[:, :4], use_cache=True)
        parts = torch.cat([first.logits, as_companion(ids[:, 4:], **{CACHE: cache_of(first)}).logits], 1)
        torch.testing.assert_close(parts, as_companion(ids).logits)


def test_a_companion_that_could_see_reads_the_text() -> None:
    base, blind = seeing("llava"), shared("llama", 12, VOCAB)
    model = proxytune.wrap(base, expert=seeing("qwen2_5_vl"), antiexpert=blind, alpha=0.7, check_vocabulary=False)
    given = prompts("llava", *RAGGED)
    slow = SeeingReference([m.model for m in model.members], 0.7, "llava", given)
    out = generate(model, given, {})
    torch.testing.assert_close(out.sequences, generate(slow, text_of(given), {}).sequences, rtol=0, atol=0)


def test_a_text_beside_images_is_the_text() -> None:
    """A processor returns types of tokens without images, too."""
    model, ids = composed("qwen2_5_vl"), torch.tensor([[1, 5, 6, 7]])
    typed = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    out = generate(model, {"input_ids": ids}, BEAMS)
    torch.testing.assert_close(generate(model, typed, BEAMS).sequences, out.sequences, rtol=0, atol=0)


LOOPS = [
    SpeculativeDecoding(),
    ForkDecoding(threshold=1.0),
    SiblingDecoding(threshold=1.0),
    LatentDecoding(LatentMixture(kind="gumbel")),
]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        *(({"custom_generate": loop}, type(loop).__name__) for loop in LOOPS),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"position_ids": torch.arange(12)[None]}, "position_ids"),
    ],
)
def test_other_modes_are_refused_before_anything_runs(more: dict[str, Any], named: str) -> None:
    model, given = composed("llava"), prompts("llava", RAGGED[0])
    with pytest.raises(UnsupportedModeError, match=named):
        model.generate(**given, **(PLAIN | more))
    assert set(model.token_forwards.values()) == {0}


def test_the_expert_as_draft_is_refused() -> None:
    model = composed("llava")
    with pytest.raises(UnsupportedModeError, match="assisted generation"):
        model.generate(**prompts("llava", RAGGED[0]), **PLAIN, assistant_model=model.expert)


def test_loops_on_a_base_alone_refuse_images() -> None:
    base, given = seeing("llava"), prompts("llava", RAGGED[0])
    with pytest.raises(UnsupportedModeError, match="SiblingDecoding"):
        base.generate(**given, **PLAIN, custom_generate=SiblingDecoding(threshold=1.0))
    latent = LatentLogitsProcessor(LatentMixture(kind="gumbel"))
    with latent.attach(base), pytest.raises(UnsupportedModeError, match="images"):
        base.generate(**given, **PLAIN)


def test_a_cache_with_images_is_not_continued() -> None:
    model, given = composed("llava"), prompts("llava", RAGGED[0])
    out = generate(model, given, {})
    for more in ({}, {"pixel_values": given["pixel_values"]}):
        with pytest.raises((CacheError, UnsupportedModeError), match="images"):
            model.generate(out.sequences, **PLAIN, **{CACHE: cache_of(out)}, **more)
    with pytest.raises(CacheError, match="images"):
        model(out.sequences[:, -1:], **{CACHE: cache_of(out)})
    with attached(model):
        first = generate(model.base, given, {})
        with pytest.raises(UnsupportedModeError, match="images"):
            model.base.generate(first.sequences, **PLAIN, **{CACHE: cache_of(first)})
    generate(model, given, {CACHE: DynamicCache()})
    with pytest.raises(UnsupportedModeError, match="StaticCache"):
        generate(model, given, {CACHE: StaticCache(config=model.config, max_cache_len=32)})


def test_images_in_wrong_places() -> None:
    model, given = composed("llava"), prompts("llava", RAGGED[0])
    blind = proxytune.wrap(
        shared("llama", 13, VOCAB), expert=model.expert, antiexpert=model.antiexpert, check_vocabulary=False
    )
    with pytest.raises(InputError, match="pixel_values: expected text only.*AutoModelForImageTextToText"):
        blind.generate(**given, **PLAIN)
    with pytest.raises(UnsupportedModeError, match="forward"):
        model(**given)
    with pytest.raises(InputError, match="output_attentions"):
        model.generate(**given, **PLAIN, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="tokens.*features"):  # the base's own error
        model.generate(**(given | {"pixel_values": given["pixel_values"].repeat(2, 1, 1, 1)}), **PLAIN)
    with pytest.raises(ValueError, match="pixel_value"):  # a misspelt name is none of the base's
        model.generate(**text_of(given), pixel_value=given["pixel_values"], **PLAIN)
    only = {**given, "input_ids": torch.full((1, 4), PICTURE), "attention_mask": torch.ones(1, 4).long()}
    masked = ProxyTuningLogitsProcessor(
        model.expert, model.antiexpert, check_vocabulary=False, attention_mask=given["attention_mask"]
    )
    for generating in (model, model.base):
        with attached(model), pytest.raises(InputError, match="some text in each row"):
            generating.generate(**only, **PLAIN)
    with masked.attach(model.base), pytest.raises(InputError, match="Pass it to generate"):
        model.base.generate(**given, **PLAIN)


@pytest.mark.skipif(hasattr(GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation"), reason="encoded before")
def test_images_that_would_go_to_the_wrong_rows() -> None:
    """transformers 5.17 repeats each of several images by itself."""
    model, given = composed("llava"), prompts("llava", *MANY)
    for generating in (model, model.base):
        with attached(model), pytest.raises(UnsupportedModeError, match="3 pixel_values for 2 of 2 prompts"):
            generate(generating, given, BEAMS)
    generate(model, given, {})


def test_layers_that_attend_to_images_hold_no_text() -> None:
    """Mllama leaves them out of a text's passes, so their cache stays empty."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "max_num_tiles": 1}
    vision |= {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
    text = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = MllamaConfig(vision_config=vision, text_config={**TEXT, **text}, image_token_index=PICTURE)
    base = MllamaForConditionalGeneration(config).eval()
    model = proxytune.wrap(
        base,
        expert=shared("llama", 11, VOCAB),
        antiexpert=shared("llama", 12, VOCAB),
        alpha=0.0,
        check_vocabulary=False,
    )
    given = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    out, alone = generate(model, given, BEAMS), generate(base, given, BEAMS)
    torch.testing.assert_close(out.sequences, alone.sequences, rtol=0, atol=0)


def test_the_types_of_a_text_alone_are_no_images() -> None:
    """A processor gives `mm_token_type_ids` with every text."""
    model = proxytune.wrap(
        seeing("qwen2_5_vl"), expert=shared("llama", 11, VOCAB), antiexpert=shared("llama", 12, VOCAB),
        check_vocabulary=False,
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 6, 7, 5, 6]])
    types = {"mm_token_type_ids": torch.zeros_like(ids)}
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    for more in ({}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        assert torch.equal(model.generate(ids, **asked, **more, **types), model.generate(ids, **asked, **more))
    assert torch.equal(model(ids, **types).logits, model(ids).logits)


def test_speculation_on_the_text_of_a_model_that_could_see() -> None:
    model, ids = seeing("llava"), torch.tensor([[1, 5, 6, 7, 5, 6]])
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    loop = SpeculativeDecoding(draft=PromptLookupDraft(1, 1))
    assert torch.equal(model.generate(ids, **asked, custom_generate=loop), model.generate(ids, **asked))


def test_a_recipe_keeps_no_base_that_it_would_open_as_another(tmp_path: Path) -> None:
    folders = {}
    for role, member in {"base": seeing("llava"), "expert": shared("llama", 11, VOCAB)}.items():
        folders[role] = str(tmp_path / role)
        member.save_pretrained(folders[role])
    base = LlavaForConditionalGeneration.from_pretrained(folders["base"])
    model = proxytune.wrap(base, expert=folders["expert"], antiexpert=base, alpha=0.5, check_vocabulary=False)
    with pytest.raises(RecipeError, match="a LlavaForConditionalGeneration, which it does not open"):
        model.save_pretrained(tmp_path / "recipe")
