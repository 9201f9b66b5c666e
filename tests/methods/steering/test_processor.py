"""The processor door's own business: whose mask counts, what it returns, one processor for many calls."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import EOS, PAD, build, shared
from transformers import LogitsProcessor, PreTrainedModel

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import InputError, SteeringWarning

ALPHA = 0.7
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def members() -> list[PreTrainedModel]:
    return [shared("llama", 1), shared("gpt2", 2), shared("gpt2", 3)]


def processor(**kwargs: Any) -> ProxyTuningLogitsProcessor:
    return ProxyTuningLogitsProcessor(*members()[1:], ALPHA, check_vocabulary=False, **kwargs)


def composed() -> proxytune.ProxyTunedModel:
    base, expert, antiexpert = members()
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)


def composed_at(alpha: float) -> proxytune.ProxyTunedModel:
    model = composed()
    model.alpha = alpha
    return model


def padded(pad: int = PAD, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 240, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = pad, 0
    return ids, mask


def test_called_by_hand_it_returns_normalised_log_probabilities() -> None:
    ids = torch.randint(3, 240, (1, 7))
    base = members()[0](ids).logits[:, -1].detach().float()
    got = processor()(ids, base)
    want = next_logits(members(), ALPHA, ids[0]).log_softmax(-1)
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)
    assert float(got.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    # Log-probabilities in (beam search): the same out, since they differ from the logits by a constant.
    torch.testing.assert_close(processor()(ids, base.log_softmax(-1)), got, atol=1e-5, rtol=1e-5)


def test_scores_are_not_changed_in_place() -> None:
    ids = torch.randint(3, 240, (1, 7))
    scores = members()[0](ids).logits[:, -1].detach().float()
    before = scores.clone()
    processor()(ids, scores)
    assert torch.equal(scores, before)


def test_an_explicit_mask_counts_more_than_what_padding_looks_like() -> None:
    # Row 0 starts with the padding token as text: inferred, it would be masked.
    ids, mask = padded()
    ids[0, 0] = PAD
    want = composed().generate(ids, attention_mask=mask, **GREEDY)
    base = members()[0]
    explicit = base.generate(ids, attention_mask=mask, logits_processor=[processor(attention_mask=mask)], **GREEDY)
    assert torch.equal(explicit, want)
    inferred = base.generate(ids, attention_mask=mask, logits_processor=[processor()], **GREEDY)
    assert torch.equal(inferred[1], want[1])
    assert not torch.equal(inferred[0], want[0]), "this text does depend on its first token"


def test_an_explicit_mask_counts_more_than_the_attached_ones() -> None:
    ids, mask = padded()
    base = members()[0]
    wrong = torch.ones_like(mask)
    with processor(attention_mask=wrong).attach(base):
        got = base.generate(ids, attention_mask=mask, **GREEDY)
    assert not torch.equal(got[1], composed().generate(ids, attention_mask=mask, **GREEDY)[1])


def test_attached_there_is_nothing_to_tell_it() -> None:
    # Padding is EOS: nothing could be inferred.
    ids, mask = padded(EOS)
    want = composed().generate(ids, attention_mask=mask, pad_token_id=EOS, **GREEDY)
    base = members()[0]
    with processor().attach(base):
        assert torch.equal(base.generate(ids, attention_mask=mask, pad_token_id=EOS, **GREEDY), want)


def test_padding_inside_the_text_is_text_to_a_dropped_in_processor() -> None:
    ids, mask = padded()
    ids[:, 6] = PAD
    want = composed().generate(ids, attention_mask=mask, **GREEDY)
    got = members()[0].generate(ids, attention_mask=mask, logits_processor=[processor()], **GREEDY)
    assert torch.equal(got, want)


@pytest.mark.parametrize("attached", [True, False])
def test_one_processor_serves_many_calls(attached: bool) -> None:
    base, one = members()[0], processor()
    steer: dict[str, Any] = {} if attached else {"logits_processor": [one]}
    if attached:
        one.attach(base)
    try:
        # Other prompts, other batch sizes, beams in between, the first prompt again.
        for seed, mode in ((0, {}), (1, {"num_beams": 3}), (2, {"num_return_sequences": 2, "num_beams": 2}), (0, {})):
            ids, mask = padded(seed=seed)
            if seed == 2:
                ids, mask = ids[:1], mask[:1]
            want = composed().generate(ids, attention_mask=mask, **GREEDY, **mode)
            assert torch.equal(base.generate(ids, attention_mask=mask, **steer, **GREEDY, **mode), want)
    finally:
        one.detach()


def test_an_explicit_mask_serves_its_own_prompts_only() -> None:
    (ids, mask), base = padded(), members()[0]
    one = processor(attention_mask=mask)
    for _ in range(2):
        base.generate(ids, attention_mask=mask, logits_processor=[one], **GREEDY)
    base.generate(ids, attention_mask=mask, logits_processor=[one], num_beams=3, **GREEDY)
    others, _ = padded(seed=5)
    with pytest.raises(
        InputError, match="attention_mask: expected the prompts of the mask that was given to the processor"
    ):
        base.generate(others, attention_mask=mask, logits_processor=[one], **GREEDY)


def test_attached_to_one_model_and_dropped_into_another() -> None:
    """What the attached model's generate() was told must not leak: neither its mask nor its mode."""
    (ids, mask), base, other = padded(), members()[0], shared("llama", 5)
    one = processor()
    longer = torch.randint(3, 240, (2, 11))
    model = proxytune.wrap(other, expert=members()[1], antiexpert=members()[2], alpha=ALPHA, check_vocabulary=False)
    run = {**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    want = model.generate(longer, attention_mask=torch.ones_like(longer), **run)
    with one.attach(base):
        base.generate(ids, attention_mask=mask, **GREEDY)
        got = other.generate(longer, attention_mask=torch.ones_like(longer), logits_processor=[one], **run)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attached", [True, False])
def test_threads_take_turns(attached: bool) -> None:
    base, one = members()[0], processor()
    prompts = [padded(seed=seed) for seed in range(8)]
    want = [composed().generate(ids, attention_mask=mask, **GREEDY) for ids, mask in prompts]
    steer: dict[str, Any] = {} if attached else {"logits_processor": [one]}
    if attached:
        one.attach(base)
    try:
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(base.generate, ids, attention_mask=mask, **steer, **GREEDY) for ids, mask in prompts]
            got = [run.result() for run in runs]
    finally:
        one.detach()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_companion_that_is_trained_between_calls_is_not_answered_from_memory() -> None:
    base, expert, antiexpert = build("llama", 1), build("gpt2", 2), build("gpt2", 3)
    one = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
    ids = torch.randint(3, 240, (1, 9))
    scores = base(ids).logits[:, -1].detach().float()
    before = one(ids, scores)
    with torch.no_grad():
        expert.transformer.h[0].attn.c_attn.weight.mul_(0.5)
    after = one(ids, scores)
    fresh = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)(ids, scores)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fresh, atol=1e-5, rtol=1e-5)


def test_alpha_can_be_changed_between_calls() -> None:
    ids, base, one = torch.randint(3, 240, (1, 9)), members()[0], processor()
    with one.attach(base):
        base.generate(ids, **GREEDY)
        one.alpha = 0.0
        assert torch.equal(base.generate(ids, **GREEDY), composed_at(0.0).generate(ids, **GREEDY))
        one.alpha = 2.0
        assert torch.equal(base.generate(ids, **GREEDY), composed_at(2.0).generate(ids, **GREEDY))


def test_a_copy_of_an_attached_model_is_the_model_alone() -> None:
    base, ids = build("llama", 1), torch.randint(3, 240, (1, 9))
    alone = base.generate(ids, **GREEDY)
    with processor().attach(base):
        twin = copy.deepcopy(base)
        assert torch.equal(twin.generate(ids, **GREEDY), alone)
        assert not torch.equal(base.generate(ids, **GREEDY), alone)
    with processor().attach(twin):
        assert not torch.equal(twin.generate(ids, **GREEDY), alone)


def test_a_model_that_drafts_for_itself() -> None:
    ids = torch.randint(3, 240, (1, 9))
    base = build("llama", 1)
    base.generation_config.num_assistant_tokens = 3
    with processor().attach(base):
        got = base.generate(ids, assistant_model=base, **GREEDY)
    assert torch.equal(got, composed().generate(ids, **GREEDY))


class Recorder(LogitsProcessor):
    """Keeps what the processors before it handed on."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        return scores


def test_attached_the_shift_comes_before_every_other_processor() -> None:
    """With a repetition penalty the order matters: attached equals the composed model, dropped in does not."""
    ids = torch.randint(3, 240, (1, 9))
    base = members()[0]
    run = {**GREEDY, "max_new_tokens": 1, "repetition_penalty": 5.0}
    want, got, late = Recorder(), Recorder(), Recorder()
    composed().generate(ids, logits_processor=[want], **run)
    with processor().attach(base):
        base.generate(ids, logits_processor=[got], **run)
    base.generate(ids, logits_processor=[processor(), late], **run)
    torch.testing.assert_close(got.seen[0], want.seen[0], atol=1e-4, rtol=1e-4)
    normalised = want.seen[0].log_softmax(-1)
    assert (late.seen[0] - normalised).abs().max() > 0.1


def test_beam_scores_are_those_of_the_composed_model() -> None:
    """Mis-normalised scores would still often find the same beams; the scores themselves tell."""
    ids, mask = padded()
    run = {**GREEDY, "num_beams": 4, "num_return_sequences": 4, "return_dict_in_generate": True, "output_scores": True}
    want = composed().generate(ids, attention_mask=mask, **run)
    base = members()[0]
    with processor().attach(base):
        attached = base.generate(ids, attention_mask=mask, **run)
    dropped_in = base.generate(ids, attention_mask=mask, logits_processor=[processor()], **run)
    for got in (attached, dropped_in):
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=1e-4)
    # And against the definition: the mean log-probability of the best beam of row 0, which has no padding.
    best = want.sequences[0]
    total = sum(float(next_logits(members(), ALPHA, best[:t]).log_softmax(-1)[best[t]]) for t in range(9, len(best)))
    assert float(want.sequences_scores[0]) == pytest.approx(total / (len(best) - 9), abs=1e-3)


def test_sampling_follows_the_combined_law() -> None:
    """χ² of two sampled tokens against their exact law, on a vocabulary of eight, through the attached processor."""
    base, expert, antiexpert = (build("llama", s, vocab=8) for s in (1, 2, 3))
    one = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
    prompt, n = torch.tensor([[3, 5, 4]]), 4000
    members_ = [base, expert, antiexpert]
    first = next_logits(members_, ALPHA, prompt[0]).softmax(-1)
    law = torch.stack(
        [
            first[a] * next_logits(members_, ALPHA, torch.cat([prompt[0], torch.tensor([a])])).softmax(-1)
            for a in range(8)
        ]
    ).flatten()
    run = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "eos_token_id": None, "num_return_sequences": n}
    with one.attach(base):
        drawn = base.generate(prompt, **run)[:, 3:]
    counts = torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64).double()
    # Cells below five expected draws are pooled, as the χ² approximation asks.
    big = law * n >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([law[big], law[~big].sum()[None]]).double() * n
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    degrees = len(observed) - 1
    # The 99.9th percentile of χ² by Wilson and Hilferty's approximation; the seed is fixed.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees >= 5
    assert statistic < bound


def test_companions_read_a_prompt_in_the_base_s_chunks() -> None:
    base, expert, antiexpert = (build("mistral", seed) for seed in (1, 2, 3))
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, check_vocabulary=False)
    ids, spans = torch.randint(3, 240, (2, 23)), {"base": [], "expert": []}
    for name, model in (("base", base), ("expert", expert)):
        kept: list[int] = spans[name]
        model.get_input_embeddings().register_forward_hook(lambda _, args, __, kept=kept: kept.append(args[0].shape[1]))
    run: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    with processor.attach(base):
        whole = base.generate(ids, eos_token_id=None, **run)
        assert spans["expert"] == [23, 1, 1]
        spans["expert"].clear()
        spans["base"].clear()
        ids[:, 0] += 1  # another text: the companions begin anew
        parts = base.generate(ids, eos_token_id=None, prefill_chunk_size=8, **run)
        assert spans["expert"] == spans["base"] == [8, 8, 7, 1, 1]
        assert torch.equal(parts, base.generate(ids, eos_token_id=None, **run))
    assert whole.shape == parts.shape


# --- scoring -------------------------------------------------------------------------------------------------------

UNSTEERED = "gives the base's own logits: processors act in generate.. alone.*compose the models with proxytune.wrap"


@pytest.mark.parametrize("how", ["positional", "by name", "with labels", "in inference mode"])
def test_scoring_an_attached_base_is_said_once(how: str) -> None:
    base, (ids, mask) = members()[0], padded()
    one = processor().attach(base)
    calls = {
        "positional": lambda: base(ids),
        "by name": lambda: base(input_ids=ids, attention_mask=mask),
        "with labels": lambda: base(ids, labels=ids, logits_to_keep=0),
        "in inference mode": torch.inference_mode()(lambda: base(ids)),
    }
    with one:
        with pytest.warns(SteeringWarning, match=UNSTEERED):
            calls[how]()
        base(ids)  # once
        twin = copy.deepcopy(base)
        twin(ids)
    base(ids)
    with processor().attach(base), pytest.warns(SteeringWarning, match=UNSTEERED):
        base(ids)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_scoring_by_a_peft_model_is_said_too() -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(build("llama", 1), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with processor().attach(tuned):
        tuned.generate(input_ids=padded()[0][:1], **GREEDY)
        with pytest.warns(SteeringWarning, match=UNSTEERED):
            tuned(padded()[0])


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}])
def test_generation_and_other_passes_of_an_attached_base_say_nothing(settings: dict[str, Any]) -> None:
    base, (ids, mask) = build("llama", 1), padded()
    expert = members()[1]
    # The base may be its own antiexpert, whose passes are a companion's.
    with ProxyTuningLogitsProcessor(expert, base, ALPHA, check_vocabulary=False).attach(base):
        base.generate(ids, attention_mask=mask, **GREEDY, **settings)
        base(ids, output_hidden_states=True)
        base(ids, logits_to_keep=1)
        base(ids[:, :1])
        base.train()(ids)
        base.eval()


@pytest.mark.parametrize("loop", [proxytune.FusedDecoding(), proxytune.ForkDecoding(threshold=0.0, branches=2)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_loops_on_an_attached_base_say_nothing(loop: Any, use_cache: bool) -> None:
    with processor().attach(members()[0]) as one:
        ids = padded()[0][:1]
        one._hooks[-1].model.generate(ids, custom_generate=loop, use_cache=use_cache, **GREEDY)
