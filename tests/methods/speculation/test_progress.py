"""Where texts end inside drafts, and processors that look at them: as in transformers' own loop, token for token."""

from typing import Any

import pytest
import torch
from support.speculation import composed, draft, members, prompts
from support.tiny import PAD, tokenizer
from transformers import LogitsProcessor, StoppingCriteria, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from proxytune import SpeculativeDecoding
from proxytune.errors import UnsupportedModeError
from proxytune.methods.speculation import ModelDraft, PromptLookupDraft
from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor
from proxytune.models.members.cache_name import CACHE

NEW = 18


def run(model: Any, loop: Any = None, ids: Any = None, mask: Any = None, **kwargs: Any) -> Any:
    if ids is None:
        ids, mask = prompts()
    loops = {} if loop is None else {"custom_generate": loop}
    settings = {"max_new_tokens": NEW, "pad_token_id": PAD, "do_sample": False} | kwargs
    return model.generate(ids, attention_mask=mask, **settings, **loops)


def loops(kind: str) -> list[SpeculativeDecoding]:
    model = members(kind)[0]
    return [
        SpeculativeDecoding(draft=ModelDraft(model), draft_tokens=5),
        SpeculativeDecoding(draft="expert", draft_tokens=3),
        SpeculativeDecoding(draft=draft("lookup", kind), draft_tokens=2),
    ]


def same_everywhere(kind: str = "mistral", **kwargs: Any) -> torch.Tensor:
    """That every loop gives what transformers gives, on a plain model and on the composed one; the latter's."""
    for model, some in ((members(kind)[0], loops(kind)[::2]), (composed(kind), loops(kind))):
        want = run(model, **kwargs)
        for loop in some:
            assert torch.equal(run(model, loop, **kwargs), want), loop
    return want


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_ends_of_text_inside_drafts() -> None:
    free = run(composed("mistral"), eos_token_id=None)[:, 12:]
    for ends in ([int(free[0, 7])], [int(free[1, 4]), int(free[2, 9])], [int(free[0, 0])], free[:, 3].tolist()):
        got = same_everywhere(eos_token_id=ends)
        assert (got[:, 12:] == PAD).any() or got.shape[1] < 12 + NEW


class At(StoppingCriteria):
    """Rows end at lengths of their own, without an EOS."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= 12 + self.lengths.expand(len(input_ids))


class Hears(StoppingCriteria):
    """Notes what it is asked about, and never ends anything."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.heard.append(input_ids[0].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_criteria_hear_of_no_token_that_does_not_stand() -> None:
    """With one row and drafts of one token: of each once, also where a whole draft is accepted, and no other."""
    ids, mask = prompts(1)
    loop = SpeculativeDecoding(draft_tokens=1)
    criterion = Hears()
    out = run(
        composed("mistral"),
        loop,
        ids,
        mask,
        eos_token_id=None,
        stopping_criteria=[criterion],
        return_dict_in_generate=True,
    )
    text = out.sequences[0].tolist()
    assert out.accepted.sum() > 0
    assert out.rejected.sum() > 0
    # Behind a rejected draft there is padding.
    heard = [x for x in criterion.heard if x[-1] != PAD]
    assert PAD not in text[12:]
    assert heard == [text[:n] for n in range(13, len(text) + 1)]


class Says(StoppingCriteria):
    """A row ends once it has said a token twice in a row of two."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == input_ids[:, -2] % 5


@pytest.mark.smoke
@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("criterion", [At(3, 8, 1, 5), At(4), At(1, 99, 2, 2), Says()])
def test_criteria_of_ones_own(criterion: StoppingCriteria, eos: int | None) -> None:
    got = same_everywhere(eos_token_id=eos, stopping_criteria=[criterion])
    if eos is None and isinstance(criterion, At):
        assert got.shape[1] == 12 + min(NEW, int(criterion.lengths.max())), "rows go on until the last has ended"


SHORT: list[dict[str, Any]] = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_time": 0.0},
    {"max_length": 15, "max_new_tokens": None},
]


@pytest.mark.parametrize("settings", SHORT)
def test_short_texts(settings: dict[str, Any]) -> None:
    same_everywhere(eos_token_id=None, **settings)


def test_stop_strings() -> None:
    free = run(composed("mistral"), eos_token_id=None)[:, 12:]
    letters = [tokenizer().decode(t) for t in free[0]]
    first = next(t for t in range(2, NEW) if letters[t].isascii() and letters[t].isprintable())
    want = run(composed("mistral"), eos_token_id=2, stop_strings=[letters[first]], tokenizer=tokenizer())
    for loop in loops("mistral"):
        got = run(composed("mistral"), loop, eos_token_id=2, stop_strings=[letters[first]], tokenizer=tokenizer())
        assert torch.equal(got, want)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("eos", [None, 2])
def test_nothing_is_streamed_or_cached_behind_an_end_inside_a_draft(eos: int | None) -> None:
    model, streamer = composed("llama"), Collector()
    ids, mask = prompts(1)
    kwargs = {"ids": ids, "mask": mask, "eos_token_id": eos, "stopping_criteria": [At(9)]}
    want = run(model, return_dict_in_generate=True, **kwargs)
    loop = SpeculativeDecoding(draft=ModelDraft(model.base), draft_tokens=6)
    out = run(model, loop, return_dict_in_generate=True, streamer=streamer, **kwargs)
    assert torch.equal(out.sequences, want.sequences)
    assert streamer.got == out.sequences[0].tolist()
    assert streamer.ended == 1
    assert out.past_key_values.get_seq_length() == want.past_key_values.get_seq_length() == 20
    text = torch.cat([want.sequences, torch.tensor([[7, 8]])], 1)
    again = run(model, None, text, None, **{CACHE: out.past_key_values}, eos_token_id=None)
    assert torch.equal(again, run(model, None, text, None, eos_token_id=None))


def test_a_row_that_has_ended_without_an_eos_may_be_anything() -> None:
    model, calls = composed("llama"), [0]
    want = run(model, eos_token_id=None)

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        if calls[0] > 3:
            output.logits = output.logits.clone()
            output.logits[0] = float("nan")
        return output

    hook = model.base.register_forward_hook(spoil)
    try:
        loop = SpeculativeDecoding(draft=PromptLookupDraft(), draft_tokens=2)
        got = run(model, loop, eos_token_id=None, stopping_criteria=[At(1, 99, 99, 99)])
    finally:
        hook.remove()
    assert torch.equal(got[1:], want[1:])
    assert got[0, 12] == want[0, 12]


# --- processors -----------------------------------------------------------------------------------------------------


class Counts(LogitsProcessor):
    """The user's own: the more often a token stands in the text, the less likely; and another one for each length."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = scores.scatter_add(1, input_ids, torch.full(input_ids.shape, -1.5))
        out[:, input_ids.shape[1] % 7 :: 7] += 2.0
        return out


def by_row(batch: int, text: torch.Tensor) -> list[int]:
    return [40 * batch + (len(text) * 7) % 40 + 3, 40 * batch + int(text[-1]) % 40 + 3, 40 * batch + 12]


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 6, "eos_token_id": list(range(3, 120)), "forced_eos_token_id": 5},
    "min-length": {"min_length": 16, "eos_token_id": list(range(3, 120))},
    "decay": {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 77},
    "bad-words": {"bad_words_ids": [[w] for w in range(3, 60)] + [[a, b] for a in range(60, 90) for b in (100, 120)]},
    "suppressed": {"suppress_tokens": list(range(3, 80)), "begin_suppress_tokens": list(range(80, 200))},
    "bias": {"sequence_bias": [[[w], 4.0] for w in range(100, 130)] + [[[105, 106], 6.0]]},
    "by-row": {"prefix_allowed_tokens_fn": by_row},
    "watermark": {"watermarking_config": WatermarkingConfig(greenlist_ratio=0.3, bias=4.0)},
    "own": {"logits_processor": [Counts()]},
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_see_the_text_as_it_would_stand(name: str) -> None:
    settings = {"eos_token_id": None} | PROCESSORS[name]
    got = same_everywhere(**settings)
    assert not torch.equal(got, run(composed("mistral"), eos_token_id=None)), "the processor does nothing"


def test_a_budget_of_thinking() -> None:
    def budget() -> ThinkingBudgetLogitsProcessor:
        return ThinkingBudgetLogitsProcessor([33, 34], prompt_length=12, max_thinking_tokens=7)

    model = composed("mistral")
    want = run(model, eos_token_id=None, logits_processor=[budget()])
    assert want[:, 12:].tolist() != run(model, eos_token_id=None)[:, 12:].tolist()
    for loop in loops("mistral"):
        assert torch.equal(run(model, loop, eos_token_id=None, logits_processor=[budget()]), want)


@pytest.mark.smoke
def test_what_counts_its_calls_is_refused() -> None:
    mark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    for model in (composed("llama"), members("llama")[0]):
        with pytest.raises(UnsupportedModeError, match="guidance_scale: expected processors that depend on the text"):
            run(model, loops("llama")[0], guidance_scale=1.5)
        with pytest.raises(UnsupportedModeError, match="watermarking_config: expected processors that depend"):
            run(model, loops("llama")[0], do_sample=True, watermarking_config=mark)


def test_scores_and_logits_are_those_of_plain_decoding() -> None:
    model = composed("gpt2")
    show = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    for ids, mask in (prompts(), prompts(1)):
        want = run(model, None, ids, mask, eos_token_id=None, **show)
        out = run(model, SpeculativeDecoding(draft_tokens=3), ids, mask, eos_token_id=None, **show)
        assert out.accepted.sum() > 2
        assert len(out.scores) == len(out.logits) == NEW
        for ours, theirs in zip(out.scores + out.logits, want.scores + want.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    # A row's end: what follows is certain padding.
    end = int(want.sequences[0, 15])
    out = run(model, SpeculativeDecoding(draft_tokens=3), *prompts(), eos_token_id=end, **show)
    row = out.sequences[0, 12:].tolist()
    stop = row.index(end) if end in row else len(row)
    for score in out.scores[stop + 1 :]:
        assert score[0].argmax() == PAD
        assert torch.isinf(score[0]).sum() == 255
