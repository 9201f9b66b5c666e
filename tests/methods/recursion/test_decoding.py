"""Recursion decoding: every trajectory is the reference's, whatever the cache, the padding and the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.recursion import CLOSE, MODES, NEW, SEED, How, check, continued, hrm, model_of, padded, prompts, run
from support.tiny import PAD, tokenizer
from transformers import HrmTextConfig, HrmTextForCausalLM, StoppingCriteria, StopStringCriteria

from proxytune import FusedDecoding, RecursionDecoding
from proxytune.errors import InputError, UnsupportedModeError

# --- the same as the reference, whatever the cache and the padding ---------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_every_trajectory_is_that_of_the_reference(mode: str, padding: str) -> None:
    model = model_of()
    ids, mask = padded() if padding == "left" else (prompts(2), torch.ones(2, 8, dtype=torch.long))
    how = How(halt=1.0)  # wide: some positions halt, some do not
    loop = RecursionDecoding(sigma=how.sigma, trajectories=3, seed=SEED, halt=how.halt)
    out = run(model, loop, ids, mask, **MODES[mode])
    check(out, model, ids, mask, how, range(3))
    assert torch.isfinite(out.trajectories.mean_logprobs).all()
    assert 3 < int(out.trajectories.cycles.min()) < 3 * NEW


@pytest.mark.parametrize("when", ["once", "cycle", (1,), (0, 2)])
def test_when(when: Any) -> None:
    model, ids = model_of(), prompts(2)
    at = {"once": (0,), "cycle": (0, 1, 2)}.get(when, when)
    out = run(model, RecursionDecoding(sigma=0.5, when=when, trajectories=2, seed=SEED), ids)
    check(out, model, ids, torch.ones_like(ids), How(sigma=0.5, at=at), range(2))


def test_prefix_lm() -> None:
    # Prompts that attend in both directions: what belongs to a row goes along with its trajectories.
    model = hrm(2, prefix_lm=True)
    ids, mask = padded()
    settings = {"token_type_ids": torch.ones_like(ids)}
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **settings)
    none = run(model, RecursionDecoding(sigma=0.0, trajectories=2), ids, mask, **settings)
    assert torch.equal(none.sequences, plain)
    loop = RecursionDecoding(sigma=0.3, trajectories=3, seed=SEED, select=None)
    out = run(model, loop, ids, mask, **settings)
    alone = run(
        model,
        RecursionDecoding(sigma=0.3, trajectories=[2], stream_ids=[1], seed=SEED),
        ids[1:2, 3:],
        mask[1:2, 3:],
        token_type_ids=torch.ones(1, 5, dtype=torch.long),
    )
    assert torch.equal(out.trajectories.sequences[1, 2, 3:], alone.sequences[0])


def test_prompts_of_embeddings() -> None:
    model, (ids, mask) = model_of(), padded()
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    want = run(model, loop, ids, mask)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    embedded = model.model.embed_tokens(ids).detach()
    got = model.generate(inputs_embeds=embedded, attention_mask=mask, custom_generate=loop, **given)
    assert torch.equal(got.trajectories.sequences, want.trajectories.sequences[..., 8:])
    assert torch.equal(got.sequences, want.sequences[:, 8:])


# --- no noise, no difference -----------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("halt", [None, 1e-9])
def test_without_noise_nothing_changes(halt: float | None) -> None:
    (ids, mask), model = padded(), hrm(dtype=torch.float32)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    out = run(model, RecursionDecoding(sigma=0.0, trajectories=3, seed=1, halt=halt), ids, mask)
    assert torch.equal(out.sequences, want)
    assert bool((out.trajectories.sequences == want[:, None]).all())
    assert torch.equal(out.trajectories.cycles, torch.full((3, 3), 3 * NEW))
    quiet = run(model, RecursionDecoding(sigma=0.0, trajectories=1), ids, mask, return_dict_in_generate=False)
    assert torch.equal(quiet, want)
    assert out.trajectories.values is None


def test_draws_are_those_of_the_fused_loop() -> None:
    model, ids = model_of(), prompts(2)
    warm = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    out = run(model, RecursionDecoding(sigma=0.0, trajectories=3, seed=SEED, select=None), ids, **warm)
    assert out.chosen is None
    for i in range(3):
        loop = FusedDecoding(seed=SEED, stream_ids=[0, 1], branch_ids=[i, i])
        assert torch.equal(out.trajectories.sequences[:, i], run(model, loop, ids, **warm).sequences)
    with pytest.raises(InputError, match="branch"):
        run(model, FusedDecoding(branch_ids=[0]), ids, **warm)
    first = run(model, FusedDecoding(seed=SEED), ids, **warm).sequences
    assert torch.equal(out.trajectories.sequences[:, 0], first)
    assert torch.equal(out.sequences.view(2, 3, -1), out.trajectories.sequences)


def test_sampling_with_noise() -> None:
    # What is drawn is drawn from the noisy model, and scored by it at temperature 1.
    model, ids = model_of(), prompts(2)
    loop = RecursionDecoding(sigma=0.3, trajectories=2, seed=SEED)
    out = run(model, loop, ids, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=2)
    assert out.trajectories.sequences.shape[:2] == (4, 2)  # two rows for each prompt
    assert out.chosen.shape == (4,)
    texts = out.trajectories.sequences
    assert len({tuple(text.tolist()) for text in texts[:2].flatten(0, 1)}) == 4
    for b in range(4):
        for i in range(2):
            want = continued(model, ids[b // 2].tolist(), How(row=b, trajectory=i), ids=texts[b, i, 8:].tolist())
            assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(want.mean, abs=CLOSE)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_trajectories_differ_and_are_the_same_alone() -> None:
    model, (ids, mask) = model_of(), padded()
    out = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED), ids, mask).trajectories
    for b in range(3):
        assert len({tuple(text.tolist()) for text in out.sequences[b]}) > 1
    for b, i in ((0, 0), (1, 3), (2, 2)):
        alone = RecursionDecoding(sigma=0.4, trajectories=[i], stream_ids=[b], seed=SEED)
        got = run(model, alone, ids[b : b + 1][:, mask[b].bool()])
        start = int((mask[b] == 0).sum())
        assert torch.equal(got.sequences[0], out.sequences[b, i, start:])
        assert float(got.trajectories.mean_logprobs) == pytest.approx(float(out.mean_logprobs[b, i]), abs=CLOSE)
    more = run(model, RecursionDecoding(sigma=0.4, trajectories=6, seed=SEED), ids, mask).trajectories
    assert torch.equal(more.sequences[:, :4], out.sequences)
    other = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED + 1), ids, mask).trajectories
    assert not torch.equal(other.sequences, out.sequences)


def test_without_a_seed_calls_differ() -> None:
    model, ids = model_of(), prompts(2)
    loop = RecursionDecoding(sigma=0.6, trajectories=2)
    first, second = (run(model, loop, ids).trajectories.sequences for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    third = run(model, loop, ids).trajectories.sequences
    torch.manual_seed(9)
    assert torch.equal(run(model, loop, ids).trajectories.sequences, third)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_rows_end_by_themselves() -> None:
    model, ids = model_of(), prompts(2)
    how = How(sigma=0.4)
    free = run(model, RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED), ids).trajectories
    ends = int(free.sequences[0, 1, 10])
    loop = RecursionDecoding(sigma=0.4, trajectories=4, seed=SEED, select=lambda text: -len(text))
    out = run(model, loop, ids, eos_token_id=ends)
    lengths = []
    for b in range(2):
        for i in range(4):
            text = free.sequences[b, i, 8:].tolist()
            n = text.index(ends) + 1 if ends in text else NEW
            lengths.append(n)
            want = continued(model, ids[b].tolist(), How(how.sigma, row=b, trajectory=i), ids=text[:n])
            assert int(out.trajectories.lengths[b, i]) == n
            assert float(out.trajectories.mean_logprobs[b, i]) == pytest.approx(want.mean, abs=CLOSE)
            assert int(out.trajectories.cycles[b, i]) == 3 * n
            assert set(out.trajectories.sequences[b, i, 8 + n :].tolist()) <= {PAD}
    assert min(lengths) < NEW
    # The shortest were selected: nothing is left of the longer ones but what the batch needs.
    shortest = [min(lengths[:4]), min(lengths[4:])]
    assert out.sequences.shape[1] == 8 + max(shortest)
    assert out.scores.tolist() == [[-float(n) for n in lengths[:4]], [-float(n) for n in lengths[4:]]]


def test_stop_strings() -> None:
    model, ids = hrm(vocab_size=259), prompts(1)
    settings = {"sigma": 0.3, "trajectories": 3, "seed": SEED}
    free = run(model, RecursionDecoding(**settings, select=None), ids, max_new_tokens=12).trajectories.sequences[0]
    letters = [[tokenizer().decode(t) for t in text[8:]] for text in free]
    stop = next(c for c in letters[0] if c.isascii() and c.isprintable() and c.strip())
    criteria = [StopStringCriteria(tokenizer(), [stop])]
    out = run(
        model, RecursionDecoding(**settings, select=None), ids, max_new_tokens=12, stopping_criteria=criteria
    ).trajectories
    for i, text in enumerate(letters):
        assert int(out.lengths[0, i]) == (text.index(stop) + 1 if stop in text else 12)


class EndsAt(StoppingCriteria):
    """A row's end without an EOS token: the first of these tokens that it generates."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.isin(input_ids[:, 8:], self.ends).any(1)


@pytest.mark.parametrize("pad", [PAD, None])
def test_nothing_stands_behind_a_row_s_end(pad: int | None) -> None:
    model, ids = hrm(), prompts(2)
    model.generation_config.pad_token_id = model.config.pad_token_id = pad
    settings: dict[str, Any] = {"sigma": 0.4, "trajectories": 4, "seed": SEED}
    free = run(model, RecursionDecoding(**settings), ids).trajectories.sequences
    ends = [int(free[0, 1, 9]), int(free[1, 2, 10])]
    for select in ("logprob", None):
        out = run(model, RecursionDecoding(**settings, select=select), ids, stopping_criteria=[EndsAt(ends)])
        texts, lengths = out.trajectories.sequences, out.trajectories.lengths
        assert len(set(lengths.flatten().tolist())) > 1
        for b in range(2):
            for i in range(4):
                n = 8 + int(lengths[b, i])
                assert torch.equal(texts[b, i, :n], free[b, i, :n])
                filler = int(texts[b, i, n - 1]) if pad is None else pad
                assert set(texts[b, i, n:].tolist()) <= {filler}
        if select is None:
            assert torch.equal(out.sequences, texts.flatten(0, 1))
        else:
            assert torch.equal(out.sequences, texts[[0, 1], out.chosen][:, : out.sequences.shape[1]])
    # The fillers are seen at all: the loop itself goes on.
    assert int(lengths.min()) < texts.shape[2] - 8


def test_constraints_know_the_prompt() -> None:
    model, ids = model_of(), prompts(2)
    allowed = [[10, 11, 12], [20, 21, 22]]
    out = run(
        model,
        RecursionDecoding(sigma=0.5, trajectories=3, seed=SEED),
        ids,
        prefix_allowed_tokens_fn=lambda row, _: allowed[row],
    )
    for b in range(2):
        assert set(out.trajectories.sequences[b, :, 8:].flatten().tolist()) <= set(allowed[b])
    assert torch.isfinite(out.trajectories.mean_logprobs).all()


# --- one trajectory may be streamed ----------------------------------------------------------------------------------


class Collector:
    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    streamer = Collector()
    loop = RecursionDecoding(sigma=0.3, trajectories=1, seed=SEED, streamer=streamer)  # type: ignore[arg-type]
    out = run(model_of(), loop, prompts(1))
    assert streamer.got == out.sequences[0].tolist()
    assert streamer.ended
    with pytest.raises(UnsupportedModeError, match="streamer"):
        RecursionDecoding(sigma=0.3, trajectories=2, streamer=streamer)  # type: ignore[arg-type]


# --- the example of the page beside the code, with two prompts -------------------------------------------------------


def test_selections_of_a_batch() -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = HrmTextConfig(**sizes, **special, num_attention_heads=4, head_dim=8, H_cycles=2, prefix_lm=False)
    model = HrmTextForCausalLM(config).eval()
    loop = RecursionDecoding(sigma=0.2, when="cycle", trajectories=8, select="logprob", seed=0)
    out = model.generate(prompts(2), max_new_tokens=16, custom_generate=loop, return_dict_in_generate=True)
    assert out.trajectories.sequences.shape[:2] == (2, 8)
    assert out.chosen.shape == (2,)
    assert (out.trajectories.cycles % 2 == 0).all()
    last = RecursionDecoding(sigma=0.2, select="vote", answer=lambda ids: ids[-1], seed=0)
    voted = model.generate(prompts(2), max_new_tokens=16, custom_generate=last, return_dict_in_generate=True)
    assert voted.chosen.shape == (2,)
