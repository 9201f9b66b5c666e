"""The fused loop: in greedy decoding the tokens, scores and logits of transformers' own loop; what it refuses."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from support.fused import NEW, SAMPLE, Collector, Discourage, FirstRowOnly, composed, padded, prompts, run
from support.tiny import EOS, PAD, build, shared, tokenizer
from transformers import StoppingCriteria, StopStringCriteria, TemperatureLogitsWarper, TopKLogitsWarper

from proxytune import FusedDecoding
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.members.cache_name import CACHE

# --- greedy: the tokens, scores and logits of transformers' own loop ------------------------------------------------

GREEDY: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "logits_processor": [Discourage()],
    },
    "warper-of-the-users": {"logits_processor": [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)]},
    "guidance": {"guidance_scale": 1.7},
    "normalised": {"renormalize_logits": True, "remove_invalid_values": True, "suppress_tokens": [5, 6]},
    "max-time": {"max_time": 0.0},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 5},
    "no-cache": {"use_cache": False},
}


@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", GREEDY)
def test_greedy_is_that_of_transformers(model: Any, mode: str, padding: str) -> None:
    ids, mask = padded() if padding == "left" else (prompts(), None)
    show = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings = {"do_sample": False, **GREEDY[mode], **show}
    want = run(model, ids, mask, **settings)
    got = run(model, ids, mask, custom_generate=FusedDecoding(), **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert type(got) is type(want)
    assert len(got.scores) == len(want.scores) == len(got.logits)
    for ours, theirs in zip(got.scores + got.logits, want.scores + want.logits, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32
    if want.past_key_values is None:
        assert got.past_key_values is None
    else:
        assert int(got.past_key_values.get_seq_length()) == int(want.past_key_values.get_seq_length())
    # Without a report, the tokens alone.
    quiet = run(model, ids, mask, custom_generate=FusedDecoding(), do_sample=False, **GREEDY[mode])
    assert torch.equal(quiet, want.sequences)


@pytest.mark.parametrize("vocab", [250, 256, 262])
def test_greedy_in_bfloat16(vocab: int) -> None:
    # Half-precision logits are where ties are; both loops take the first.
    steered, (ids, mask) = composed(vocab=vocab, dtype=torch.bfloat16), padded()
    for one in (steered, steered.base):
        want = run(one, ids, mask, do_sample=False)
        assert torch.equal(run(one, ids, mask, do_sample=False, custom_generate=FusedDecoding()), want)


@pytest.mark.smoke
def test_rows_end_at_different_steps(model: Any) -> None:
    ids, mask = padded()
    free = run(model, ids, mask, do_sample=False, eos_token_id=None)[:, 12:]

    def last(row: int, ends: tuple[int, ...]) -> int:
        return next((t for t in range(NEW) if int(free[row, t]) in ends), NEW)

    # Two of the tokens that come anyway, by which the rows end at three different steps.
    ends = next(e for e in itertools.product(*free[:2].tolist()) if len({last(r, e) for r in range(3)}) == 3)
    want = run(model, ids, mask, do_sample=False, eos_token_id=list(ends))
    assert len({int((row != PAD).sum()) for row in want[:, 12:]}) > 1
    got = run(model, ids, mask, do_sample=False, eos_token_id=list(ends), custom_generate=FusedDecoding())
    assert torch.equal(got, want)


def test_stop_strings(model: Any) -> None:
    ids = prompts(1)
    free = run(model, ids, do_sample=False, eos_token_id=None, max_new_tokens=30)[0]
    letters = [tokenizer().decode(t) for t in free]
    first = next(t for t in range(12, 42) if letters[t].isascii() and letters[t].isprintable())
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}
    if hasattr(model, "formula"):
        stop: dict[str, Any] = {"stop_strings": [letters[first]], "tokenizer": tokenizer()}
    else:  # transformers hands a callable no tokenizer
        stop = {"stopping_criteria": [StopStringCriteria(tokenizer(), [letters[first]])]}
    got = run(model, ids, custom_generate=FusedDecoding(), **settings, **stop)
    assert torch.equal(got[0], free[: first + 1])


def test_without_eos_finished_rows_go_on_as_in_transformers(model: Any) -> None:
    settings = {"do_sample": False, "eos_token_id": None, "stopping_criteria": [FirstRowOnly()]}
    want = run(model, prompts(), **settings)
    assert torch.equal(run(model, prompts(), custom_generate=FusedDecoding(), **settings), want)


@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_conversation_with_the_cache_passed_in(model: Any, padding: str) -> None:
    ids, mask = padded() if padding == "left" else (prompts(), torch.ones(3, 12, dtype=torch.long))
    settings = {"do_sample": False, "eos_token_id": None}
    cache = None
    for turn in range(3):
        want = run(model, ids, mask, **settings)
        out = run(
            model,
            ids,
            mask,
            **{CACHE: cache},
            return_dict_in_generate=True,
            custom_generate=FusedDecoding(),
            **settings,
        )
        assert torch.equal(out.sequences, want), f"turn {turn}"
        cache = out.past_key_values
        ids = torch.cat([want, prompts(3, 4, seed=10 + turn)], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


@pytest.mark.smoke
def test_streaming(model: Any) -> None:
    theirs, ours = Collector(), Collector()
    run(model, prompts(2), do_sample=False, streamer=theirs)
    if hasattr(model, "formula"):
        run(model, prompts(2), do_sample=False, streamer=ours, custom_generate=FusedDecoding())
    else:  # transformers hands a callable no streamer
        run(model, prompts(2), do_sample=False, custom_generate=FusedDecoding(streamer=ours))
    assert ours.got == theirs.got
    assert len(ours.got) == NEW + 1
    assert ours.ended == theirs.ended == 1


def test_several_sequences_per_prompt(model: Any) -> None:
    # top_k=1 makes sampling say the same in both loops.
    ids, mask = padded()
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    want = run(model, ids, mask, **settings)
    assert torch.equal(run(model, ids, mask, custom_generate=FusedDecoding(seed=1), **settings), want)


def test_states_of_a_plain_model_are_those_of_transformers() -> None:
    model = build("llama", 1)
    model.set_attn_implementation("eager")
    show = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    want = run(model, prompts(), do_sample=False, **show)
    got = run(model, prompts(), do_sample=False, custom_generate=FusedDecoding(), **show)
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(want[name]) == NEW
        for ours, theirs in zip(itertools.chain(*got[name]), itertools.chain(*want[name]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "top_k": 1}])
def test_embeddings_as_the_prompt_of_a_plain_model(settings: dict[str, Any]) -> None:
    model, (ids, mask) = shared("llama", 1), padded()
    kwargs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask, "max_new_tokens": NEW}
    want = model.generate(**kwargs, **settings)
    got = model.generate(**kwargs, **settings, custom_generate=FusedDecoding(seed=0))
    assert torch.equal(got, want)
    assert got.shape == (3, NEW)


def test_a_family_whose_forward_gives_all_positions() -> None:
    # GPT-2 like models of one's own may not know logits_to_keep: only the last position counts.
    model = build("gpt2", 5)
    forward = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    want = run(model, prompts(), do_sample=False)
    assert torch.equal(run(model, prompts(), do_sample=False, custom_generate=FusedDecoding()), want)


# --- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"num_beams": 2, "do_sample": False}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3, "do_sample": False}, "assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "contrastive search"),
        ({"dola_layers": "low", "do_sample": False}, "dola generation"),
    ],
)
def test_other_modes_are_refused(model: Any, settings: dict[str, Any], mode: str) -> None:
    with pytest.raises(
        UnsupportedModeError, match=f"FusedDecoding: expected greedy decoding or sampling; got .*{mode}"
    ):
        run(model, prompts(), custom_generate=FusedDecoding(), **settings)


@pytest.mark.smoke
def test_an_assistant_is_refused_where_it_can_be_seen() -> None:
    for do_sample in (False, True):
        with pytest.raises(UnsupportedModeError, match="got settings for assisted generation"):
            run(
                composed(),
                prompts(1),
                assistant_model=shared("llama", 9),
                do_sample=do_sample,
                custom_generate=FusedDecoding(),
            )


def test_encoder_decoders_and_paged_caches_are_refused() -> None:
    with pytest.raises(UnsupportedModeError, match="expected a decoder-only model; got T5For.*, an encoder-decoder"):
        run(build("t5", 1), prompts(), do_sample=False, custom_generate=FusedDecoding())
    with pytest.raises(UnsupportedModeError, match="continuous batching"):
        run(composed(), prompts(), cache_implementation="paged", custom_generate=FusedDecoding())


@pytest.mark.parametrize("seed", [1.5, True, "0", 1 << 63, torch.tensor([1])])
def test_wrong_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="seed: expected a whole number of 64 bits"):
        FusedDecoding(seed=seed)


def test_wrong_settings_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"):
        FusedDecoding(impl="cuda")  # type: ignore[arg-type]
    for rows in ([0, 1], [0.5, 1.0, 2.0], [-1, 0, 1], [0, 1, 1 << 32], torch.zeros(3, 1, dtype=torch.long), [True] * 3):
        with pytest.raises(InputError, match="stream_ids: expected whole numbers .* one for each of 3 rows"):
            run(model, prompts(), custom_generate=FusedDecoding(stream_ids=rows), **SAMPLE)

    class Ends(StoppingCriteria):
        eos_token_id = torch.tensor([EOS])

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids[:, -1] == EOS

    unpadded = build("llama", 1)
    unpadded.generation_config.pad_token_id = unpadded.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="pad_token_id: expected a padding token"):
        run(unpadded, prompts(), do_sample=False, stopping_criteria=[Ends()], custom_generate=FusedDecoding())
    with pytest.raises(TypeError):
        FusedDecoding(0)  # type: ignore[misc]


def test_the_flag_for_separate_members_is_not_for_generate() -> None:
    model, ids = composed(), prompts()
    for loop in ({}, {"custom_generate": FusedDecoding()}):
        with pytest.raises(ValueError, match=r"not used by the model: \['return_member_logits'\]"):
            run(model, ids, do_sample=False, return_member_logits=True, **loop)
    with torch.no_grad():
        apart, together = model(ids, return_member_logits=True), model(ids, return_member_logits=False)
        labelled = model(ids, return_member_logits=True, labels=ids)
    assert apart.logits is None
    assert [tuple(z.shape) for z in apart.member_logits] == [(3, 12, 256), (3, 12, 250), (3, 12, 250)]
    own = model.member_logits(ids)
    for z, role in zip(apart.member_logits, ("base", "expert", "antiexpert"), strict=True):
        torch.testing.assert_close(z, own[role])
    assert together.logits is not None
    assert labelled.loss is not None, "a loss is of the combined logits"


@pytest.mark.smoke
def test_a_callable_gets_what_it_names_from_a_composed_model() -> None:
    seen: dict[str, Any] = {}

    def modest(model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
               generation_config: Any, mine: int = 0, **model_kwargs: Any) -> torch.Tensor:  # fmt: skip
        seen.update(model_kwargs, mine=mine)
        return input_ids

    ids = prompts(1)
    assert torch.equal(run(composed(), ids, custom_generate=modest, mine=3, streamer=Collector()), ids)
    assert seen["mine"] == 3
    assert not {"streamer", "tokenizer", "assistant_model", "synced_gpus"} & set(seen)


# --- several processes ----------------------------------------------------------------------------------------------


def test_synced_processes_go_on_until_all_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = composed(), prompts(1)
    want = run(model, ids, do_sample=False)
    others = iter([True] * (NEW + 3) + [False])
    monkeypatch.setattr(model, "_has_unfinished_sequences", lambda done, synced, device: synced and next(others))
    before = model.token_forwards["base"]
    got = run(
        model,
        ids,
        do_sample=False,
        synced_gpus=True,
        output_scores=True,
        return_dict_in_generate=True,
        custom_generate=FusedDecoding(),
    )
    assert torch.equal(got.sequences, want)
    assert len(got.scores) == NEW
    assert model.token_forwards["base"] - before == 12 + NEW + 2, "it forwards while others do"


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["composed", "plain"])
def test_on_a_gpu_the_host_waits_once_per_step(kind: str) -> None:
    steered = composed(dtype=torch.float32).cuda()
    model = steered if kind == "composed" else steered.base
    ids = prompts().cuda()
    want = run(model, ids, do_sample=False)
    assert torch.equal(run(model, ids, do_sample=False, custom_generate=FusedDecoding()), want)

    def waits(new: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run(model, ids, max_new_tokens=new, custom_generate=FusedDecoding(seed=0), **SAMPLE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in seen)

    waits(2)  # kernels are compiled, and weights put on the device
    assert waits(10) - waits(4) <= 6
