"""`proxytune sample` against the loop it calls, its budgets, answers and votes, and every way to call it wrongly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

import proxytune
from proxytune import FusedDecoding
from proxytune.cli import sample_run as samples
from proxytune.cli import terminal
from proxytune.errors import BudgetWarning
from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.recipe import RECIPE_FILE, ForkCalibration, write_fork_threshold
from proxytune.voting.vote import Sample, vote

PROMPTS = ["Question: Start with 3", "Question: Who"]
NEW = 12
WORDS = [f"max_new_tokens={NEW}", "temperature=1.2", "top_k=0"]
TREE = ["--threshold", 1.0, "--branches", 5, "--seed", 3, "--dtype", "float32", "--alpha", 0.5]


@pytest.fixture
def model(family):
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    return proxytune.wrap(
        folder["large-base"], expert=folder["tiny-tuned"], antiexpert=folder["tiny-base"], alpha=0.5, dtype="float32"
    )


@pytest.fixture
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "large-base", padding_side="left")


@pytest.fixture
def kit(family, model, tmp_path):
    """A saved recipe whose members are named by absolute folders."""
    model.save_pretrained(tmp_path / "kit")
    return tmp_path / "kit"


def encoded(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


DRAW = {"do_sample": True, "max_new_tokens": NEW, "temperature": 1.2, "top_k": 0, "return_dict_in_generate": True}


def options_for(*words):
    """Samples that do not repel each other, or that do at random, have no forks, so no threshold."""
    return TREE[2:] if "random" in words or ("--no-forks" in words and "--repulsion" not in words) else TREE


def drawn(run, members, *words):
    ended = run("sample", *PROMPTS, *WORDS, *options_for(*words), *members, "--json", *words)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended.lines


def test_help_names_its_options_without_importing_torch():
    program = (
        "import sys\n"
        "from proxytune.cli import main\n"
        "try: main(['sample', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for option in (
        "--no-forks",
        "--branches",
        "--repulsion",
        "--ngram",
        "--budget",
        "--vote",
        "--threshold",
        "--answer",
        "--seed",
    ):
        assert option in ran.stdout


@pytest.mark.smoke
@pytest.mark.parametrize("batch", [1, 4])
def test_trees_are_those_of_the_library(run, members, model, tokenizer, batch):
    lines = drawn(run, members, "--budget", 80, "--batch-size", batch)
    loop = ForkDecoding(threshold=1.0, branches=5, seed=3, max_total_tokens=80)
    out = model.generate(**encoded(tokenizer), custom_generate=loop, **DRAW)
    for line, tree, ledger, prompt in zip(lines, out.trees, out.ledgers, PROMPTS, strict=True):
        assert line["prompt"] == prompt
        assert line["spent"] == ledger.spent <= line["budget"] == 80
        assert (line["planned"], line["ran"], line["cut"]) == (5, len(tree), tree.cut)
        assert line["prompt_tokens"] == ledger.by["prompt"]
        assert [leaf["text"] for leaf in line["leaves"]] == [
            tokenizer.decode(b.along("tokens"), skip_special_tokens=True) for b in tree
        ]
        assert [leaf["weight"] for leaf in line["leaves"]] == pytest.approx(tree.weights(), abs=1e-4)
        assert [leaf["start"] for leaf in line["leaves"]] == [b.start for b in tree]
        assert [leaf["finished"] for leaf in line["leaves"]] == [b.finished for b in tree]
    assert max(len(tree) for tree in out.trees) > 1


REPELLED = ["--repulsion", 1.5, "--ngram", 2]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("words", [[], REPELLED, [*REPELLED, "--where", "random"]], ids=str)
def test_samples_are_those_of_the_library(run, members, model, tokenizer, words, batch):
    lines = drawn(run, members, "--no-forks", *words, "--batch-size", batch, "--answer", "[a-z]")
    options = {"repulsion": 1.5, "ngram": 2, "threshold": 1.0} if words else {"repulsion": 0}
    loop = SiblingDecoding(siblings=5, seed=3, **options, where="random" if "random" in words else "forks")
    spread = []
    out = model.generate(**encoded(tokenizer), custom_generate=loop, **DRAW)
    for line, tree in zip(lines, out.trees, strict=True):
        assert [leaf["text"] for leaf in line["leaves"]] == [
            tokenizer.decode(b.tokens, skip_special_tokens=True) for b in tree
        ]
        weights = [leaf["weight"] for leaf in line["leaves"]]
        assert weights == pytest.approx(tree.weights(), abs=1e-4)
        spread.append(max(weights) - min(weights))
        assert [(leaf["parent"], leaf["start"]) for leaf in line["leaves"]] == [(None, 0)] * 5
        assert line["spent"] == line["prompt_tokens"] + sum(leaf["tokens"] for leaf in line["leaves"])
        assert line["budget"] is None
        # The vote is by the weights.
        shares = Counter()
        for leaf in line["leaves"]:
            shares[leaf["answer"]] += leaf["weight"]
        total = sum(shares.values())  # no answer is a class of its own, and part of the whole
        for share in line["shares"]:
            assert share["share"] == pytest.approx(shares[share["answer"]] / total)
    assert (max(spread) > 0.01) == bool(words)


def test_the_first_sample_is_the_fused_loop_s(run, members, model, tokenizer):
    lines = drawn(run, members, "--no-forks", "--branches", 3)
    batch = encoded(tokenizer)
    out = model.generate(**batch, custom_generate=FusedDecoding(seed=3), **DRAW).sequences
    for line, row in zip(lines, out, strict=True):
        text = tokenizer.decode(row[batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["leaves"][0]["text"] == text
        assert [leaf["weight"] for leaf in line["leaves"]] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(("room", "leaves", "longest"), [(5, 1, 5), (12, 1, 12), (23, 1, 12), (24, 2, 12), (99, 4, 12)])
def test_samples_stay_in_the_budget(run, members, tokenizer, room, leaves, longest):
    # No end-of-text: every sample is as long as it may be.
    length = len(tokenizer(PROMPTS[0])["input_ids"])
    words = ["--no-forks", "--branches", 4, "--budget", length + room, *members, *WORDS]
    ended = run("sample", PROMPTS[0], *words, "--json", "eos_token_id=none")
    (line,) = ended.lines
    assert [leaf["tokens"] for leaf in line["leaves"]] == [longest] * leaves
    assert f"{leaves} of {leaves} texts were cut off, and count with what they had said by then" in line["note"]
    assert line["spent"] == length + leaves * longest <= length + room
    assert (line["planned"], line["ran"], line["cut"]) == (4, leaves, leaves)
    assert (
        f"texts   4 texts planned, {leaves} ran, {leaves} of them cut"
        in run("sample", PROMPTS[0], *words, "eos_token_id=none").out
    )
    if leaves == 4:
        assert (ended.err, "planned" in line["note"]) == ("", False)
        return
    note = (
        f"4 texts planned, {leaves} ran, {leaves} of them cut: --budget {length + room} has no room for more of "
        f"{longest} tokens, the mean so far. Raise it, or lower max_new_tokens to what an answer takes."
    )
    assert ended.err.startswith(f"note: {note}")
    assert f"; {note}" in line["note"]
    assert ended.err.count("\n") == 1
    assert run("sample", PROMPTS[0], *words, "eos_token_id=none").err == ended.err


@pytest.mark.parametrize(("room", "told"), [(NEW, True), (2 * NEW, False)])
def test_a_budget_without_room_for_a_fork_is_noted(run, members, tokenizer, room, told):
    length = len(tokenizer(PROMPTS[0])["input_ids"])
    words = ["--threshold", 0, "--branches", 2, "--budget", length + room, "--json", *members, *WORDS]
    ended = run("sample", PROMPTS[0], *words, "eos_token_id=none")
    assert len(ended.lines[0]["leaves"]) == (1 if told else 2)
    note = f"2 texts planned, 1 ran, 1 of them cut: --budget {length + room} has no room for more of {NEW} tokens"
    assert bool(re.search(note, ended.err)) is told
    assert bool(re.search(note, ended.lines[0]["note"])) is told


@pytest.mark.parametrize("words", [[], REPELLED], ids=str)
def test_what_is_left_of_the_budget_goes_to_further_samples(run, members, model, tokenizer, words):
    length = len(tokenizer(PROMPTS[0])["input_ids"])
    budget = length + 4 * NEW
    ends = "eos_token_id=" + json.dumps(list(range(5, 60)))  # most samples are short
    # The prompt has another number in the call: its first round is the library's row 1.
    words = [
        "--no-forks",
        "--budget",
        budget,
        *words,
        *options_for("--no-forks", *words),
        "--branches",
        9,
        "--json",
        *members,
    ]
    line = run("sample", PROMPTS[1], PROMPTS[0], *words, *WORDS, ends).lines[1]
    tokens = [leaf["tokens"] for leaf in line["leaves"]]
    assert line["spent"] == length + sum(tokens) <= budget
    assert len(tokens) > 4
    assert len(tokens) == 9 or budget - line["spent"] < sum(tokens) / len(tokens)
    options = {"repulsion": 1.5, "ngram": 2, "threshold": 1.0} if "--ngram" in words else {"repulsion": 0}
    batch = tokenizer(PROMPTS[:1], return_tensors="pt", return_token_type_ids=False)
    texts, weights, spent, usual = [], [], 0, None  # of the first round every text may have NEW tokens
    while len(texts) < 9 and budget - length - spent >= (usual or NEW):
        rounds = len(weights)
        loop = SiblingDecoding(
            siblings=9 - len(texts),
            seed=3,
            stream_ids=[1 + 2 * rounds],
            max_total_tokens=budget - spent,
            reserve=usual,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            out = model.generate(**batch, custom_generate=loop, **DRAW | {"eos_token_id": list(range(5, 60))})
        texts += [tokenizer.decode(b.tokens, skip_special_tokens=True) for b in out.trees[0]]
        weights.append(out.log_weights.exp() * len(out.trees[0]))
        spent += out.trees[0].tokens
        usual = -(-spent // len(texts))  # the mean, rounded up
    assert len(weights) > 1
    assert [leaf["text"] for leaf in line["leaves"]] == texts
    raw = torch.cat(weights)
    assert [leaf["weight"] for leaf in line["leaves"]] == pytest.approx((raw / raw.sum()).tolist(), abs=1e-4)


def test_the_prompt_is_forwarded_once(run, members, tokenizer, monkeypatch):
    seen = []
    real = proxytune.ProxyTunedModel.forward

    def forward(self, *args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(proxytune.ProxyTunedModel, "forward", forward)
    words = ["--no-forks", "--branches", 5, *members, "eos_token_id=none"]
    assert run("sample", *PROMPTS, *WORDS, *words).code == 0
    length = encoded(tokenizer)["input_ids"].shape[1]
    assert seen == [(2, length), *[(10, 1)] * (NEW - 1)]


@pytest.mark.parametrize("how", ["majority", "weighted", "confidence", "deepconf"])
def test_votes(run, members, model, tokenizer, how):
    pattern = r"[a-zA-Z]"
    lines = drawn(run, members, "--vote", how, "--answer", pattern, *(["--eta", 60] if how == "deepconf" else []))
    out = model.generate(**encoded(tokenizer), custom_generate=ForkDecoding(threshold=1.0, branches=5, seed=3), **DRAW)
    extract = samples.extractor(pattern)
    for line, tree in zip(lines, out.trees, strict=True):
        texts = [tokenizer.decode(b.along("tokens"), skip_special_tokens=True) for b in tree]
        answers = [extract(text, cut=not b.finished) for text, b in zip(texts, tree, strict=True)]
        weights = [1.0] * len(tree) if how == "majority" else tree.weights()
        tally = vote(
            [Sample(a, b.along("confidences"), w) for a, b, w in zip(answers, tree, weights, strict=True)],
            "majority" if how == "weighted" else how,
            eta=60,
        )
        assert line["answer"] == tally.winner
        assert line["vote"] == how
        assert line["share"] == pytest.approx(tally.share, abs=1e-3)
        assert {s["answer"]: s["leaves"] for s in line["shares"]} == tally.counts
        assert [leaf["answer"] for leaf in line["leaves"]] == answers


def test_the_drawing(run, members):
    lines = drawn(run, members, "--budget", 70, "--answer", "zzz")
    ended = run("sample", *PROMPTS, *WORDS, *TREE, *members, "--budget", 70, "--answer", "zzz")
    assert ended.code == 0
    for line in lines:
        assert line["prompt"] in ended.out
        assert f"tokens  {line['spent']} of 70 ({line['prompt_tokens']} of the prompt)" in ended.out
        assert line["answer"] is None
        for leaf in line["leaves"]:
            assert f"weight {leaf['weight']:.3f}  " in ended.out
            assert leaf["entropy"] is None or f"at token {leaf['start']}, H {leaf['entropy']:.2f} nats" in ended.out
    assert ended.out.count("answer  no answer") == 2
    assert "note    no sample has an answer" in ended.out
    assert "└─ " in ended.out


def test_a_person_sees_the_tokens_that_are_left(run, members, monkeypatch):
    said = []
    real = samples.SampleProgress.spend
    monkeypatch.setattr(samples.SampleProgress, "spend", lambda self, n: (real(self, n), said.append(self._said())))
    lines = drawn(run, members, "--budget", 70)
    assert said[-1] == f"{140 - sum(line['spent'] for line in lines)} tokens left"
    said.clear()
    lines = drawn(run, members, "--no-forks", "--branches", 1)
    assert said[-1] == f"{sum(line['spent'] for line in lines)} tokens"
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    shown = run("sample", *PROMPTS, *WORDS, *TREE, *members, "--json")
    assert shown.code == 0
    assert [line["prompt"] for line in shown.lines] == PROMPTS


@pytest.mark.parametrize("mode", [[], ["--no-forks"]])
def test_a_prompt_larger_than_the_budget_does_not_stop_the_others(run, members, tokenizer, mode):
    longer = "Question: Start with 3, add 4, take away 2, add 9."
    few, many = (len(tokenizer(p)["input_ids"]) for p in (PROMPTS[0], longer))
    assert few < many
    words = ["sample", longer, PROMPTS[0], *WORDS, *options_for(*mode), *members, *mode, "--budget", many]
    ended = run(*words, "--json")
    assert ended.code == 1
    message = f"prompt 1: expected --budget of at least {many + 1}: it has {many} tokens itself; got {many}."
    error, *notes = ended.err.splitlines()
    assert message in error
    refused, other = ended.lines
    assert len(other["leaves"]) == (1 if mode else 2)  # and of samples, five were wanted
    assert [note[:28] for note in notes] == [f"note: 5 texts planned, {len(other['leaves'])} ran"]
    assert refused["prompt"] == longer
    assert message in refused["error"]
    assert other["spent"] <= many
    alone = run("sample", PROMPTS[0], "--budget", few, *WORDS, *options_for(*mode), *members, *mode)
    assert (alone.code, alone.out) == (1, "")


def test_the_recipe_s_threshold(run, kit, model, tokenizer):
    words = ["sample", *PROMPTS, *WORDS, "--recipe", kit, "--branches", 5, "--seed", 3, "--json", "--dtype", "float32"]
    ended = run(*words)
    assert ended.code == 2
    assert "--threshold: expected an entropy in nats, or a recipe that was calibrated; got " in ended.err
    write_fork_threshold(kit, ForkCalibration(share=0.2, nats=1.0, tokens=100, alpha=0.5))
    assert json.loads((kit / RECIPE_FILE).read_text())["alpha"] == 0.5
    out = model.generate(**encoded(tokenizer), custom_generate=ForkDecoding(threshold=1.0, branches=5, seed=3), **DRAW)
    assert [len(line["leaves"]) for line in run(*words).lines] == [len(tree) for tree in out.trees]
    other = run(*words, "--alpha", 2)
    assert other.code == 2
    assert "--alpha: expected 0.5, at which the recipe's threshold was calibrated; got 2" in other.err
    assert run(*words, "--alpha", 2, "--threshold", 1).code == 0
    assert run(*words, "--alpha", 2, "--no-forks").code == 0


@pytest.mark.parametrize("where", ["random", "start"])
def test_the_controls_need_no_threshold(run, members, where):
    ended = run("sample", *PROMPTS, *WORDS, *members, "--where", where, "--json")
    assert ended.code == 0, ended.err
    for line in ended.lines:
        starts = {leaf["start"] for leaf in line["leaves"]}
        assert len(line["leaves"]) > 1
        assert starts == {0} or where == "random"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7. The answer is 7.", "7"),
        ("The answer is 5. No: the sum is 8. The answer is 3.5.\nQuestion: 9", "3.5"),
        ("The answer is: garlic", "garlic"),
        ("The answer is\nnothing 4", "nothing 4"),
        ("45-33=12, so 1,234.5", "1234.5"),
        ("from 3 to -4", "-4"),
        ("45-33", "33"),
        ("x2", None),
        ("That is a good question.", None),
        ("", None),
    ],
)
def test_usual_answers(text, answer):
    assert samples.extractor(None)(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("29+9=3", None),  # on the way to 38
        ("24+5=29, 29+", None),  # a step, not the answer
        ("The answer is 3", None),  # perhaps 38
        ("The answer is 38. So", "38"),
        ("The answer is 38.", "38"),
        ("The answer is 5. No, the answer is 7. The answer is", "5"),
    ],
)
def test_a_text_that_was_cut_off_has_only_the_answer_that_it_finished(text, answer):
    assert samples.extractor(None)(text, cut=True) == answer


def test_a_pattern_s_last_match_may_go_on_where_the_text_was_cut():
    extract = samples.extractor(r"#(\w+)")
    assert extract("#a #bc", cut=False) == "bc"
    assert extract("#a #bc", cut=True) is None
    assert extract("#a #bc ", cut=True) == "bc"


def test_answers_by_pattern():
    assert samples.extractor(r"#(\w+)")("#a #b c") == "b"
    assert samples.extractor(r"\d")("1 2") == "2"
    assert samples.extractor(r"x(\d)?")("x") is None
    assert samples.extractor(r"\s*")("abc") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--threshold: expected an entropy in nats, or a recipe that was calibrated; got no recipe"),
        (["--threshold", "nan"], "threshold: expected a finite number of nats; got nan"),
        (["--threshold", 1, "--answer", "("], "--answer: expected a regular expression; got '('"),
        (["--threshold", 1, "--eta", 0], "--eta: expected a percentage in (0, 100]; got 0"),
        (["--threshold", 1, "--vote", "loudest"], "--vote"),
        (["--threshold", 1, "--branches", 0], "--branches"),
        (["--threshold", 1, "--children", 1], "--children"),
        (["--threshold", 1, "--budget", 0], "--budget"),
        (["--threshold", 1, "--where", "end"], "--where"),
        (["--threshold", 1, "--seed", 1 << 63], "seed: expected a whole number of 64 bits"),
        (["--threshold", 1, "--dtype", "int8"], "--dtype: expected"),
        (["--threshold", 1, "--device", "tpu"], "--device: expected"),
        (
            ["--threshold", 1, "--repulsion", 0.5],
            "--repulsion: expected --no-forks with it; got 0.5, with --forks. The children of a fork are drawn without",
        ),
        (["--threshold", 1, "--ngram", 3], "--ngram: expected --no-forks with it; got 3, with --forks"),
        (["--no-forks", "--ngram", 1], "--ngram"),
        (
            ["--no-forks", "--threshold", 1, "--repulsion", "nan"],
            "repulsion: expected a number of nats in [0, 1000]; got nan",
        ),
        (
            ["--no-forks", "--threshold", 1, "--repulsion=-1"],
            "repulsion: expected a number of nats in [0, 1000]; got -1.0",
        ),
        (
            ["--no-forks", "--repulsion", 1],
            "which --write puts into the recipe; or pass --repulsion 0 without --ngram.",
        ),
        (
            ["--no-forks", "--repulsion", 1, "--where", "start"],
            "where: expected 'forks' or 'random'; got 'start'",
        ),
        (["--threshold", 1, "max_newtokens=3"], "Did you mean max_new_tokens"),
        (["--no-forks", "--children", 3], "--children: expected --forks with it; got --no-forks, without --repulsion"),
        (["--no-forks", "--threshold", 1, "--ngram", 2, "--min-gap", 1], "--min-gap: expected --forks with it; got --"),
        (["--no-forks", "--where", "forks"], "--where: expected --forks, or samples that repel each other with it"),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_loaded(run, members, monkeypatch, words, message):
    monkeypatch.setattr(proxytune.models.loading, "open_member", None)  # it would be a TypeError, exit code 1
    # Settings come last among the arguments.
    ended = run("sample", *members, "x", *words)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", 1, "num_return_sequences=2"], "num_return_sequences: expected --branches; got 2"),
        (["do_sample=false", "--no-forks"], "--no-forks: expected sampling"),
        (["--threshold", 1, "num_beams=2"], "ForkDecoding: expected greedy decoding or sampling"),
    ],
)
def test_wrong_draws_are_told(run, members, words, message):
    ended = run("sample", *members, "x", *words)
    assert ended.code == 2, ended.err
    assert message in ended.err


def test_chain_of_thought_decoding(run, members, model, tokenizer):
    words = [f"max_new_tokens={NEW}", "do_sample=false", "--where", "start", "--branches", 3, "--alpha", 0.5]
    (line,) = run("sample", PROMPTS[0], *words, *members, "--dtype", "float32", "--json").lines
    batch = tokenizer(PROMPTS[:1], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        best = model(**batch).logits[0, -1].topk(3).indices
    for leaf, token in zip(line["leaves"], best, strict=True):
        text = torch.cat([batch["input_ids"], token[None, None]], 1)
        out = model.generate(text, do_sample=False, max_new_tokens=NEW - 1)
        start = batch["input_ids"].shape[1]
        assert leaf["text"] == tokenizer.decode(out[0, start:], skip_special_tokens=True)
