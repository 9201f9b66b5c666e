"""Recordings: every loop and door against float64 passes without a cache, and what a recording refuses."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from support.fused import ALPHA, NEW, Collector, composed, padded, prompts, run
from support.tiny import EOS, PAD, build, shared, tokenizer
from transformers import CompileConfig

import proxytune
from proxytune import (
    ForkDecoding,
    ForkSamplingLogitsProcessor,
    FusedDecoding,
    LatentDecoding,
    ProxyTuningLogitsProcessor,
    Recording,
    SpeculativeDecoding,
)
from proxytune.errors import InputError, RecordingWarning, UnsupportedModeError
from proxytune.formulas import ContextAware, Gate
from proxytune.generation.token_texts import names_of, pieces_of
from proxytune.trace import UNKNOWN, TracedText, load

ROLES = ("base", "expert", "antiexpert")


@pytest.fixture(scope="module")
def model() -> Any:
    return composed(dtype=torch.float32)


@torch.no_grad()
def expected(members: Mapping[str, Any], text: TracedText, usable: int, *, shut: Any = None) -> dict[str, Any]:
    """What a text's record has to say, in float64 and without a cache; `shut` says where the base stood alone."""
    ids = torch.tensor([[*text.prompt_ids.tolist(), *text.tokens.tolist()]])
    there = slice(len(text.prompt_ids) - 1, ids.shape[1] - 1)
    logits = {role: m(ids).logits[0, there, :usable].double() for role, m in members.items()}
    base = logits["base"]
    combined = base
    if len(members) > 1:
        combined = base + ALPHA * (logits["expert"] - logits["antiexpert"])
    if shut is not None:
        combined = torch.where(torch.tensor(shut)[:, None], base, combined)
    tokens = torch.tensor(text.tokens.tolist())[:, None]
    log_p, log_q = combined.log_softmax(-1), base.log_softmax(-1)
    sources = [log_p, *(z.log_softmax(-1) for z in logits.values())]
    return {
        "logprobs": log_p.gather(1, tokens)[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "shift": (log_p - log_q).gather(1, tokens)[:, 0],
        "base_rank": (base > base.gather(1, tokens)).sum(1),
        "top_logprobs": torch.stack([x.topk(5, -1).values for x in sources], 1),
        "sources": torch.stack(sources, 1),
    }


def assert_right(members: Mapping[str, Any], text: TracedText, usable: int, **settings: Any) -> None:
    want = expected(members, text, usable, **settings)
    for name in ("logprobs", "entropy", "kl", "shift", "base_rank"):
        np.testing.assert_allclose(getattr(text, name), want[name].numpy(), atol=2e-5, err_msg=name)
    for i in range(1 + len(members)):
        if (text.top_ids[:, i] < 0).any():  # a member that did not always run
            continue
        np.testing.assert_allclose(text.top_logprobs[:, i], want["top_logprobs"][:, i].numpy(), atol=2e-5)
        named = want["sources"][:, i].gather(1, torch.tensor(text.top_ids[:, i].astype(np.int64)))
        np.testing.assert_allclose(named.numpy(), text.top_logprobs[:, i], atol=2e-5)


def assert_recorded(recording: Recording, out: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Prompts without padding, and tokens as they were returned, up to the end of each text."""
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    each = len(sequences) // len(ids)
    assert len(recording) == len(sequences)
    for i, (text, row) in enumerate(zip(recording, sequences.tolist(), strict=True)):
        assert text.prompt_ids.tolist() == ids[i // each][mask[i // each].bool()].tolist()
        new = row[ids.shape[1] :]
        count = new.index(EOS) + 1 if EOS in new else len(new)
        while count and EOS not in new and new[count - 1] == PAD:
            count -= 1
        assert text.tokens.tolist() == new[:count]


DOORS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "dict": {"return_dict_in_generate": True, "output_scores": True},
    "guidance": {"guidance_scale": 1.7},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "fused": {"custom_generate": FusedDecoding(seed=0), "do_sample": True, "top_k": 20, "no_repeat_ngram_size": 2},
    "speculation": {"custom_generate": SpeculativeDecoding(seed=0, draft_tokens=3), "do_sample": True},
    "speculation, greedy": {"custom_generate": SpeculativeDecoding(draft_tokens=2)},
    "tree": {"custom_generate": ForkDecoding(seed=0, threshold=1.0, branches=3), "do_sample": True},
}


@pytest.mark.smoke
@pytest.mark.parametrize("door", DOORS)
def test_a_record_says_what_the_members_want(model: Any, door: str) -> None:
    ids, mask = padded()
    settings = {"do_sample": False, **DOORS[door]}
    torch.manual_seed(0)
    plain = run(model, ids, mask, **settings)
    with proxytune.record(model) as recording:
        torch.manual_seed(0)
        out = run(model, ids, mask, **settings)
    sequences = [x if isinstance(x, torch.Tensor) else x.sequences for x in (plain, out)]
    assert torch.equal(*sequences)
    assert_recorded(recording, out, ids, mask)
    assert recording.trace.sources == ("combined", *ROLES)
    members = {m.role: m.model for m in model.members}
    for text in recording:
        assert_right(members, text, model.usable_ids)
    assert recording[0].kl.max() > 1e-3
    run(model, ids, mask, do_sample=False)
    assert len(recording) == len(sequences[0])  # after its end nothing is recorded


@pytest.mark.parametrize("door", ["greedy", "guidance", "beams", "fused", "speculation"])
def test_a_plain_model_is_recorded_too(door: str) -> None:
    base = shared("llama", 0)
    ids, mask = padded()
    settings = {"do_sample": False, **DOORS[door]}
    if door == "speculation":
        settings["custom_generate"] = SpeculativeDecoding(
            seed=0, draft_tokens=3, draft=proxytune.methods.speculation.ModelDraft(shared("llama", 1))
        )
    with proxytune.record(base) as recording:
        out = run(base, ids, mask, **settings)
    assert_recorded(recording, out, ids, mask)
    assert recording.trace.sources == ("combined", "base")
    for text in recording:
        assert_right({"base": base}, text, 256)
        assert not text.kl.any()


@pytest.mark.parametrize("loop", [None, FusedDecoding(seed=0)])
def test_a_model_with_an_attached_processor_is_recorded_as_steered(loop: Any) -> None:
    base, expert, antiexpert = (build("llama", seed) for seed in range(3))
    ids, mask = padded()
    members = dict(zip(ROLES, (base, expert, antiexpert), strict=True))
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
    with processor.attach(base), proxytune.record(base) as recording:
        out = run(base, ids, mask, do_sample=True, custom_generate=loop)
    with processor.attach(base), proxytune.record(base), pytest.raises(UnsupportedModeError, match="that steers"):
        run(base, ids, mask, num_beams=2)
    assert_recorded(recording, out, ids, mask)
    assert recording.trace.sources == ("combined", *ROLES)
    for text in recording:
        assert_right(members, text, 256)


@pytest.mark.parametrize("loop", [None, FusedDecoding(), SpeculativeDecoding(draft_tokens=2)])
def test_gates_and_companions_that_did_not_run_are_said(loop: Any) -> None:
    model = composed(dtype=torch.float32)
    ids, mask = padded()
    with proxytune.record(model) as recording:
        run(model, ids, mask, do_sample=False)
    nats = float(np.median(np.concatenate([text.entropy for text in recording])))
    model.formula = replace(model.formula, gate=Gate(entropy=nats))
    with proxytune.record(model) as recording:
        run(model, ids, mask, do_sample=False, custom_generate=loop)
    members = {m.role: m.model for m in model.members}
    open_at = [text.said("gate") for text in recording]
    assert {bool(x) for flags in open_at for x in flags} == {True, False}
    for text, flags in zip(recording, open_at, strict=True):
        assert_right(members, text, model.usable_ids, shut=~flags)
        if isinstance(loop, SpeculativeDecoding):
            assert text.said("drafted") is not None
    if loop is None:
        with proxytune.record(model) as recording:
            run(model, ids[:1], do_sample=False)
        np.testing.assert_array_equal(recording[0].top_ids[:, 2, 0] == UNKNOWN, recording[0].gate == 0)


@pytest.mark.parametrize("loop", [None, FusedDecoding(seed=4)])
def test_forks_are_said(model: Any, loop: Any) -> None:
    ids, mask = padded()
    fork = ForkSamplingLogitsProcessor(4.0, fork_temperature=1.3)
    with proxytune.record(model) as recording:
        run(model, ids, mask, do_sample=True, logits_processor=[fork], custom_generate=loop)
    for text in recording:
        np.testing.assert_array_equal(text.said("fork"), text.entropy > 4.0)


def test_leaves_of_trees_have_their_weights_forks_and_prompts(model: Any) -> None:
    ids, mask = padded()
    decoding = ForkDecoding(seed=0, threshold=4.0, branches=3, min_gap=3)
    with proxytune.record(model) as recording:
        out = run(model, ids, mask, do_sample=True, custom_generate=decoding, return_dict_in_generate=True)
    counts = [len(tree) for tree in out.trees]
    assert len({*counts}) > 1  # leaves are not as many for each prompt
    assert [text.facts["weight"] for text in recording] == out.weights.tolist()
    for text, origin, branch in zip(recording, out.prompts, [b for tree in out.trees for b in tree], strict=True):
        assert text.prompt_ids.tolist() == ids[origin][mask[origin].bool()].tolist()
        assert text.tokens.tolist() == branch.along("tokens")
        np.testing.assert_allclose(text.entropy, branch.along("entropies"), atol=1e-5)
        forks = {at for one in branch.path() for at in one.forks if at < len(text)}
        assert {*np.flatnonzero(text.said("fork"))} <= forks
        starts = {one.start for one in branch.path()[1:]}
        assert starts <= {*np.flatnonzero(text.said("fork"))}
    assert_right({m.role: m.model for m in model.members}, recording[0], model.usable_ids)


@pytest.mark.parametrize("loop", [None, FusedDecoding(seed=4)])
def test_latent_steps_are_said_and_never_read_again(model: Any, loop: Any) -> None:
    ids, mask = padded()
    with proxytune.record(model) as recording:
        decoding = LatentDecoding("gumbel", seed=0, loop=loop)
        out = run(model, ids, mask, do_sample=True, custom_generate=decoding, return_dict_in_generate=True)
        assert_recorded(recording, out, ids, mask)
        for text, soft in zip(recording, out.soft, strict=True):
            np.testing.assert_array_equal(text.said("latent"), soft[: len(text)].numpy())
    if loop is None:
        with proxytune.record(model), pytest.raises(UnsupportedModeError, match="no ids can say"):
            run(model, ids, mask, num_beams=2, custom_generate=LatentDecoding("gumbel", seed=0))


def test_one_call_is_recorded_and_a_file_takes_it(model: Any, tmp_path: Path) -> None:
    ids, mask = padded()
    recording = Recording(top=3, tokenizer=tokenizer(), file=tmp_path / "run.npz")
    for _ in range(2):
        run(model, ids, mask, do_sample=False, trace=recording)
    kept = load(tmp_path / "run.npz")
    assert kept.about == recording.trace.about
    assert kept.about["formula"] == str(model.formula)
    assert kept.about["temperature"] == 0.0
    assert len(kept) == len(recording) == 2 * len(ids)
    for text, read in zip(recording, kept, strict=True):
        np.testing.assert_array_equal(text.top_logprobs, read.top_logprobs)
        assert read.text == tokenizer().decode(text.tokens)
        assert set(np.unique(text.top_ids).tolist()) <= read.names.keys()


def test_a_file_that_cannot_take_the_texts_is_refused_before_the_work(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    with pytest.raises(InputError, match="no folder"):
        Recording(file=tmp_path / "missing" / "run.npz")
    base = build("llama", 0)
    with proxytune.record(base, file=file):
        run(base, prompts(1), torch.ones(1, 12), max_new_tokens=1)
    with pytest.raises(InputError, match="top 3"):
        Recording(file=file, top=3)
    steps = Collector()
    with pytest.raises(InputError, match="expected a trace of combined, base, expert"):
        run(model, prompts(1), torch.ones(1, 12), streamer=steps, do_sample=False, trace=Recording(file=file))
    assert steps.got == []


def test_one_recording_has_one_setting(tmp_path: Path) -> None:
    model = composed(dtype=torch.float32)
    ids, mask = padded()
    for recording in (Recording(), Recording(file=tmp_path / "run.npz")):
        run(model, ids, mask, do_sample=False, max_new_tokens=2, trace=recording)
        for settings, name in (({"do_sample": True}, "temperature"), ({"custom_generate": FusedDecoding()}, "loop")):
            with pytest.raises(InputError, match=f"expected runs of one {name}"):
                run(model, ids, mask, **{"do_sample": False} | settings, trace=recording)
        recording.read(model, [[5, 6]], prompts=[[7]])  # says nothing of a loop
        model.alpha = 0.0
        for again in (recording, *([Recording(file=recording.file)] if recording.file else [])):
            with pytest.raises(InputError, match="expected runs of one formula"):
                run(model, ids, mask, do_sample=False, trace=again)
        model.alpha = ALPHA
        assert len(recording) == 4


def test_own_prompts_are_read_again() -> None:
    model = proxytune.wrap(shared("llama", 0), formula=ContextAware(), check_vocabulary=False)
    ids, mask = padded()
    rows = []
    longer = torch.randint(3, 240, (3, 20), generator=torch.Generator().manual_seed(1))  # than the base's
    for own in (ids[:, -3:], longer):
        for settings in ({}, {"num_beams": 2, "num_return_sequences": 2}):
            with proxytune.record(model) as recording:
                out = run(model, ids, mask, prompts={"no_context": own}, do_sample=False, **settings)
            assert_recorded(recording, out, ids, mask)
            rows.append(recording[0])
        a, b = rows[-2:]
        count = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a))
        np.testing.assert_allclose(a.kl[:count], b.kl[:count], atol=1e-5)
        assert a.kl[0] > 1e-3


def test_what_cannot_be_recorded_is_refused_by_name(model: Any) -> None:
    ids, mask = padded()
    recording = proxytune.record(model)
    with pytest.raises(InputError, match="that is not being recorded"):
        proxytune.record(model)
    with pytest.raises(InputError, match="Leave out one of both"):
        run(model, ids, mask, trace=Recording())
    with pytest.warns(RecordingWarning, match="nothing was recorded"), recording:
        model(ids)  # a loop of one's own
    with pytest.raises(InputError, match="got one that was stopped"), recording:
        pass
    proxytune.record(model)  # and no name for it
    model.generate.replacement.recording.stop()
    with pytest.raises(InputError, match=r"trace=proxytune\.Recording\(\)"):
        run(model, ids, mask, trace="run.npz")
    with pytest.raises(InputError, match=r"expected NAME\.npz"):
        Recording(file="run.json")
    with pytest.raises(InputError, match="top"):
        Recording(top=0)
    base = shared("llama", 0)
    with proxytune.record(base), pytest.raises(UnsupportedModeError, match="inputs_embeds"):
        base.generate(inputs_embeds=torch.zeros(1, 2, 32), max_new_tokens=2)
    encoder_decoder = shared("t5", 0)
    with proxytune.record(encoder_decoder), pytest.raises(UnsupportedModeError, match="an encoder-decoder"):
        encoder_decoder.generate(ids, max_new_tokens=2)
    recording = Recording()
    run(model, ids, mask, trace=recording)
    other = proxytune.wrap(base, expert=shared("llama", 1), formula="base + expert", check_vocabulary=False)
    with pytest.raises(InputError, match="a recording for each model"):
        run(other, ids, mask, trace=recording)


def test_pieces_join_to_the_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_only = PreTrainedTokenizerFast(tokenizer_object=made)
    ids = bytes_only("a ü中x")["input_ids"]
    pieces = pieces_of(bytes_only, ids)
    assert pieces == ("a", " ", "", "ü", "", "", "中", "x")
    assert pieces_of(bytes_only, ids[2:], ids[:2]) == pieces[2:]
    assert "".join(pieces_of(bytes_only, ids[:6])) == bytes_only.decode(ids[:6])  # half of a character at the end
    names = names_of(bytes_only, [*ids, -1])
    assert len(names) == len(set(ids))
    assert all(names.values())


def test_a_recording_shows_itself_in_a_notebook(model: Any) -> None:
    import proxytune.view  # noqa: F401  (registers the page)

    recording = Recording(tokenizer=tokenizer())
    run(model, *padded(), max_new_tokens=2, trace=recording)
    assert recording._repr_html_() == recording.trace._repr_html_()
    assert "<iframe" in (recording._repr_html_() or "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_steps_and_drafts_are_read_again() -> None:
    model = composed(dtype=torch.float32)
    members = {m.role: m.model for m in model.members}
    model.compile_members(CompileConfig(backend="eager", mode=None))
    one, ids = prompts(1), prompts(2)
    for settings in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        given = ids if "cache_implementation" in settings else one
        recording = Recording()
        out = run(model, given, torch.ones_like(given), do_sample=False, trace=recording, eos_token_id=None, **settings)
        assert [text.tokens.tolist() for text in recording] == out[:, given.shape[1] :].tolist()
        for text in recording:
            assert_right(members, text, model.usable_ids)


def test_a_padding_token_that_was_drawn_is_recorded(model: Any) -> None:
    ids, mask = padded()
    last = int(run(model, ids, mask, do_sample=False, eos_token_id=None)[0, -1])
    recording = Recording()
    run(model, ids, mask, do_sample=False, eos_token_id=None, pad_token_id=last, trace=recording)
    assert recording[0].tokens[-1] == last
    assert len(recording[0]) == NEW


@pytest.mark.parametrize("composes", [True, False])
def test_calls_of_another_thread_and_inside_do_not_mix(model: Any, composes: bool) -> None:
    model = model if composes else build("llama", 0)
    members = {m.role: m.model for m in model.members} if composes else {"base": model}
    usable = model.usable_ids if composes else 256
    other = prompts(3, 12, seed=5)

    class Beside(Collector):
        """Calls the model after each token, in another thread and in this one."""

        def put(self, value: torch.Tensor) -> None:
            short = functools.partial(run, model, other, torch.ones_like(other), max_new_tokens=2, do_sample=False)
            thread = Thread(target=short)
            thread.start()
            thread.join()
            short()

    ids = prompts(1)
    with proxytune.record(model) as recording:
        # The other thread's calls are recorded too, as calls of their own.
        out = run(model, ids, torch.ones_like(ids), do_sample=False, eos_token_id=None, streamer=Beside())
    text = recording[-1]
    assert text.tokens.tolist() == out[0, 12:].tolist()
    assert len(recording) == 3 * (NEW + 1) + 1
    for text in (recording[0], recording[-1]):
        assert_right(members, text, usable)


def test_the_model_of_a_pickle_is_not_recorded() -> None:
    base = build("llama", 0)
    ids, mask = padded()
    with proxytune.record(base) as recording:
        run(base, ids, mask, max_new_tokens=2)
        copied = pickle.loads(pickle.dumps(base))
        run(copied, ids, mask, max_new_tokens=2)
    assert len(recording) == 3
    with proxytune.record(copied) as recording:
        run(copied, ids, mask, max_new_tokens=2)
    assert len(recording) == 3
