"""The fused loop: the same tokens as transformers' own loop in greedy decoding, the same law in sampling."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.reference import next_logits
from support.tiny import EOS, PAD, build, shared, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import proxytune
from proxytune import FusedDecoding, ops
from proxytune.errors import InputError, NumericalError, UnsupportedModeError
from proxytune.generation.processor_plan import plan_processors
from proxytune.models.assisted import TailMask

ALPHA = 0.7
NEW = 12
USABLE = 250


def composed(*, vocab: int = USABLE, alpha: float = ALPHA, dtype: torch.dtype | None = None) -> Any:
    """A base of 256 ids with two GPT-2 companions of another width."""
    if dtype is None:
        members = [shared("llama", 1), shared("gpt2", 2, vocab), shared("gpt2", 3, vocab)]
    else:
        members = [build(k, s, v).to(dtype) for k, s, v in (("llama", 1, 256), ("gpt2", 2, vocab), ("gpt2", 3, vocab))]
    base, expert, antiexpert = members
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=alpha, check_vocabulary=False)


@pytest.fixture(params=["composed", "plain"])
def model(request: pytest.FixtureRequest) -> Any:
    return composed() if request.param == "composed" else shared("llama", 1)


def prompts(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 240, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded at the left."""
    ids, mask = prompts(3), torch.ones(3, 12, dtype=torch.long)
    for row, n in ((1, 5), (2, 9)):
        ids[row, :n], mask[row, :n] = PAD, 0
    return ids, mask


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW} | kwargs)


class Discourage(LogitsProcessor):
    """A processor of the user's own, which depends on the text: no token twice as likely as it was the last time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -3.0))


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


class FirstRowOnly(StoppingCriteria):
    """Row 0 is finished at once, without an EOS; the others never are."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.arange(input_ids.shape[0]) == 0


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
            past_key_values=cache,
            return_dict_in_generate=True,
            custom_generate=FusedDecoding(),
            **settings,
        )
        assert torch.equal(out.sequences, want), f"turn {turn}"
        cache = out.past_key_values
        ids = torch.cat([want, prompts(3, 4, seed=10 + turn)], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


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


# --- sampling: the law ----------------------------------------------------------------------------------------------

VOCAB = 12
DRAWS = 4000


@functools.cache
def tiny_members() -> list[PreTrainedModel]:
    """A base of 12 ids and companions of 11: one id cannot be embedded, so it must never come."""
    members = [build("llama", 31, VOCAB), build("llama", 32, VOCAB - 1), build("llama", 33, VOCAB - 1)]
    for member in members:
        member.lm_head.weight.data.mul_(0.4)  # flat enough for many outcomes
    return members


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The p-value of counts under a distribution; cells that expect fewer than 5 are pooled."""
    assert int(counts[p == 0].sum()) == 0, "an impossible outcome was drawn"
    expected = p * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    want = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, want = seen[want > 0], want[want > 0]
    statistic = ((seen - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2))


def law(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, processors: list[Any]) -> torch.Tensor:
    """`[V, V]`: the exact distribution of the next two tokens, in float64, by transformers' own processors."""

    def following(prefix: torch.Tensor) -> torch.Tensor:
        return LogitsProcessorList(processors)(prefix[None], logits(prefix).double()[None])[0].softmax(-1)

    first = following(ids)
    rows = [
        following(torch.cat([ids, torch.tensor([t])])) if first[t] > 0 else torch.zeros(VOCAB) for t in range(VOCAB)
    ]
    return first[:, None] * torch.stack([r.double() for r in rows])


# Settings of generate() beside the processors that they mean, so that the law does not come from the code under test.
LAWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 4}, [TopKLogitsWarper(4)]),
    "top-k-beyond-v": ({"top_k": 50}, []),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "all": (
        {"temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.06},
        [TemperatureLogitsWarper(1.4), TopKLogitsWarper(7), TopPLogitsWarper(0.9), MinPLogitsWarper(0.06)],
    ),
    "not-translatable": (
        {"temperature": 1.2, "typical_p": 0.8},
        [TemperatureLogitsWarper(1.2), TypicalLogitsWarper(0.8)],
    ),
    "penalty-before": (
        {"temperature": 0.8, "top_k": 6, "repetition_penalty": 1.4, "logits_processor": [Discourage()]},
        [RepetitionPenaltyLogitsProcessor(1.4), Discourage(), TemperatureLogitsWarper(0.8), TopKLogitsWarper(6)],
    ),
}


def draw_two(name: str, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each pair of tokens came, and its exact probability; both `[V²]`."""
    members = tiny_members()
    settings, processors = LAWS[name]
    text = torch.tensor([5, 7, 9, 4])
    # Padding at the left, except with the penalty, of which versions differ in whether it counts.
    pads = 0 if "repetition_penalty" in settings else 2
    ids = torch.nn.functional.pad(text, (pads, 0), value=PAD)[None]
    mask = torch.tensor([[0] * pads + [1] * 4])
    if kind == "plain":
        model: Any = members[0]
        reference = lambda prefix: model(prefix[None], use_cache=False).logits[0, -1]  # noqa: E731
    else:
        base, expert, antiexpert = members
        model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
        reference = lambda prefix: next_logits(members, ALPHA, prefix)  # noqa: E731
    with torch.no_grad():
        p = law(reference, text, processors)
    got = model.generate(
        ids,
        attention_mask=mask,
        custom_generate=FusedDecoding(seed=seed),
        **{"top_k": 0, "top_p": 1.0, "temperature": 1.0} | settings,
        do_sample=True,
        max_new_tokens=2,
        eos_token_id=None,
        num_return_sequences=DRAWS,
    )[:, -2:]
    return torch.bincount(got[:, 0] * VOCAB + got[:, 1], minlength=VOCAB * VOCAB), p.flatten()


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["composed", "plain"])
@pytest.mark.parametrize("name", LAWS)
def test_the_law_of_the_first_two_tokens(name: str, kind: str) -> None:
    counts, p = draw_two(name, kind, seed=11)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert (p > 0).sum() > 6, "nothing to test"
    assert chi_square(counts, p) > 1e-4


def test_a_wrong_law_is_noticed() -> None:
    counts, p = draw_two("plain", "composed", seed=11)
    warmer = p**0.8 / (p**0.8).sum()
    assert chi_square(counts, warmer) < 1e-4
    flipped = p.reshape(VOCAB, VOCAB).T.flatten()  # the second token as if it were the first
    with pytest.raises(AssertionError, match="impossible|assert"):
        assert chi_square(counts, flipped) > 1e-4


# --- draws are keyed ------------------------------------------------------------------------------------------------

SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos_token_id": None}


@pytest.mark.smoke
def test_a_seed_repeats_and_another_differs(model: Any) -> None:
    one, again, other = (run(model, prompts(), custom_generate=FusedDecoding(seed=s), **SAMPLE) for s in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(r) for r in run(model, prompts(1).repeat(3, 1), custom_generate=FusedDecoding(seed=5), **SAMPLE)
                .tolist()}) == 3  # fmt: skip


def test_without_a_seed_torchs_generator_governs(model: Any) -> None:
    loop = FusedDecoding()

    def draw() -> torch.Tensor:
        return model.generate(prompts(), max_new_tokens=NEW, custom_generate=loop, **SAMPLE)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    # With a seed, and without draws, nobody else's random numbers change.
    state = torch.get_rng_state()
    model.generate(prompts(), max_new_tokens=2, custom_generate=FusedDecoding(seed=0), **SAMPLE)
    model.generate(prompts(), max_new_tokens=2, custom_generate=loop, do_sample=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.smoke
@pytest.mark.parametrize("extra", [{}, {"logits_processor": [Discourage()]}], ids=["fused", "processor-before"])
def test_a_row_alone_is_the_row_in_a_padded_batch(model: Any, extra: dict[str, Any]) -> None:
    ids, mask = padded()
    batch = run(model, ids, mask, custom_generate=FusedDecoding(seed=9), num_return_sequences=2, **SAMPLE, **extra)
    for row in range(6):
        text = ids[row // 2][mask[row // 2].bool()][None]
        for stream in ([row], torch.tensor([row])):
            alone = run(model, text, custom_generate=FusedDecoding(seed=9, stream_ids=stream), **SAMPLE, **extra)
            assert torch.equal(alone[0, text.shape[1] :], batch[row, 12:]), f"row {row}"


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 9, "top_p": 0.9}]
)
def test_the_kernels_draw_the_same_tokens(model: Any, settings: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    ids, mask = padded()
    loops = [FusedDecoding(seed=3, impl=impl) for impl in ("torch", "triton")]
    with np.errstate(all="ignore"):  # Triton's interpreter computes in NumPy
        torchs, kernels = (run(model, ids, mask, max_new_tokens=6, custom_generate=x, **settings) for x in loops)
    assert torch.equal(torchs, kernels)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_draws_go_on_in_the_next_turn(model: Any, padding: str) -> None:
    """Positions count the tokens of the text, whether they are fed again, cached, or just drawn."""
    ids, mask = padded() if padding == "left" else (prompts(), torch.ones(3, 12, dtype=torch.long))
    loop = {"custom_generate": FusedDecoding(seed=4), **SAMPLE}
    whole = run(model, ids, mask, **loop)
    half = run(model, ids, mask, **loop | {"max_new_tokens": 5, "return_dict_in_generate": True})
    longer = torch.nn.functional.pad(mask, (0, 5), value=1)
    rest = run(model, half.sequences, longer, **loop | {"max_new_tokens": NEW - 5})
    assert torch.equal(rest, whole)
    rest = run(
        model,
        half.sequences,
        longer,
        past_key_values=copy.deepcopy(half.past_key_values),
        **loop | {"max_new_tokens": NEW - 5},
    )
    assert torch.equal(rest, whole)
    # Only the one token that the cache has not seen, with the mask of the whole text.
    last = half.sequences[:, -1:]
    rest = run(model, last, longer, past_key_values=half.past_key_values, **loop | {"max_new_tokens": NEW - 5})
    assert torch.equal(rest[:, 1:], whole[:, 17:])


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
def test_draws_do_not_depend_on_the_cache(model: Any, cache: dict[str, Any]) -> None:
    ids, mask = padded()
    loop = {"custom_generate": FusedDecoding(seed=4), **SAMPLE}
    assert torch.equal(run(model, ids, mask, **loop, **cache), run(model, ids, mask, **loop))


def test_at_alpha_0_the_draws_are_the_bases() -> None:
    steered = composed(vocab=256, alpha=0.0)
    loop = {"custom_generate": FusedDecoding(seed=2), **SAMPLE}
    ids, mask = padded()
    assert torch.equal(run(steered, ids, mask, **loop), run(steered.base, ids, mask, **loop))
    steered.alpha = ALPHA
    assert not torch.equal(run(steered, ids, mask, **loop), run(steered.base, ids, mask, **loop))


@pytest.mark.smoke
@pytest.mark.parametrize("extra", [{}, {"no_repeat_ngram_size": 2}], ids=["fused", "penalty-before"])
def test_the_tokens_do_not_depend_on_the_report(model: Any, extra: dict[str, Any]) -> None:
    ids, mask = padded()
    loop = {"custom_generate": FusedDecoding(seed=8), **SAMPLE, **extra}
    quiet = run(model, ids, mask, **loop)
    show = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = run(model, ids, mask, **loop, **show)
    assert torch.equal(out.sequences, quiet)
    # The report is that of transformers: its own loop, made to follow these very tokens.
    warpers = [TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.95)]
    forced = Follow(quiet)
    theirs = run(model, ids, mask, **SAMPLE, **extra, **show, logits_processor=[forced])
    assert torch.equal(theirs.sequences, quiet)
    for step in range(NEW):
        torch.testing.assert_close(out.logits[step], theirs.logits[step], atol=1e-4, rtol=1e-4)
        want = LogitsProcessorList(warpers)(quiet[:, : 12 + step], forced.seen[step])
        kept = torch.isfinite(want)
        # A tie of rounding at the border of the nucleus may fall either way.
        assert (torch.isfinite(out.scores[step]) != kept).sum() <= 1
        both = kept & torch.isfinite(out.scores[step])
        torch.testing.assert_close(out.scores[step][both], want[both], atol=1e-4, rtol=1e-4)
        drawn = quiet[:, 12 + step, None]
        assert torch.isfinite(out.scores[step].gather(1, drawn)).all()


class Follow(LogitsProcessor):
    """Lets nothing but given sequences through, and keeps what it was given."""

    def __init__(self, sequences: torch.Tensor) -> None:
        self.sequences, self.seen = sequences, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        target = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, target, 0.0)


def test_ids_that_a_member_cannot_embed_are_never_drawn() -> None:
    for extra in ({}, {"repetition_penalty": 1.1}):
        out = run(
            composed(),
            prompts(1),
            custom_generate=FusedDecoding(seed=1),
            **SAMPLE | {"temperature": 50.0, "top_k": 0, "top_p": 1.0},
            **extra,
            num_return_sequences=64,
        )
        assert 240 < int(out[:, 12:].max()) < USABLE


# --- the fast path --------------------------------------------------------------------------------------------------


class Calls:
    """Counts the calls of `ops.step`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.members: list[list[torch.Tensor]] = []
        self.want: list[tuple[str, ...]] = []
        self.sampling: list[Any] = []
        inner = ops.step

        def step(members: Any, weights: Any = (1.0,), **kwargs: Any) -> ops.StepOutput:
            self.members.append(list(members))
            self.want.append(tuple(kwargs.get("want", ("tokens",))))
            self.sampling.append(kwargs.get("sampling"))
            return inner(members, weights, **kwargs)

        monkeypatch.setattr(ops, "step", step)


def forbid(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not on the fast path")

    for owner, name in places:
        monkeypatch.setattr(owner, name, never)


@pytest.mark.smoke
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_what_can_be_fused_is_one_step(model: Any, do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    warpers = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TailMask)
    forbid(monkeypatch, (ops, "combine"), *((w, "__call__") for w in warpers))
    settings = {**SAMPLE, "min_p": 0.02} if do_sample else {"do_sample": False, "eos_token_id": None}
    run(model, prompts(), custom_generate=FusedDecoding(seed=0), **settings)
    assert calls.want == [("tokens",)] * NEW
    count, width = (3, USABLE) if hasattr(model, "formula") else (1, 256)
    for members in calls.members:
        assert len(members) == count
        assert members[0].shape == (3, width)
        assert members[0].stride(0) == 256, "a view of the base's rows, not a copy"
    for sampling in calls.sampling:
        assert (sampling is not None) == do_sample
        assert sampling is calls.sampling[0], "made once"
    if do_sample:
        s = calls.sampling[0]
        assert (s.largest_k, float(s.top_p[0])) == (40, pytest.approx(0.95))
        assert float(s.temperature[0]) == pytest.approx(0.9)
        assert float(s.log_min_p[0].exp()) == pytest.approx(0.02)


@pytest.mark.smoke
def test_what_cannot_runs_before_on_all_columns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    widths = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            widths.append((scores.shape[1], scores.dtype, bool((scores[:, USABLE:] == -torch.inf).all())))
            return scores

    forbid(monkeypatch, (TemperatureLogitsWarper, "__call__"), (TopKLogitsWarper, "__call__"))
    run(model, prompts(), custom_generate=FusedDecoding(seed=0), logits_processor=[Look()], **SAMPLE)
    assert calls.want == [("scores",), ("tokens",)] * NEW
    assert widths == [(256, torch.float32, hasattr(model, "formula"))] * NEW
    assert all(len(members) == 1 and members[0].shape == (3, 256) for members in calls.members[1::2])


T, K, P, M = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)


class Mine(TopKLogitsWarper):
    """A subclass may do anything."""


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("processors", "before", "warpers"),
    [
        ([], 0, 0),
        ([T, K, P, M], 0, 4),
        ([T, P], 0, 2),
        ([Discourage(), T, K], 1, 2),
        ([K, T], 1, 1),  # top-k first is another law only by name, but it is not what the step does
        ([T, K, P, TypicalLogitsWarper(0.9)], 4, 0),
        ([T, T], 1, 1),
        ([M, P], 1, 1),
        ([T, Mine(5), P], 2, 1),
        ([T, TopKLogitsWarper(5, min_tokens_to_keep=3)], 2, 0),
        ([T, TopPLogitsWarper(0.9, filter_value=-1e4), M], 2, 1),
        ([T, TopPLogitsWarper(0.0)], 2, 0),
        ([TemperatureLogitsWarper(1e-60), K], 1, 1),
        ([TemperatureLogitsWarper(1e60), K], 1, 1),
        ([TopPLogitsWarper(1e-60)], 1, 0),
        ([MinPLogitsWarper(0.0)], 0, 1),
        ([MinPLogitsWarper(1.0)], 0, 1),
        ([TopPLogitsWarper(1.0)], 0, 1),
        ([TopKLogitsWarper(2**40), P], 1, 1),
    ],
)
def test_translation(processors: list[LogitsProcessor], before: int, warpers: int) -> None:
    for tail in ([], [TailMask(250)]):
        found = plan_processors([*tail, *processors], do_sample=True)
        assert found.usable == (250 if tail else None)
        assert list(found.before) == processors[:before]
        assert list(found.warpers) == processors[before:]
        assert len(found.warpers) == warpers
        found.sampling(2, 8, torch.device("cpu"))  # the settings are ones that the step takes
    greedy = plan_processors(processors, do_sample=False)
    assert list(greedy.before) == processors
    assert not greedy.warpers


def test_a_tail_mask_elsewhere_runs_as_it_is() -> None:
    found = plan_processors([TailMask(250), Discourage(), TailMask(250), T], do_sample=True)
    assert found.usable == 250
    assert [type(p) for p in found.before] == [Discourage, TailMask]


# --- the host -------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU, or copy to it from the host's memory, outside of forward passes."""

    NAMES = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.copies, self.paused, self._inside = 0, 0, False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.reads += func is torch.ops.aten._local_scalar_dense.default and not self._inside
            self.reads += func in (torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
            self.copies += func is torch.ops.aten.lift_fresh.default
        return func(*args, **kwargs or {})

    @contextmanager
    def counting(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def patched(name: str) -> Any:
            inner = getattr(torch.Tensor, name)

            def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.reads += not self.paused and not self._inside
                outer, self._inside = self._inside, True
                try:
                    return inner(tensor, *args, **kwargs)
                finally:
                    self._inside = outer

            return call

        def pause(*_: Any) -> None:
            self.paused = True

        def go_on(*_: Any) -> None:
            self.paused = False

        hooks = [model.register_forward_pre_hook(pause), model.register_forward_hook(go_on)]
        with monkeypatch.context() as patch, self:
            for name in self.NAMES:
                patch.setattr(torch.Tensor, name, patched(name))
            yield
        for hook in hooks:
            hook.remove()


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, SAMPLE, {**SAMPLE, "min_p": 0.02}], ids=["greedy", "three", "four"])
def test_the_host_waits_once_per_step(model: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, the step reads on the CPU by design; what it does on a GPU is tested where the step is.
    def step(members: Any, weights: Any, **kwargs: Any) -> ops.StepOutput:
        return ops.StepOutput(tokens=members[0].argmax(-1, keepdim=True))

    monkeypatch.setattr(ops, "step", step)
    found = []
    for new in (3, 4, 11):
        reads = Reads()
        with reads.counting(model, monkeypatch):
            run(
                model,
                prompts(),
                custom_generate=FusedDecoding(seed=0),
                **{"do_sample": False} | settings | {"eos_token_id": EOS, "min_new_tokens": None},
                max_new_tokens=new,
            )
        found.append((reads.reads, reads.copies))
    assert found[0][0] > 3, "nothing was counted"
    assert found[1][0] - found[0][0] == 1
    assert found[2][0] - found[0][0] == 8
    assert found[0][1] == found[1][1] == found[2][1], "a step makes tensors of the host's numbers"


# --- rows without a distribution ------------------------------------------------------------------------------------


@contextmanager
def broken(member: PreTrainedModel, row: int, step: int, value: float) -> Iterator[None]:
    """From some step on, one logit of a row is no number (or all are, if it is −inf)."""
    calls = itertools.count()

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if next(calls) >= step:
            output.logits = output.logits.clone()
            output.logits[row, -1, slice(None) if value == -torch.inf else slice(7, 8)] = value
        return output

    hook = member.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.smoke
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{"do_sample": False}, SAMPLE, {**SAMPLE, "repetition_penalty": 1.1}])
def test_a_row_that_is_no_distribution(model: Any, settings: dict[str, Any], value: float) -> None:
    why = "−inf for every token" if value == -float("inf") else r"NaN or \+inf"
    member = getattr(model, "base", model)
    pattern = rf"row 1 of 3, step 4 \(new tokens counted from 0\): expected .* got {why}"
    settings = {**settings, "eos_token_id": None, "custom_generate": FusedDecoding(seed=0)}
    with broken(member, 1, 4, value), pytest.raises(NumericalError, match=pattern):
        run(model, prompts(), **settings)
    with broken(member, 1, 4, value):  # one step earlier, nothing is wrong
        assert run(model, prompts(), max_new_tokens=4, **settings).shape == (3, 16)


def test_a_companion_that_is_no_distribution() -> None:
    model = composed()
    with broken(model.expert, 2, 0, float("nan")), pytest.raises(NumericalError, match="row 2 of 3, step 0 "):
        run(model, prompts(), do_sample=False, custom_generate=FusedDecoding())
    with broken(model.expert, 2, 0, -float("inf")):  # the base owns the support: this is no opinion
        run(model, prompts(), do_sample=False, custom_generate=FusedDecoding())


@pytest.mark.smoke
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_finished_row_may_be_anything(model: Any, do_sample: bool) -> None:
    settings = {**SAMPLE, "do_sample": do_sample, "custom_generate": FusedDecoding(seed=0)}
    if not do_sample:
        settings = {"do_sample": False, "custom_generate": FusedDecoding()}
    free = run(model, prompts(), **settings | {"eos_token_id": None})
    end = int(free[1, 14])
    want = run(model, prompts(), **settings | {"eos_token_id": end})
    assert (want[1, 15:] == PAD).all()
    assert want.shape[1] == 24
    with broken(getattr(model, "base", model), 1, 3, float("nan")):
        assert torch.equal(run(model, prompts(), **settings | {"eos_token_id": end}), want)
    # Without an EOS no row is padded, and a finished one goes on with any token that can be embedded.
    stop = {"eos_token_id": None, "stopping_criteria": [FirstRowOnly()]}
    with broken(getattr(model, "base", model), 0, 3, float("nan")):
        got = run(model, prompts(), **settings | stop)
    assert torch.equal(got[1:], free[1:])
    assert (got[0, 15:] == 0).all()


def test_nothing_is_streamed_of_a_step_that_fails() -> None:
    streamer, model = Collector(), composed()
    with broken(model.base, 1, 2, float("nan")), pytest.raises(NumericalError):
        run(model, prompts(), do_sample=False, streamer=streamer, custom_generate=FusedDecoding())
    assert len(streamer.got) == 3  # the prompt and two steps


def test_a_constraint_that_leaves_nothing_and_the_remedies(model: Any) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf)

    with pytest.raises(NumericalError, match="row 0 of 3, step 0 .*−inf for every token, after the logits processors"):
        run(model, prompts(), logits_processor=[Nothing()], custom_generate=FusedDecoding(seed=0), **SAMPLE)
    with broken(getattr(model, "base", model), 1, 4, float("nan")):
        settings = {**SAMPLE, "remove_invalid_values": True}
        assert run(model, prompts(), custom_generate=FusedDecoding(seed=0), **settings).shape == (3, 24)


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
