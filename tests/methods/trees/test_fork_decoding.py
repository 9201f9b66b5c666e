"""Fork trees: every branch against a recomputation without a cache, costs, ends, refusals."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections import Counter
from typing import Any

import pytest
import torch
from support.tiny import PAD, build, shared, tokenizer
from support.trees import (
    ALPHA,
    HIGH,
    LOW,
    MIDDLE,
    NEW,
    START,
    Break,
    Streamer,
    check_branches,
    composed,
    described,
    grow,
    padded,
    reference_logits,
    small_model,
)
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxTimeCriteria,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StopStringCriteria,
)

from proxytune import FusedDecoding, SiblingDecoding, SpeculativeDecoding
from proxytune.errors import InputError, NumericalError, UnsupportedModeError, UnsupportedModelError
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.models.members.cache_name import CACHE

# --- every branch is what the model says of it ----------------------------------------------------------------------

WHERE: dict[str, dict[str, Any]] = {
    "forks": {"threshold": MIDDLE},
    "every-token": {"threshold": LOW, "children": 3},
    "random": {"where": "random", "share": 0.4},
    "start": {"where": "start"},
}


@pytest.mark.smoke
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
def test_every_branch_equals_a_recomputation(model: Any, where: str, do_sample: bool) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(branches=5, seed=3, **WHERE[where]), ids, mask, do_sample=do_sample)
    check_branches(model, out, ids, mask)
    assert sum(len(tree) for tree in out.trees) > 3


@pytest.mark.parametrize(
    "kinds",
    [("mistral", "llama", "gemma3"), ("gemma3", "gpt2", "mistral"), ("qwen3", "llama", "llama")],
    ids="-".join,
)
def test_members_with_sliding_windows(kinds: tuple[str, ...]) -> None:
    ids, mask = padded()
    model = composed(*kinds)
    out = grow(model, ForkDecoding(threshold=LOW, branches=6, min_gap=2, seed=1), ids, mask, max_new_tokens=14)
    check_branches(model, out, ids, mask)
    assert [len(tree) for tree in out.trees] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "mistral", "gpt2"])
def test_plain_models_with_other_states(kind: str) -> None:
    # Without padding: some of these treat it differently themselves.
    ids = padded()[0][:1]
    model = shared(kind, 1)
    out = grow(model, ForkDecoding(threshold=LOW, branches=4, min_gap=2, seed=1), ids)
    check_branches(model, out, ids, torch.ones_like(ids))
    assert len(out.trees[0]) == 4


def test_a_recurrent_model_s_rows_take_their_state_along() -> None:
    recurrent = build("mamba", 1, 64)
    for weight in recurrent.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for seed in (18, 19):  # of the first, a child takes the place of another prompt's row that has ended
        loop = ForkDecoding(threshold=1.0, branches=3, seed=seed)
        out = grow(recurrent, loop, ids, torch.ones_like(ids), max_new_tokens=5, eos_token_id=list(range(20, 44)))
        check_branches(recurrent, out, ids, torch.ones_like(ids))


def test_a_model_that_keeps_its_state_otherwise_needs_to_go_without() -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=64, context_length=64, pad_token_id=PAD, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with pytest.raises(UnsupportedModeError, match=r"use_cache: .* for ForkDecoding.*Pass use_cache=False\."):
        grow(model, ForkDecoding(threshold=LOW), ids, pad_token_id=PAD)
    out = grow(model, ForkDecoding(threshold=LOW, seed=1), ids, pad_token_id=PAD, use_cache=False, max_new_tokens=4)
    check_branches(model, out, ids, torch.ones_like(ids))


@pytest.mark.parametrize("loop", [ForkDecoding(threshold=LOW, seed=1), SiblingDecoding(threshold=LOW, seed=1)])
def test_a_model_with_a_state_in_its_layers_needs_to_go_without(loop: Any) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=64, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    match = r"use_cache: expected a model that returns its cache, .*RecurrentGemmaForCausalLM.*Pass use_cache=False\."
    with pytest.raises(UnsupportedModeError, match=match):
        grow(model, loop, ids, pad_token_id=PAD)
    out = grow(model, loop, ids, pad_token_id=PAD, use_cache=False, max_new_tokens=4)
    check_branches(model, out, ids, torch.ones_like(ids))
    with pytest.raises(
        UnsupportedModelError,
        match="the model: expected a model whose state is in a cache.*RecurrentGemmaForCausalLM, which keeps its",
    ):
        grow(model, SpeculativeDecoding(draft=PromptLookupDraft()), ids, pad_token_id=PAD)


def test_without_a_cache_it_is_the_same(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    a, b = (grow(model, loop, ids, mask, use_cache=cache) for cache in (True, False))
    assert list(map(described, a.trees)) == list(map(described, b.trees))


def test_without_the_report_come_the_sequences(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    want = grow(model, loop, ids, mask).sequences
    assert torch.equal(grow(model, loop, ids, mask, return_dict_in_generate=False), want)


# --- the same as the fused loop, and the same whatever is around it -------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize("single", [{"branches": 1, "threshold": LOW}, {"branches": 8, "threshold": HIGH}])
def test_a_tree_of_one_branch_is_the_fused_loop(model: Any, single: dict[str, Any], do_sample: bool) -> None:
    ids, mask = padded()
    more = {"do_sample": do_sample, "temperature": 1.3, "top_k": 20} if do_sample else {"do_sample": False}
    want = grow(model, FusedDecoding(seed=5), ids, mask, **more).sequences
    out = grow(model, ForkDecoding(seed=5, **single), ids, mask, **more)
    assert torch.equal(out.sequences, want)
    assert out.log_weights.tolist() == [0, 0, 0]
    assert out.weights.tolist() == [1, 1, 1]


def test_before_its_first_fork_a_tree_is_the_fused_loop(model: Any) -> None:
    ids, mask = padded()
    want = grow(model, FusedDecoding(seed=5), ids, mask).sequences
    out = grow(model, ForkDecoding(seed=5, threshold=MIDDLE), ids, mask)
    for tree, text in zip(out.trees, want, strict=True):
        # The branch that goes on has the first draw, the fused loop's own: it never leaves it.
        first = tree.branches[0].tokens
        assert first == text[12 : 12 + len(first)].tolist()


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize("where", WHERE)
def test_a_tree_does_not_depend_on_the_batch_around_it(where: str, do_sample: bool) -> None:
    model = composed(dtype=torch.float64)
    ids, mask = padded()
    seeded = functools.partial(ForkDecoding, branches=5, seed=3, max_total_tokens=60, **WHERE[where])
    together = grow(model, seeded(), ids, mask, do_sample=do_sample)
    for row in range(3):
        alone = grow(
            model, seeded(stream_ids=[row]), ids[row : row + 1, 12 - int(mask[row].sum()) :], do_sample=do_sample
        )
        assert described(alone.trees[0]) == described(together.trees[row])
        assert alone.ledgers[0].spent == together.ledgers[row].spent
        assert alone.trees[0].weights() == pytest.approx(together.trees[row].weights(), rel=1e-4)
    order = [2, 0, 1]
    wider = [torch.nn.functional.pad(x[order], (4, 0), value=fill) for x, fill in ((ids, PAD), (mask, 0))]
    mixed = grow(model, seeded(stream_ids=order), *wider, do_sample=do_sample)
    assert [described(mixed.trees[order.index(row)]) for row in range(3)] == list(map(described, together.trees))


def test_another_seed_gives_another_tree(model: Any) -> None:
    ids, mask = padded()
    trees = [grow(model, ForkDecoding(threshold=MIDDLE, seed=seed), ids, mask).trees for seed in (1, 2, 1)]
    assert described(trees[0][0]) == described(trees[2][0]) != described(trees[1][0])
    torch.manual_seed(4)
    drawn = [grow(model, ForkDecoding(threshold=MIDDLE), ids, mask).sequences for _ in range(2)]
    torch.manual_seed(4)
    again = grow(model, ForkDecoding(threshold=MIDDLE), ids, mask).sequences
    assert torch.equal(drawn[0], again)
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


def test_returned_sequences_are_trees_of_their_own(model: Any) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(threshold=MIDDLE, seed=1), ids[:1], mask[:1], num_return_sequences=3)
    assert len(out.trees) == 3
    assert described(out.trees[0]) != described(out.trees[1])


# --- what it costs --------------------------------------------------------------------------------------------------


def test_finished_rows_leave() -> None:
    model = composed()
    ids, mask = padded()
    before = dict(model.token_forwards)
    out = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=list(range(3, 60)))
    generated = sum(tree.tokens for tree in out.trees)
    leaves = sum(len(tree) for tree in out.trees)
    lengths = {len(b) for tree in out.trees for b in tree}
    assert len(lengths) > 2, "rows end at different steps"
    # Padding of the prompts is forwarded too; the last token of a leaf never is.
    for role, count in model.token_forwards.items():
        assert count - before[role] == ids.numel() + generated - leaves


class Late(LogitsProcessor):
    """Certain of one token up to a length of text: entropy 0 there."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, scores.argmax(-1, keepdim=True), 0.0)


def test_forks_past_the_middle_cost_at_most_0_7_of_independent_samples() -> None:
    model = composed()
    ids, mask = padded()
    ids, mask, w, new = ids[:1], mask[:1], 8, 40
    more = {"max_new_tokens": new, "eos_token_id": None, "logits_processor": [Late(12 + 21)]}
    before = model.token_forwards["base"]
    out = grow(model, ForkDecoding(threshold=1.0, branches=w, seed=1), ids, mask, **more)
    tree = model.token_forwards["base"] - before
    assert len(out.trees[0]) == w
    assert min(b.start for b in out.trees[0].branches[1:]) > new / 2
    before = model.token_forwards["base"]
    grow(model, FusedDecoding(seed=1), ids, mask, num_return_sequences=w, **more)
    samples = model.token_forwards["base"] - before
    assert samples == w * (12 + new - 1)
    assert tree <= 0.7 * samples


# --- ends, processors, greedy children ------------------------------------------------------------------------------


def test_ends_are_told_from_cuts(model: Any) -> None:
    ids, mask = padded()
    free = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=None)
    assert not any(b.finished for tree in free.trees for b in tree)
    assert {len(b) for tree in free.trees for b in tree} == {NEW}
    end = free.trees[0].branches[0].tokens[4]
    out = grow(model, ForkDecoding(threshold=MIDDLE, branches=5, seed=3), ids, mask, eos_token_id=end)
    for tree in out.trees:
        for branch in tree:
            tokens = branch.along("tokens")
            assert branch.finished == (tokens[-1] == end)
            assert end not in tokens[:-1]
    assert out.trees[0].branches[0].finished


def test_stop_strings(model: Any) -> None:
    ids, mask = padded()
    words = tokenizer()
    loop = ForkDecoding(threshold=MIDDLE, branches=5, seed=3)
    free = grow(model, loop, ids, mask, eos_token_id=None)
    letter = words.decode(free.trees[0].branches[0].tokens[3])
    criterion = StopStringCriteria(words, [letter])
    out = grow(model, loop, ids, mask, eos_token_id=None, stopping_criteria=[criterion])
    first = out.trees[0].branches[0]
    assert first.finished
    assert len(first) <= 4
    if not hasattr(model, "members"):
        return
    named = grow(model, loop, ids, mask, eos_token_id=None, stop_strings=[letter], tokenizer=words)
    assert list(map(described, named.trees)) == list(map(described, out.trees))


def test_time_that_is_up_cuts_all_branches(model: Any) -> None:
    ids, mask = padded()
    criterion = MaxTimeCriteria(0.0, time.time() - 1)
    out = grow(model, ForkDecoding(threshold=LOW, branches=5, seed=3), ids, mask, stopping_criteria=[criterion])
    assert {len(b) for tree in out.trees for b in tree} == {1}
    assert not any(b.finished for tree in out.trees for b in tree)


def test_penalties_run_before_the_draw(model: Any) -> None:
    ids, mask = padded()
    loop = ForkDecoding(threshold=LOW, branches=6, seed=3)
    out = grow(model, loop, ids, mask, no_repeat_ngram_size=1, suppress_tokens=[7, 9], eos_token_id=None)
    for tree, prompt in zip(out.trees, ids, strict=True):
        for branch in tree:
            tokens = branch.along("tokens")
            assert len(tokens) == len(set(tokens))
            assert not set(tokens) & set(prompt.tolist())
            assert not {7, 9} & set(branch.along("tokens"))
    # What is recorded is of the distribution after them: the first token's neighbours are masked.
    logits = reference_logits(model, ids[0]).clone()
    logits[[*ids[0].tolist(), 7, 9]] = -torch.inf
    logits[PAD] = -torch.inf if PAD in ids[0] else logits[PAD]
    assert out.trees[0].branches[0].logprobs[0] == pytest.approx(
        float(logits.log_softmax(-1)[out.trees[0].branches[0].tokens[0]]), abs=1e-3
    )


def test_greedy_children_are_the_most_probable_tokens(model: Any) -> None:
    ids, mask = padded()
    out = grow(model, ForkDecoding(threshold=MIDDLE, children=3, branches=7), ids, mask, do_sample=False)
    seen = 0
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            for fork in branch.forks:
                text = torch.cat([prompt[kept], torch.tensor(branch.along("tokens")[:fork], dtype=torch.long)])
                best = reference_logits(model, text).log_softmax(-1).topk(3)
                born = [b for b in tree if b.parent is branch and b.start == fork]
                tokens = [branch.tokens[fork - branch.start], *(b.tokens[0] for b in born)]
                assert tokens == best.indices.tolist()[: len(tokens)]
                seen += 1
            # A leaf weighs the probability of what was chosen at its forks.
            at = {b.start for b in branch.path()[1:]} | {
                f
                for one, then in itertools.pairwise([*branch.path(), None])
                for f in one.forks
                if then is None or f < then.start
            }
            logprobs = branch.along("logprobs")
            assert branch.log_weight == pytest.approx(sum(logprobs[f] for f in at), abs=1e-4)
    assert seen > 2


def test_chain_of_thought_decoding(model: Any) -> None:
    """Greedy from each of the W most probable first tokens."""
    ids, mask = padded()
    out = grow(model, ForkDecoding(where="start", branches=4), ids, mask, do_sample=False, eos_token_id=None)
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        first = reference_logits(model, prompt[kept]).topk(4).indices.tolist()
        assert [b.tokens[0] for b in tree] == first
        for branch in tree:
            text = torch.cat([prompt[kept], torch.tensor(branch.tokens[:1])])[None]
            want = model.generate(text, do_sample=False, max_new_tokens=NEW - 1, eos_token_id=None)
            assert branch.tokens == want[0, int(kept.sum()) :].tolist()


def test_greedy_children_are_never_masked_tokens() -> None:
    ids = torch.tensor([START])
    out = grow(
        small_model(),
        ForkDecoding(where="start", branches=5),
        ids,
        do_sample=False,
        suppress_tokens=[0, 1, 2, 3],
        eos_token_id=None,
        max_new_tokens=3,
    )
    assert sorted(b.tokens[0] for b in out.trees[0]) == [4, 5]
    assert all(set(b.tokens) <= {4, 5} for b in out.trees[0])


def test_the_temperature_of_forks(model: Any) -> None:
    """Cold elsewhere: between forks the tree is greedy; at forks it is drawn."""
    ids, mask = padded()
    loop = ForkDecoding(threshold=MIDDLE, branches=4, seed=2, fork_temperature=1.0)
    out = grow(model, loop, ids, mask, temperature=1e-3)
    seen = Counter()
    for tree, prompt, kept in zip(out.trees, ids, mask.bool(), strict=True):
        for branch in tree:
            text = prompt[kept]
            for token, entropy in zip(branch.along("tokens"), branch.along("entropies"), strict=True):
                greedy = token == int(reference_logits(model, text).argmax())
                assert greedy or entropy > MIDDLE
                seen[greedy] += 1
                text = torch.cat([text, torch.tensor([token])])
    assert min(seen[True], seen[False]) > 3


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold: expected a finite number of nats; got None. `proxytune calibrate`"),
        ({"where": "end"}, "where: expected 'forks', 'random' or 'start'; got 'end'"),
        ({"where": "random", "fork_temperature": 1.0}, "threshold: expected a finite number of nats; got None"),
        ({"threshold": "high"}, "threshold: expected a finite number of nats; got 'high'"),
        ({"threshold": float("nan")}, "threshold: expected a finite number of nats; got nan"),
        ({"threshold": float("inf")}, "threshold: expected a finite number of nats"),
        ({"threshold": ForkThreshold.streaming()}, "threshold: expected a fixed or calibrated threshold"),
        ({"threshold": ForkThreshold(1.0, measure="scaled")}, "threshold: expected a threshold of the raw entropy"),
        ({"threshold": 1, "branches": 0}, "branches: expected a whole number, at least 1; got 0"),
        ({"threshold": 1, "branches": 2.0}, "branches: expected a whole number, at least 1; got 2.0"),
        ({"threshold": 1, "branches": True}, "branches: expected a whole number"),
        ({"threshold": 1, "children": 1}, "children: expected a whole number, at least 2; got 1"),
        ({"threshold": 1, "min_gap": 0}, "min_gap: expected a whole number, at least 1; got 0"),
        ({"where": "random", "share": 1.0}, "share: expected a number in \\(0, 1\\); got 1.0"),
        ({"where": "random", "share": float("nan")}, "share: expected a number in"),
        ({"threshold": 1, "fork_temperature": 0}, "fork_temperature: expected a finite number > 0; got 0"),
        (
            {"threshold": 1, "max_total_tokens": 0},
            "max_total_tokens: expected a whole number of tokens, at least 1; got 0",
        ),
        ({"threshold": 1, "max_total_tokens": 9.5}, "max_total_tokens: expected a whole number"),
        ({"threshold": 1, "seed": 1 << 63}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "seed": "x"}, "seed: expected a whole number of 64 bits"),
        ({"threshold": 1, "impl": "cuda"}, "impl: expected 'auto', 'triton' or 'torch'; got 'cuda'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ForkDecoding(**options)


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"streamer": Streamer()}, "streamer"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"cache_implementation": "static"}, "a static cache"),
    ],
)
def test_what_a_tree_cannot_give_is_refused(kwargs: dict[str, Any], what: str) -> None:
    ids, mask = padded()
    with pytest.raises(UnsupportedModeError, match=f"{what}: expected none with ForkDecoding"):
        grow(composed(), ForkDecoding(threshold=1.0), ids, mask, **kwargs)


def test_other_modes_and_batches_are_refused(model: Any) -> None:
    ids, mask = padded()
    with pytest.raises(UnsupportedModeError, match="ForkDecoding: expected greedy decoding or sampling"):
        grow(model, ForkDecoding(threshold=1.0), ids, mask, num_beams=2)
    with pytest.raises(InputError, match="row"):
        grow(model, ForkDecoding(threshold=1.0, stream_ids=[0, 1]), ids, mask)


def test_a_calibrated_threshold_belongs_to_its_alpha(model: Any) -> None:
    ids, mask = padded()
    want = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask).trees
    for alpha in (None, ALPHA):
        threshold = ForkThreshold(MIDDLE, share=0.2, measure="raw", alpha=alpha)
        got = grow(model, ForkDecoding(threshold=threshold, seed=3), ids, mask).trees
        assert list(map(described, got)) == list(map(described, want))
    if hasattr(model, "members"):
        with pytest.raises(InputError, match="threshold: expected a threshold calibrated at α = 0.7; got α = 2.0"):
            grow(model, ForkDecoding(threshold=ForkThreshold(MIDDLE, alpha=2.0)), ids, mask)


def test_leaves_need_a_padding_token() -> None:
    plain = copy.deepcopy(shared("llama", 1))
    plain.config.pad_token_id = plain.generation_config.pad_token_id = None
    with pytest.raises(InputError, match="pad_token_id: expected a padding token, since leaves differ in length"):
        grow(plain, ForkDecoding(threshold=1.0), padded()[0][:1], eos_token_id=None, pad_token_id=None)


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampling", "greedy"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or"), (-math.inf, "−inf for every token")])
def test_a_row_without_a_distribution_is_named(model: Any, value: float, said: str, do_sample: bool) -> None:
    ids, mask = padded()
    spoil = Break(value, 14, int(ids[1, 11]))
    loop = ForkDecoding(threshold=LOW, branches=3, seed=1)
    with pytest.raises(NumericalError, match=f"prompt 1, branch 0: row 1 of .*, step 2 .*{said}"):
        grow(model, loop, ids, mask, logits_processor=[spoil], do_sample=do_sample, eos_token_id=None)


def test_an_interrupted_cache_is_not_reused(model: Any) -> None:
    ids, mask = padded()
    a = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask)
    b = grow(model, ForkDecoding(threshold=MIDDLE, seed=3), ids, mask, **{CACHE: DynamicCache()})
    assert list(map(described, a.trees)) == list(map(described, b.trees))
