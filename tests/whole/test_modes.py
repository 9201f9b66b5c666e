"""Every mode of generate() × every family × both doors, against the cache-free reference.

Tokens must be equal; and where a mode can show its raw logits, those too, prefix by prefix, so that a mode cannot pass
because the argmax happened to agree.
"""

from typing import Any

import pytest
import torch
import transformers
from support.reference import Reference
from support.tiny import BOS, EOS, PAD, build, shared, tokenizer
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.models.members.cache_name import CACHE

ALPHA = 0.7
NEW = 14  # with prompts of 12: past the sliding window of 8, in the prompt and in the generated text
# Base and companions never of one family, and companions both narrower (250) and wider (262) than the base (256).
FAMILIES = {
    "llama": ("llama", "gpt2", 250),
    "qwen3_5": ("qwen3_5", "mistral", 262),  # recurrent layers in the base
    "gpt2": ("gpt2", "gemma3", 250),
    "mistral": ("mistral", "jamba", 262),  # and in the companions
    "gemma3": ("gemma3", "qwen3", 250),
}
SMOKE = [pytest.param(f, marks=pytest.mark.smoke) if f in ("llama", "gemma3") else f for f in FAMILIES]


class Setup:
    """The members of one family combination, the two doors to them, and the reference."""

    def __init__(self, family: str) -> None:
        base, small, vocab = FAMILIES[family]
        self.members: list[PreTrainedModel] = [shared(base, 1), shared(small, 2, vocab), shared(small, 3, vocab)]
        self.base, self.expert, self.antiexpert = self.members
        self.model: ProxyTunedModel = proxytune.wrap(
            self.base, expert=self.expert, antiexpert=self.antiexpert, alpha=ALPHA, check_vocabulary=False
        )
        self.reference = Reference(self.members, ALPHA)
        self.known: dict[Any, torch.Tensor] = {}

    def processor(self, **kwargs: Any) -> ProxyTuningLogitsProcessor:
        return ProxyTuningLogitsProcessor(self.expert, self.antiexpert, ALPHA, check_vocabulary=False, **kwargs)


@pytest.fixture(scope="module", params=SMOKE)
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


def prompts(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 240, (rows, length), generator=generator)


def padded(pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded at the left."""
    ids, mask = prompts(3), torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = pad, 0
    return ids, mask


# Every decoding loop of generate() that is not a custom one, and the settings that change what a step is asked for.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9},
    "plain-sampling": {"do_sample": True, "top_k": 0},
    "beam-4": {"do_sample": False, "num_beams": 4},
    "beam-sampling": {"do_sample": True, "num_beams": 4, "top_k": 0},
    "beam-4-return-3": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "return-3": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "beam-penalties": {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.3},
    "static-cache": {"do_sample": False, "cache_implementation": "static"},
    "chunked-prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "chunked-static": {"do_sample": False, "prefill_chunk_size": 5, "cache_implementation": "static"},
    "no-cache": {"do_sample": False, "use_cache": False},
    "no-cache-sampling": {"do_sample": True, "use_cache": False},
}
# What only concerns how the cache is kept must not change the result; the reference has none.
CACHE_ONLY = ("cache_implementation", "prefill_chunk_size", "use_cache")


def expected(setup: Setup, ids: torch.Tensor, mask: torch.Tensor, mode: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """What the reference generates; modes that differ in their cache alone share it."""
    settings = {k: v for k, v in mode.items() if k not in CACHE_ONLY}
    key = (str(ids.tolist()), str(mask.tolist()), str(sorted(settings.items())))
    if kwargs or key not in setup.known:
        torch.manual_seed(7)
        out = setup.reference.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings, **kwargs)
        if kwargs:
            return out
        setup.known[key] = out
    return setup.known[key].clone()


def run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **kwargs)


def assert_logits(setup: Setup, out: Any, mask: torch.Tensor) -> None:
    """The raw logits of every step equal those of the cache-free reference on that very prefix."""
    start = mask.shape[1]
    assert len(out.logits) == out.sequences.shape[1] - start
    for step, logits in enumerate(out.logits):
        for row, ids in enumerate(out.sequences[:, : start + step]):
            if (ids[start:] == EOS).any():
                continue  # what follows a finished row is padding
            kept = torch.cat([ids[:start][mask[row].bool()], ids[start:]])
            want = setup.reference.after(kept)
            assert torch.isfinite(want[:240]).all()
            torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_both_doors_equal_the_reference(setup: Setup, mode: str, padding: str) -> None:
    ids, mask = padded(PAD) if padding == "left" else (prompts(), torch.ones(2, 12, dtype=torch.long))
    want = expected(setup, ids, mask, MODES[mode])
    assert torch.equal(run(setup.model, ids, mask, **MODES[mode]), want)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, **MODES[mode]), want)
    if "repetition_penalty" not in MODES[mode]:  # dropped in, the shift comes after the penalties: another law
        dropped_in = [setup.processor(attention_mask=mask)]
        assert torch.equal(run(setup.base, ids, mask, logits_processor=dropped_in, **MODES[mode]), want)


@pytest.mark.parametrize("mode", ["greedy", "plain-sampling", "static-cache", "chunked-prefill", "no-cache"])
def test_raw_logits_equal_the_reference(setup: Setup, mode: str) -> None:
    ids, mask = padded(PAD)
    show = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    out = run(setup.model, ids, mask, **MODES[mode], **show)
    assert_logits(setup, out, mask)
    with setup.processor().attach(setup.base):
        steered = run(setup.base, ids, mask, **MODES[mode] | {"top_k": 0}, **show)
    # On the processor door the raw logits are the base's; the first thing that happens to them is the shift.
    for ours, theirs in zip(out.logits, steered.scores, strict=True):
        torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-4)


# Sampling is compared logit by logit: which random number goes to which token is the assisted loop's own affair.
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("draft", ["third-model", "wider-draft-proposals", "prompt-lookup"])
def test_assisted_decoding(setup: Setup, draft: str, do_sample: bool) -> None:
    if (
        draft == "wider-draft-proposals"
        and setup.base.config.model_type.startswith("gemma3")
        and transformers.__version__.startswith("5.17.")
    ):
        pytest.skip("transformers 5.17 itself fails with a Gemma 3 as the draft, also of another Gemma 3")
    # The text repeats, so that prompt lookup has something to find.
    ids = prompts(1, 6).repeat(1, 3)
    mask = torch.ones_like(ids)
    if draft == "prompt-lookup":
        assist: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    else:
        # The base itself as the draft proposes ids that narrower companions cannot embed; a third model, noise.
        assist = {"assistant_model": setup.base if draft == "wider-draft-proposals" else build("llama", 9)}
        assist["assistant_model"].generation_config.num_assistant_tokens = 4
    show = {"output_logits": True, "return_dict_in_generate": True}
    out = run(setup.model, ids, mask, do_sample=do_sample, **assist, **show)
    assert_logits(setup, out, mask)
    if do_sample:
        return
    want = expected(setup, ids, mask, {"do_sample": False})
    assert torch.equal(out.sequences, want)
    if setup.base._is_stateful:
        with (
            setup.processor().attach(setup.base),
            pytest.raises(ValueError, match="assisted generation is not supported with stateful models"),
        ):
            run(setup.base, ids, mask, do_sample=False, **assist)
        return
    if draft == "wider-draft-proposals":
        assist["assistant_model"] = build(setup.base.config.model_type.removesuffix("_text"), 1)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, do_sample=False, **assist), want)
    assert torch.equal(
        run(setup.base, ids, mask, do_sample=False, logits_processor=[setup.processor()], **assist), want
    )


def test_padding_with_the_eos_token(setup: Setup) -> None:
    ids, mask = padded(EOS)
    want = expected(setup, ids, mask, {"do_sample": False}, pad_token_id=EOS)
    assert torch.equal(run(setup.model, ids, mask, do_sample=False, pad_token_id=EOS), want)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, do_sample=False, pad_token_id=EOS), want)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_prompt_that_starts_with_the_padding_token(setup: Setup, pad: int) -> None:
    # Row 0 begins with the padding token as text, row 1 is padded: only the mask can tell them apart.
    ids, mask = prompts(2), torch.ones(2, 12, dtype=torch.long)
    ids[0, :2] = pad
    ids[1, :4], mask[1, :4] = pad, 0
    want = expected(setup, ids, mask, {"do_sample": False}, pad_token_id=pad)
    assert torch.equal(run(setup.model, ids, mask, do_sample=False, pad_token_id=pad), want)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, do_sample=False, pad_token_id=pad), want)
    dropped_in = [setup.processor(attention_mask=mask)]
    got = run(setup.base, ids, mask, do_sample=False, pad_token_id=pad, logits_processor=dropped_in)
    assert torch.equal(got, want)


def test_without_a_mask_padding_is_inferred_as_generate_does(setup: Setup) -> None:
    ids, mask = padded(PAD)
    want = expected(setup, ids, mask, {"do_sample": False})
    assert torch.equal(run(setup.model, ids, None, do_sample=False), want)
    assert torch.equal(run(setup.base, ids, None, do_sample=False, logits_processor=[setup.processor()]), want)


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(setup: Setup) -> None:
    ids = prompts(1)
    mask = torch.ones_like(ids)
    want = expected(setup, ids, mask, {"do_sample": True})[0].tolist()
    streamer = Collector()
    run(setup.model, ids, mask, do_sample=True, streamer=streamer)
    assert streamer.tokens == want
    assert streamer.ended
    streamer = Collector()
    with setup.processor().attach(setup.base):
        run(setup.base, ids, mask, do_sample=True, streamer=streamer)
    assert streamer.tokens == want


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_conversation_with_the_cache_passed_in(setup: Setup, padding: str) -> None:
    ids, mask = padded(PAD) if padding == "left" else (prompts(), torch.ones(2, 12, dtype=torch.long))
    # No EOS: all rows live on into the next turn.
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    processor = setup.processor()
    cache, base_cache = None, None
    for turn in range(3):
        want = expected(setup, ids, mask, {"do_sample": False, "eos_token_id": None})
        out = run(setup.model, ids, mask, **{CACHE: cache}, **settings)
        assert torch.equal(out.sequences, want), f"turn {turn}"
        with processor.attach(setup.base):
            steered = run(setup.base, ids, mask, **{CACHE: base_cache}, **settings)
        assert torch.equal(steered.sequences, want), f"turn {turn}"
        cache, base_cache = out.past_key_values, steered.past_key_values
        said = prompts(ids.shape[0], 4, seed=10 + turn)
        ids = torch.cat([want, said], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def test_generation_goes_on_after_eos_of_one_row(setup: Setup) -> None:
    # Any token that row 0 produces early, taken as EOS: row 0 is padded from there, row 1 must not notice.
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    early = int(expected(setup, ids, mask, {"do_sample": False})[0, 14])
    want = expected(setup, ids, mask, {"do_sample": False}, eos_token_id=early)
    assert (want[0, 15:] == PAD).all()
    assert torch.equal(run(setup.model, ids, mask, do_sample=False, eos_token_id=early), want)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, do_sample=False, eos_token_id=early), want)


def test_constraints_hold_on_both_doors(setup: Setup) -> None:
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    allowed = [5, 17, 99]

    def only(batch: int, prefix: torch.Tensor) -> list[int]:
        return allowed

    want = expected(setup, ids, mask, {"do_sample": True}, prefix_allowed_tokens_fn=only)
    assert set(want[:, 12:].flatten().tolist()) <= set(allowed)
    assert torch.equal(run(setup.model, ids, mask, do_sample=True, prefix_allowed_tokens_fn=only), want)
    with setup.processor().attach(setup.base):
        assert torch.equal(run(setup.base, ids, mask, do_sample=True, prefix_allowed_tokens_fn=only), want)


def test_ids_that_a_member_cannot_embed_are_never_sampled() -> None:
    setup = Setup("llama")
    ids = prompts(1)
    out = run(setup.model, ids, None, do_sample=True, output_logits=True, return_dict_in_generate=True)
    assert all((z[:, 250:] == float("-inf")).all() and torch.isfinite(z[:, :250]).all() for z in out.logits)
    assert BOS < int(out.sequences.max()) < 250


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("width", [200, 250, 300])  # narrower than all, as the companions, wider than the base's 256
def test_a_draft_of_another_width(setup: Setup, width: int, do_sample: bool) -> None:
    draft, ids = build("llama", 9, width), prompts(1) % 200
    draft.generation_config.num_assistant_tokens = 4
    show = {"output_logits": True, "return_dict_in_generate": True}
    out = run(setup.model, ids, None, do_sample=do_sample, assistant_model=draft, **show)
    assert_logits(setup, out, torch.ones_like(ids))
    if not do_sample:
        assert torch.equal(out.sequences, expected(setup, ids, torch.ones_like(ids), {"do_sample": False}))


def test_classifier_free_guidance_steers_both_branches(setup: Setup) -> None:
    ids, scale = prompts(1), 1.7
    got = run(setup.model, ids, None, do_sample=False, guidance_scale=scale)
    # 2306.17806: the unconditional branch starts from the last prompt token.
    want = ids
    for _ in range(NEW):
        conditional = setup.reference.after(want[0]).log_softmax(-1)
        unconditional = setup.reference.after(want[0, ids.shape[1] - 1 :]).log_softmax(-1)
        scores = (scale * (conditional - unconditional) + unconditional).nan_to_num(nan=float("-inf"))
        want = torch.cat([want, scores.argmax()[None, None]], 1)
        if int(want[0, -1]) == EOS:
            break
    assert torch.equal(got, want)


def test_forward_counts_positions_by_the_mask(setup: Setup) -> None:
    """A left-padded forward without position_ids: learned positions would otherwise count the padding."""
    ids, mask = padded(PAD)
    with torch.no_grad():
        first = setup.model(ids[:, :9], attention_mask=mask[:, :9])
        rest = setup.model(ids[:, 9:], attention_mask=mask, **{CACHE: first.past_key_values})
    for row in range(3):
        want = setup.reference.after(ids[row][mask[row].bool()])
        torch.testing.assert_close(rest.logits[row, -1], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral's window has to be recorded to be rolled back
def test_the_composed_model_as_a_draft(family: str) -> None:
    setup, target = Setup(family), build("qwen3", 21)
    ids = prompts(1)
    want = run(target, ids, None, do_sample=False)
    setup.model.generation_config.num_assistant_tokens = 4
    setup.model.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(run(target, ids, None, do_sample=False, assistant_model=setup.model), want)
    assert setup.model.token_forwards["expert"] > 12, "the draft was asked"


def test_stop_strings(setup: Setup) -> None:
    ids = prompts(1)
    want = expected(setup, ids, torch.ones_like(ids), {"do_sample": False})
    # A random model's bytes are seldom text: the first new token that is a letter or a sign of its own.
    letters = [tokenizer().decode(t) for t in want[0]]
    first = next(t for t in range(12, 26) if letters[t].isascii() and letters[t].isprintable())
    stop = letters[first]
    got = run(setup.model, ids, None, do_sample=False, stop_strings=[stop], tokenizer=tokenizer())
    assert torch.equal(got, want[:, : first + 1])
    with setup.processor().attach(setup.base):
        got = run(setup.base, ids, None, do_sample=False, stop_strings=[stop], tokenizer=tokenizer())
    assert torch.equal(got, want[:, : first + 1])
