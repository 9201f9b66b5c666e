"""`proxytune generate --latent`: the library's latent steps, prompt by prompt; and what is refused."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

import proxytune
from proxytune import LatentDecoding
from proxytune.cli.latent_options import mixture_of, sampler_of
from proxytune.methods.latent import LatentGates, LatentMixture

PROMPTS = ["Question: Start with 3", "Question: Who", "x"]


@pytest.fixture
def model(family):
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    members = {"expert": folder["tiny-tuned"], "antiexpert": folder["tiny-base"]}
    return proxytune.wrap(folder["large-base"], **members, alpha=1.0, dtype="float32")


@pytest.fixture
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "large-base")


def alone(model, tokenizer, prompt, sampler, **settings):
    batch = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, custom_generate=sampler, **settings)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_lines_equal_the_library_prompt_by_prompt(run, members, model, tokenizer, batch_size):
    # Not in the bfloat16 they are stored in, and not many tokens: rounding differs with the padding, and is fed back.
    words = ["generate", *PROMPTS, "max_new_tokens=6", *members, "--dtype", "float32", "--batch-size", batch_size]
    ended = run(*words, "--latent", "gumbel", "--tau", "2.0", "--seed", "3")
    assert ended.code == 0, ended.err
    gates = LatentGates.for_tokenizer(tokenizer)
    expected = [
        alone(
            model,
            tokenizer,
            prompt,
            LatentDecoding(LatentMixture(kind="gumbel", tau=2.0), gates, seed=3, stream_ids=[row]),
            max_new_tokens=6,
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    assert [line["completion"] for line in ended.lines] == expected
    plain = run(*words).lines
    assert [line["completion"] for line in plain] != expected
    assert run(*words, "--latent", "onehot").lines == plain


def test_the_span_and_the_gates_reach_the_sampler(run, members, tokenizer, monkeypatch):
    seen: list[LatentDecoding] = []
    real = LatentDecoding.__call__

    def spy(self, *args, **kwargs):
        seen.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LatentDecoding, "__call__", spy)
    vocabulary = tokenizer.get_vocab()
    begin, end = sorted(t for t in vocabulary if t.isalpha())[:2]
    words = ["generate", "x", "y", "max_new_tokens=3", *members, "--latent", "dirichlet:alpha=2,candidates=5"]
    for dots in ("…", "..."):
        span = f"{begin}{dots}{end}"
        ended = run(*words, "--latent-span", span, "--latent-gates", "min_entropy=0.25,max_run=7", "--batch-size", 1)
        assert ended.code == 0, ended.err
    assert len(seen) == 4
    assert [s.stream_ids for s in seen] == [[0], [1]] * 2
    for sampler in seen:
        assert sampler.mixture == LatentMixture(kind="dirichlet", alpha=2, candidates=5)
        assert sampler.gates.begin_ids == (vocabulary[begin],)
        assert sampler.gates.end_ids == (vocabulary[end],)
        assert (sampler.gates.min_entropy, sampler.gates.max_run) == (0.25, 7)
        assert set(sampler.gates.discrete_ids) == set(tokenizer.all_special_ids)


def test_beams_and_several_sequences_have_streams_of_their_own(run, members):
    words = ["generate", "x", "y", *members, "max_new_tokens=8", "--latent", "gumbel", "--tau", "3"]
    several = run(*words, "do_sample=true", "num_return_sequences=2")
    assert several.code == 0, several.err
    assert len({line["completion"] for line in several.lines}) > 1
    assert run(*words, "num_beams=2").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--latent", "gumble"], "Did you mean 'gumbel'"),
        (["--latent", "gumbel", "--tau", "0"], "tau: expected a finite number > 0; got 0.0"),
        (["--latent", "gumbel", "--tau", "-1"], "tau: expected a finite number > 0; got -1.0"),
        (["--latent", "moi", "--tau", "1"], "a setting of 'gumbel'"),
        (["--tau", "1"], "--latent: expected a kind"),
        (["--latent-span", "a…b"], "with --latent-span"),
        (["--latent-gates", "max_run=1"], "with --latent-gates"),
        (["--latent", "gumbel:tau=0.5,kind=moi"], "got 'kind=moi'"),
        (["--latent", "gumbel:tau"], "KEY=VALUE"),
        (["--latent", "gumbel:tau=0.5,tau=0.2"], "each once"),
        (["--latent", "gumbel:tau=0.5", "--tau", "0.2"], "--latent: expected each setting once"),
        (["--latent", "gumbel:tau=0.5", "--tau", "0.5"], "--latent: expected each setting once"),
        (["--latent", "gumbel", "--latent-gates", "dwell=2/"], "dwell: expected"),
        (["--latent", "gumbel", "--latent-gates", "dwell=2/8/3"], "dwell: expected"),
        (["--latent", "gumbel", "--latent-gates", "dwell=2/many"], "dwell: expected"),
        (["--latent", "gumbel", "--latent-gates", "dwell=-2/8"], "dwell: expected"),
        (["--latent", "gumbel", "--seed", "-1"], "--seed"),
        (
            ["--latent", "gumbel", "--latent-gates", "max_run=0"],
            "max_run: expected a whole number of steps",
        ),
        (["--latent", "gumbel", "--latent-gates", "end_ids=3"], "got 'end_ids=3'"),
        (["--latent", "gumbel", "--latent-span", "<think>…</think>"], "'<think>', which is not a token"),
        (
            ["--latent", "gumbel", "--latent-span", "<think>…</think>"],
            "error: --latent-span: expected tokens of",
        ),
        (["--latent", "gumbel", "--latent-span", "<think>…</think>"], "or leave the option out, for latent"),
        (["--latent", "gumbel", "--latent-span", "<think>"], "between them"),
        (
            ["--latent", "gumbel", "--latent-span", "a…a"],
            "error: --latent-span: expected what opens thinking",
        ),
    ],
)
def test_wrong_use_is_one_line(run, members, words, message):
    ended = run("generate", "x", "max_new_tokens=2", *members, *words)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err


def test_what_is_wrong_with_the_law_is_said_before_a_model_is_loaded(run):
    nowhere = ["--base", "nowhere", "--expert", "nowhere", "--antiexpert", "nowhere"]
    ended = run("generate", "x", *nowhere, "--latent", "gumble")
    assert "Did you mean" in ended.err
    ended = run("generate", "x", *nowhere, "--latent", "gumbel", "--seed", "-1")
    assert "--seed" in ended.err


@pytest.mark.parametrize(("given", "dwell"), [("2/8", (2, 8)), ("2 / 8", (2, 8)), ("0/1", (0, 1)), ("4", (4, 4))])
def test_dwell_is_one_number_or_two(tokenizer, given, dwell):
    decodes = sampler_of(LatentMixture(), tokenizer, None, f"max_run=7,dwell={given},min_entropy=0.25", 0)
    gates = decodes(range(2)).gates
    assert gates.dwell == dwell
    assert (gates.max_run, gates.min_entropy) == (7, 0.25)


def test_the_help_tells_of_pairs(run):
    assert "dwell=2/8" in run("generate", "--help").out


def test_without_latent_there_is_no_sampler():
    assert mixture_of(None, None) is None
    assert sampler_of(None, None, None, None, 0)(range(2)) is None
