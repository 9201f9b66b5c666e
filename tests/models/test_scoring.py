"""Scores against a slow statement of the definition: one text at a time, no cache, no padding, float64."""

import copy
import math
from typing import Any

import pytest
import torch
from live_bytes import counted
from support.tiny import EOS, VOCABULARY, build, shared, tokenizer
from torch.nn.functional import log_softmax
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

import proxytune
from proxytune.errors import InputError, NumericalError, UnsupportedModelError
from proxytune.formulas import Formula, ProxyTuning
from proxytune.formulas.contrastive import ContrastiveDecoding, DExperts
from proxytune.formulas.experts import DeRa, Nudging
from proxytune.formulas.gates import Gate
from proxytune.formulas.guidance import ClassifierFreeGuidance, ContextAware
from proxytune.formulas.proxy_tuning import EmulatedFineTuning
from proxytune.formulas.schedules import Schedule
from proxytune.models import scored_parts, scoring
from proxytune.models.scored_texts import encode_pair
from proxytune.models.scoring import Scores, score

ALPHA = 0.7
PLAIN: dict[str, Any] = {"check_vocabulary": False, "alpha": ALPHA}


def texts(*lengths: int, top: int = 240) -> list[list[int]]:
    return [torch.randint(3, top, (n,)).tolist() for n in lengths]


@torch.no_grad()
def by_definition(
    members: list[PreTrainedModel], ids: list[int], start: int, alpha: float = ALPHA
) -> tuple[list[float], list[bool]]:
    """`Σ log softmax(z_base + α (z_expert − z_antiexpert))` at the tokens from `start` on, in float64."""
    row = torch.tensor([ids])  # its last token is predicted, not read
    # Experts are multiplied in at most float32.
    wide = [m if "Experts" in str(m) else copy.deepcopy(m).double() for m in members]
    z = [m(row[:, :-1], use_cache=False).logits[0].double() for m in wide]
    combined, embeddable = z[0], min(m.get_input_embeddings().weight.shape[0] for m in members)
    if len(z) == 3:
        shared_width = min(x.shape[1] for x in z)
        combined[:, :shared_width] += alpha * (z[1][:, :shared_width] - z[2][:, :shared_width])
    combined[:, embeddable:] = -torch.inf
    logprobs, targets = log_softmax(combined, -1)[start - 1 :], row[0, start:]
    return logprobs.gather(1, targets[:, None])[:, 0].tolist(), (logprobs.argmax(-1) == targets).tolist()


def compare(scores: Scores, members: list[PreTrainedModel], prompts: list[list[int]], given: list[list[int]]) -> None:
    for i, (prompt, text) in enumerate(zip(prompts, given, strict=True)):
        want, greedy = by_definition(members, prompt + text, max(1, len(prompt)))
        assert scores.logprobs[i].dtype == torch.float64
        assert scores.logprobs[i].tolist() == pytest.approx(want, abs=5e-5), i
        assert scores.likeliest[i].tolist() == greedy
        assert float(scores.sums[i]) == pytest.approx(sum(want), abs=5e-4)
        assert scores.counts[i] == len(want)
        assert scores.greedy[i] == all(greedy)
    want_total = float(scores.sums.sum()) / sum(map(len, scores.logprobs))
    assert scores.perplexity == pytest.approx(math.exp(-want_total))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a few positions: several parts of prompts, and several of scored tokens."""
    monkeypatch.setattr(scored_parts, "PART", 12)


@pytest.mark.smoke
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mamba2", "qwen3_next"])
def test_scores_are_those_of_the_definition(kind: str) -> None:
    members = [shared(kind, 1, 261), shared("llama", 2, 259), shared("qwen3", 3, 259)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    prompts = [*texts(5, 0, 11, 0, 1, 23)]
    given = [*texts(4, 9, 1, 21, 7, 2)]
    compare(score(model, given, prompts=prompts, batch_size=4), members, prompts, given)
    compare(score(members[0], given, prompts=prompts, batch_size=3), members[:1], prompts, given)


def test_parts_and_batches_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [shared("llama", 1), shared("qwen3", 2), shared("qwen3", 3)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    prompts, given = texts(9, 3, 0, 15), texts(8, 30, 12, 3)
    whole = score(model, [torch.tensor(text) for text in given], prompts=prompts)
    forwards = model.token_forwards["base"]
    assert forwards == 4 * (33 - 1)
    for part, batch in ((1, 4), (7, 1), (64, 3)):
        monkeypatch.setattr(scored_parts, "PART", part)
        again = score(model, given, prompts=prompts, batch_size=batch)
        for a, b in zip(whole.logprobs, again.logprobs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    model.alpha = 0.0
    base = score(members[0], given, prompts=prompts)
    for a, b in zip(score(model, given, prompts=prompts).logprobs, base.logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_a_text_beyond_a_switch_is_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
    }
    config = Phi3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=12,
        rope_parameters={**rope, "original_max_position_embeddings": 12},
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    members = [Phi3ForCausalLM(config).eval(), shared("llama", 1), shared("llama", 2)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    monkeypatch.setattr(scored_parts, "PART", 5)
    prompts, given = texts(6, 0, 4, 0), texts(12, 20, 5, 14)  # two within the switch
    prompts[2], given[3] = prompts[2][:2], given[3][:13]
    compare(score(model, given, prompts=prompts, batch_size=4), members, prompts, given)
    compare(score(members[0], given, prompts=prompts, batch_size=4), members[:1], prompts, given)


@pytest.mark.usefixtures("small_parts")
def test_members_read_prompts_of_their_own() -> None:
    base = shared("llama", 1)
    model = proxytune.wrap(base, formula=ContextAware(alpha=0.5), check_vocabulary=False)
    with_context, without, given = texts(12, 3, 20, 6), texts(4, 9, 1, 6), texts(5, 14, 3, 2)
    prompts = {"base": with_context, "no_context": without}
    scores = score(model, given, prompts=prompts, batch_size=3)
    for i, text in enumerate(given):
        n, z = len(text), []
        for before in (with_context[i], without[i]):
            with torch.no_grad():
                z.append(copy.deepcopy(base).double()(torch.tensor([before + text[:-1]])).logits[0, -n:])
        found = log_softmax(1.5 * z[0] - 0.5 * z[1], -1).gather(1, torch.tensor(text)[:, None])[:, 0]
        assert scores.logprobs[i].tolist() == pytest.approx(found.tolist(), abs=5e-5)
    for wrong, message in (
        (with_context, "prompts: expected role → prompts, for base, no_context; got prompts for base"),
        ({"base": with_context}, "prompts: expected role → prompts, for base, no_context; got prompts for base"),
        ({**prompts, "x": without}, "got prompts for base, no_context, x"),
        ({**prompts, "no_context": without[:2]}, r"prompts\['no_context'\]: expected 4 prompts, .*; got 2"),
        (
            {**prompts, "no_context": [*without[:3], []]},
            "the no_context's prompt of text 3: expected at least one token",
        ),
    ):
        with pytest.raises(InputError, match=message):
            score(model, given, prompts=wrong)


def nucleus(z: torch.Tensor, top_p: float) -> torch.Tensor:
    """`[n, V]`: the fewest likeliest tokens that hold this share."""
    p, order = z.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < top_p)


FORMULAS = {
    "emulated fine-tuning": EmulatedFineTuning(alpha=0.7),
    "contrastive decoding": ContrastiveDecoding(beta=0.4, share=0.01),
    "dexperts": DExperts(alpha=0.6, top_p=0.999),
    "dera": DeRa(lam=1.3),
    "guidance": ClassifierFreeGuidance(gamma=1.4),
    "gate": ProxyTuning(alpha=0.8, gate=Gate(entropy=4.4)),
    "nudging": Nudging(gamma=0.15),
    "schedule": ProxyTuning(alpha=Schedule.linear(1.5, 0.0, 6)),
    "written down": Formula.parse("base + 0.5*(expert - antiexpert) + 0.3*amateur"),
}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", FORMULAS)
def test_scores_under_every_formula(name: str) -> None:
    formula = FORMULAS[name]
    everyone = {"base": shared("llama", 1)} | {
        role: shared("qwen3", seed)
        for seed, role in enumerate(("expert", "antiexpert", "amateur", "aligned", "nudging"), 2)
    }
    companions = {role: everyone[role] for role in formula.roles if role in everyone}
    pair = {role: companions.pop(role) for role in ("expert", "antiexpert") if role in companions}
    model = proxytune.wrap(everyone["base"], **pair, members=companions, formula=formula, check_vocabulary=False)
    before, given = texts(9, 2, 14), texts(7, 12, 4)
    own = {role: texts(3, 8, 1) for role in formula.roles if role not in everyone}
    scores = score(model, given, prompts={"base": before, **own} if own else before)
    shares = []
    for i, text in enumerate(given):
        z = {}
        for role in ("base", *formula.roles):
            wide = copy.deepcopy(everyone.get(role, everyone["base"])).double()
            row = torch.tensor([own.get(role, before)[i] + text[:-1]])
            with torch.no_grad():
                z[role] = wide(row, use_cache=False).logits[0, -len(text) :]
        combined, base = torch.zeros_like(z["base"]), log_softmax(z["base"], -1)
        for term in formula.terms():
            weight = torch.as_tensor(
                [term.weight if isinstance(term.weight, float) else 1.5 - 0.25 * min(t, 6) for t in range(len(text))]
            )
            if term.member == "antiexpert" and name == "schedule":
                weight = -weight
            combined += weight.double()[:, None] * (log_softmax(z[term.member], -1) if term.log else z[term.member])
        if name == "contrastive decoding":
            combined[base < base.amax(-1, keepdim=True) + math.log(0.01)] = -torch.inf
        elif name == "dexperts":
            combined[~nucleus(z["base"], 0.999)] = -torch.inf
        elif name in ("gate", "nudging"):
            unsure = -(base.exp() * base).sum(-1) > 4.4 if name == "gate" else base.exp().amax(-1) < 0.15
            shares += unsure.tolist()
            combined = torch.where(unsure[:, None], combined, z["base"])
        want = log_softmax(combined, -1).gather(1, torch.tensor(text)[:, None])[:, 0]
        assert scores.logprobs[i].tolist() == pytest.approx(want.tolist(), abs=1e-4)
        if name in ("contrastive decoding", "dexperts"):
            shares += want.isinf().tolist()
    if name in ("gate", "nudging", "contrastive decoding", "dexperts"):
        assert set(shares) == {True, False}, "the example shows both"


def test_whole_logits_never_exist() -> None:
    width, length = 16_384, 192
    members = [build("llama", seed, width).bfloat16() for seed in range(3)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    given = texts(length, length)

    def peak(positions: int) -> int:
        patch = pytest.MonkeyPatch()
        patch.setattr(scored_parts, "PART", positions)
        with patch.context(), counted(least=1 << 14) as live:
            score(model, given)
        patch.undo()
        return live.peak

    of_position = 3 * width * 2  # three members in bfloat16
    small, large = peak(16), peak(64)
    assert small <= 16 * of_position + (4 << 20)  # and blocks of half a megabyte, caches, activations
    assert 40 * of_position < large - small <= 48 * of_position * 1.02, "the part decides, and nothing else"
    assert small < 2 * length * of_position / 6, "and not the texts"


def test_huge_vocabularies_take_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [shared("llama", 1), shared("llama", 2), shared("llama", 3)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    monkeypatch.setattr(scored_parts, "PART_BYTES", 10 * 3 * 256 * 4)
    parts = list(scoring.parts_of(model, texts(40, 33), prompts=texts(0, 30)))
    assert {len(part.targets) for part in parts} == {10, 8}  # 5 columns of 2 rows
    assert sum(int(part.scored.sum()) for part in parts) == 39 + 33


def test_a_forbidden_token_has_minus_infinity_and_no_number_is_an_error() -> None:
    base = build("llama", 1)
    given = texts(6, 5)
    forbidden: dict[str, float] = {}

    def changed(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(given[1][3]), forbidden["value"])

    base.lm_head.register_forward_hook(changed)
    given[0] = [t if t != given[1][3] else 5 for t in given[0]]
    forbidden["value"] = -math.inf
    scores = score(base, given)
    assert scores.logprobs[1][2] == -math.inf
    assert scores.logprobs[0].isfinite().all()
    assert scores.perplexity == math.inf
    assert not scores.likeliest[1][2]
    forbidden["value"] = math.nan
    with pytest.raises(NumericalError, match=r"text [01], scored token 0: expected logits with a distribution; got a"):
        score(base, given)


def test_what_cannot_be_scored_is_refused_by_its_number() -> None:
    members = {"base": shared("llama", 1), "expert": build("llama", 2, context=20), "antiexpert": shared("llama", 3)}
    model = proxytune.wrap(**members, **PLAIN)
    fine = [7, 8, 9]
    for given, prompts, message in (
        ([], None, "texts: expected at least one text, .*; got 0 texts"),
        ("abc", None, "texts: expected at least one text, .*; got 'abc'"),
        ([fine, []], None, "text 1: expected at least two tokens without a prompt; got 0. Leave it out"),
        ([fine, [5]], None, "text 1: expected at least two tokens without a prompt; got 1. .* BOS token"),
        ([fine, []], [[4], [4]], "text 1: expected at least one token after the prompt; got 0"),
        ([fine, fine], [[4]], "prompts: expected 2 prompts, one for each text; got 1"),
        ([fine, [3, 256]], None, "text 1: expected ids from 0 to 255, which every member can embed; got id 256"),
        ([fine, [3, -1]], None, "text 1: expected token ids"),
        ([fine * 6, fine * 4], [[4], fine * 4], "text 1: expected at most 21 tokens .* the expert .*; got 24"),
        ([["a"]], None, "text 0: expected token ids"),
    ):
        with pytest.raises(InputError, match=message):
            score(model, given, prompts=prompts)  # type: ignore[arg-type]
    score(model, [fine * 7], batch_size=1)  # the last of 21 tokens is predicted, not read
    with pytest.raises(InputError, match="batch_size: expected a whole number"):
        score(model, [fine], batch_size=0)
    training = build("llama", 4).train()
    with pytest.raises(InputError, match=r"evaluation mode.*; got training mode of base"):
        score(training, [fine])
    with pytest.raises(UnsupportedModelError, match=r"decoder-only"):
        score(build("t5", 1), [fine])


@pytest.mark.parametrize(
    ("prompt", "text", "is_chat", "want"),
    [
        ("Hi: ", "yes", False, ("Hi:", " yes")),  # the space is the continuation's
        ("Hi:", " yes", False, ("Hi:", " yes")),
        ("", "yes", False, ("", "yes")),
        ("user: Hi\nassistant: ", "yes", True, ("user: Hi\nassistant: ", "yes")),  # what generate() reads
    ],
)
def test_pairs_are_split_as_lm_eval_does(prompt: str, text: str, is_chat: bool, want: tuple[str, str]) -> None:
    tok = tokenizer()
    got = encode_pair(tok, prompt, text, is_chat=is_chat)
    assert tuple(tok.decode(list(ids)) for ids in got) == want


def test_a_chat_prompt_ends_where_its_template_ends() -> None:
    class Merging:
        """Writes " y" as one token, as a BPE would."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [ord(c) for c in text.replace(" y", "Y")]}

    got = encode_pair(Merging(), "a: ", "yes", is_chat=True)  # type: ignore[arg-type]
    assert got == ([ord(c) for c in "a: "], [ord(c) for c in "yes"])


def test_numbers_of_lm_eval() -> None:
    """`loglikelihood` of 0.4.13, written out: right-padded rows without a mask, log-softmax in float32, a sum."""
    members = [shared("llama", 1, VOCABULARY), shared("qwen3", 2, VOCABULARY), shared("qwen3", 3, VOCABULARY)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], **PLAIN)
    tok = tokenizer()
    pairs = [("Where is Bo? ", "In Paris."), ("Hi", "!"), ("Start with 20, add 7. What is it?", " 27")]
    encoded = [encode_pair(tok, *pair) for pair in pairs]
    rows = [torch.tensor((*context, *continuation)[:-1]) for context, continuation in encoded]
    with torch.no_grad():
        logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    scores = score(model, [text for _, text in encoded], prompts=[prompt for prompt, _ in encoded])
    for i, (row, (_, continuation)) in enumerate(zip(rows, encoded, strict=True)):
        found = log_softmax(logits[i, : len(row)], -1)[-len(continuation) :]
        want = found.gather(-1, torch.tensor(continuation)[:, None]).sum()
        assert float(scores.sums[i]) == pytest.approx(float(want), abs=2e-4)
        assert bool(scores.greedy[i]) == bool((found.argmax(-1) == torch.tensor(continuation)).all())
