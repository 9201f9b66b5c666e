"""Recurrent layers that go back: after any crop, logits are those of a cache-free forward over what is left."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.tiny import build, shared
from transformers import DynamicCache, PreTrainedModel

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.models.members import rewind, stateful_pass
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import length_of, make_rewindable, rewindable_layers

VOCABULARY = 96
# Recurrent layers beside attention, in several tokens at once and by single ones; states of a convolution alone; only
# recurrent layers.
FAMILIES = ["qwen3_5", "jamba", "lfm2", "mamba"]


class Text:
    """A batch of texts, what a recorded cache holds of them, and the member that reads them."""

    def __init__(self, model: PreTrainedModel, rows: int = 1, *, examined: bool = True) -> None:
        self.member = Member(model, "base")
        if examined:
            self.member.examine()
        self.cache = DynamicCache(config=model.config)
        make_rewindable(self.cache.layers)
        for layer in rewindable_layers(self.cache):
            layer.activate_past_recording()
        self.ids = torch.zeros(rows, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, count: int, *, keep: int | torch.Tensor = 0) -> int:
        """Read new tokens, compare their logits, and return the token forwards."""
        new, before = torch.randint(3, VOCABULARY, (len(self.ids), count)), self.member.token_forwards
        positions = torch.arange(self.ids.shape[1], self.ids.shape[1] + count)[None]
        got = self.member.forward(new, position_ids=positions, cache=self.cache, logits_to_keep=keep)
        self.ids = torch.cat([self.ids, new], 1)
        want = self.member.model(self.ids, use_cache=False).logits[:, -count:]
        torch.testing.assert_close(got, stateful_pass.kept_logits(want, keep), atol=2e-4, rtol=1e-4)
        assert length_of(self.cache) == self.ids.shape[1]
        return self.member.token_forwards - before

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.ids = self.ids[:, : self.ids.shape[1] - count]
        assert length_of(self.cache) == self.ids.shape[1]

    def reorder(self, *rows: int) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self.ids = self.ids[list(rows)]


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_that_are_rejected_in_part(family: str) -> None:
    text = Text(shared(family, 1, VOCABULARY))
    text.read(7)
    for drafted, rejected in ((4, 2), (4, 4), (3, 0), (5, 1), (1, 0), (4, 3), (2, 1), (6, 6), (1, 0)):
        text.read(drafted)
        text.crop(rejected)
    text.read(3, keep=2)
    text.crop(2)
    text.read(4, keep=torch.tensor([0, 3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_drafted_one_by_one_cost_one_forward_each(family: str) -> None:
    text = Text(shared(family, 1, VOCABULARY), rows=2)
    text.read(5)
    for rejected in (3, 0, 1, 4):
        assert [text.read(1) for _ in range(4)] == [2] * 4
        text.crop(rejected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_take_their_states_along(family: str) -> None:
    text = Text(shared(family, 1, VOCABULARY), rows=3)
    text.read(6)
    text.read(4)
    text.reorder(2, 0, 0, 1)
    text.crop(2)
    text.reorder(3, 3, 1)
    text.read(2)
    text.crop(3)
    text.read(1)
    for layer in rewindable_layers(text.cache):
        layer.batch_select_indices(torch.tensor([1]))
        layer.batch_repeat_interleave(2)
    if family == "mamba":
        text.ids = text.ids[[1, 1]]
        text.read(2)


def test_a_copy_goes_its_own_way() -> None:
    text = Text(shared("qwen3_5", 1, VOCABULARY))
    text.read(5)
    text.read(4)
    for copied in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        other = copy.copy(text)
        other.cache = copied(text.cache)
        other.crop(1)
        other.read(3)
    text.crop(3)
    text.read(2)


def test_what_is_read_again_is_read_in_the_next_pass_until_a_pass_of_its_own_is_cheaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, passes = Text(shared("qwen3_5", 1, VOCABULARY)), []
    run = text.member._pass

    def noted(given: dict[str, Any], *rest: Any) -> torch.Tensor:
        passes.append(given["input_ids"].shape[1])
        return run(given, *rest)

    monkeypatch.setattr(text.member, "_pass", noted)
    monkeypatch.setattr(text.member, "_seconds", lambda rows, positions: 10.0 + positions)
    text.read(8)
    for _ in range(6):
        text.read(4)
        text.crop(2)
    # Two more tokens behind in each round: 2 + 4 + 6 + 8 seconds are more than the 10 + 8 of a pass of their own.
    assert passes == [8, 4, 6, 8, 10, 8, 4, 6]


def test_kept_states_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(shared("qwen3_5", 1, VOCABULARY))
    monkeypatch.setattr(rewind, "REACH", 8)
    monkeypatch.setattr(rewind, "_FAR", 40)
    (layer,) = rewindable_layers(text.cache)

    def kept() -> list[int]:
        return [read for read, _ in layer.kept]

    for _ in range(20):
        text.read(1)
    assert kept() == [0, *range(13, 20)], "the oldest and the newest, as a draft of 20 may be rejected as a whole"
    text.crop(3)
    assert text.read(1) == 1
    text.crop(12)
    assert text.read(1) == 7, "from the oldest, by six tokens read again"
    for _ in range(12):
        text.read(1)
    assert kept()[0] == 0
    text.read(1)
    size = sum(x.numel() * x.element_size() for x in rewind._tensors(layer.kept[-1][1]))
    monkeypatch.setattr(rewind, "_MOST_BYTES", 3 * size)
    for _ in range(6):
        text.read(1)
    assert len(kept()) == 3
    text.crop(2)
    text.read(1)


def test_a_long_draft_is_taken_back_as_a_whole() -> None:
    text = Text(shared("lfm2", 1, VOCABULARY))
    text.read(5)
    for _ in range(90):
        text.read(1)
    text.crop(89)
    assert text.read(2) == 8, "six tokens after the oldest state are read again"


def test_without_a_kept_state_a_crop_is_refused() -> None:
    text = Text(shared("lfm2", 1, VOCABULARY))
    for layer in rewindable_layers(text.cache):
        layer.stop_recording()
    text.read(5)
    text.read(2)
    with pytest.raises(RuntimeError, match="no state of the first 5 tokens was kept"):
        text.cache.crop(-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emptied_cache_starts_anew(family: str) -> None:
    text = Text(shared(family, 1, VOCABULARY), rows=2)
    text.read(5)
    text.cache.crop(-5)
    text.ids = text.ids[:, :0]
    text.read(4)


def test_an_untested_model_reads_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(build("qwen3_5", 1, VOCABULARY), examined=False)
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("use_cache"):
            lengths.append(kwargs["input_ids"].shape[1])

    text.member.model.register_forward_pre_hook(count, with_kwargs=True)
    text.read(5)
    text.read(3)
    assert lengths == [5, 1, 1, 1]
    text.member.examine()
    text.read(3)
    assert lengths == [5, 1, 1, 1, 3]


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "mamba2"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_padding_in_passes_over_few_tokens_leaves_no_trace(family: str, chunk: int) -> None:
    model = shared(family, 1, VOCABULARY)
    member, cache = Member(model, "base"), DynamicCache(config=model.config)
    member.examine()
    make_rewindable(cache.layers)
    ids, mask = torch.randint(3, VOCABULARY, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :5], mask[1, :8] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in range(0, 9, chunk):
            here = slice(start, start + chunk)
            seen = {"attention_mask": mask[:, : start + chunk], "position_ids": positions[:, here]}
            got = member.forward(ids[:, here], cache=cache, **seen)
        for row in range(3):
            want = model(ids[row : row + 1, mask[row].bool()], use_cache=False).logits[0, -1]
            torch.testing.assert_close(got[row, -1], want, atol=2e-4, rtol=1e-4)


def test_padding_inside_a_text_is_refused() -> None:
    member = Member(shared("qwen3_5", 1, VOCABULARY), "expert")
    right, left, inside = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    for mask in (right, left, None):
        member.refuse_gaps(mask)
    with pytest.raises(UnsupportedModeError, match="padding inside a text for the expert: .* in row 1"):
        member.refuse_gaps(torch.cat([left, inside]))
    Member(shared("llama", 1, VOCABULARY), "expert").refuse_gaps(inside)


def test_packed_texts_are_refused() -> None:
    """The second text would begin at the state of the first."""
    member, ones = Member(shared("qwen3_5", 1, VOCABULARY), "expert"), torch.ones(1, 6, dtype=torch.long)
    member.refuse_positions(torch.arange(6)[None] + 5, ones)
    member.refuse_positions(torch.tensor([[0, 0, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    with pytest.raises(
        InputError, match="position_ids for the expert: .*one state of all tokens.*packed texts as rows"
    ):
        member.refuse_positions(torch.tensor([[0, 1, 2, 0, 1, 2]]), ones)
    Member(shared("llama", 1, VOCABULARY), "expert").refuse_positions(torch.tensor([[0, 1, 2, 0, 1, 2]]), ones)
