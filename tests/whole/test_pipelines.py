"""Pipelines people already have: `pipeline`, chat, scoring; nothing changes but the model or a processor."""

from typing import Any

import pytest
import torch
from support.reference import Reference, next_logits
from support.tiny import EOS, VOCABULARY, build, tokenizer
from transformers import PreTrainedModel, TextGenerationPipeline, pipeline
from transformers.cache_utils import DynamicCache

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor

ALPHA = 0.8
TEXTS = ["Where does Bo live?", "Hi", "Start with 20, add 7. What is the result?"]
CHATS = [
    [{"role": "user", "content": "Where does Bo live?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}],
]
RUN = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def members() -> list[PreTrainedModel]:
    return [build("llama", 1, VOCABULARY + 5), build("qwen3", 2, VOCABULARY), build("qwen3", 3, VOCABULARY)]


@pytest.fixture(scope="module")
def model(members: list[PreTrainedModel]) -> ProxyTunedModel:
    base, expert, antiexpert = members
    tokenizers = dict.fromkeys(("base", "expert", "antiexpert"), tokenizer())
    return proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, tokenizers=tokenizers)


def texts_of(answers: Any) -> list[str]:
    flat = [a[0] if isinstance(a, list) else a for a in answers]
    return [
        a["generated_text"] if isinstance(a["generated_text"], str) else a["generated_text"][-1]["content"]
        for a in flat
    ]


def by_reference(members: list[PreTrainedModel], texts: list[str]) -> list[str]:
    tok, out = tokenizer(), []
    for text in texts:
        ids = tok(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        sequence = Reference(members, ALPHA).generate(ids, attention_mask=torch.ones_like(ids), **RUN)
        out.append(tok.decode(sequence[0, ids.shape[1] :], skip_special_tokens=True))
    return out


def make(model: PreTrainedModel) -> TextGenerationPipeline:
    return pipeline("text-generation", model=model, tokenizer=tokenizer())


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_pipeline(members: list[PreTrainedModel], model: ProxyTunedModel, batch_size: int) -> None:
    want = by_reference(members, TEXTS)
    assert len(set(want)) == 3
    got = make(model)(TEXTS, batch_size=batch_size, return_full_text=False, **RUN)
    assert texts_of(got) == want


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline_with_a_processor_on_the_base(members: list[PreTrainedModel], batch_size: int) -> None:
    base, expert, antiexpert = members
    want = by_reference(members, TEXTS)
    tokenizers = dict.fromkeys(("base", "expert", "antiexpert"), tokenizer())
    processor = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, tokenizers=tokenizers)
    with processor.attach(base):
        assert texts_of(make(base)(TEXTS, batch_size=batch_size, return_full_text=False, **RUN)) == want
    # Dropped in: padding is told by the experts' padding token. The same processor serves prompt after prompt.
    dropped_in = make(base)(TEXTS, batch_size=batch_size, return_full_text=False, logits_processor=[processor], **RUN)
    assert texts_of(dropped_in) == want
    alone = texts_of(make(base)(TEXTS, batch_size=batch_size, return_full_text=False, **RUN))
    assert alone != want


def test_chat_messages(members: list[PreTrainedModel], model: ProxyTunedModel) -> None:
    rendered = [tokenizer().apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHATS]
    want = by_reference(members, rendered)
    answers = make(model)(CHATS, **RUN)
    assert texts_of(answers) == want
    assert answers[1][0]["generated_text"][:3] == CHATS[1], "the conversation comes back with the answer appended"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scoring_through_the_logits(family: str) -> None:
    """As lm-eval's HFLM scores: one forward over right-padded context + continuation, log-softmax, gather."""
    members = [build(family, 1), build("qwen3", 2), build("qwen3", 3)]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], alpha=ALPHA, check_vocabulary=False)
    rows = [torch.randint(3, 240, (n,)) for n in (9, 5, 7)]
    context = 3
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right-padded, no mask: causal, so it is not seen
    with torch.no_grad():
        log_probabilities = model(batch).logits.log_softmax(-1)
    for row, log_p in zip(rows, log_probabilities, strict=True):
        got = [float(log_p[t - 1, row[t]]) for t in range(context, len(row))]
        want = [float(next_logits(members, ALPHA, row[:t]).log_softmax(-1)[row[t]]) for t in range(context, len(row))]
        assert got == pytest.approx(want, abs=2e-4)
        assert sum(want) < -1


def test_loss_is_the_mean_next_token_loss(members: list[PreTrainedModel], model: ProxyTunedModel) -> None:
    ids = torch.randint(3, 240, (2, 8))
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        loss = float(model(ids, labels=labels).loss)
    terms = [
        -float(next_logits(members, ALPHA, ids[b, :t]).log_softmax(-1)[ids[b, t]])
        for b in range(2)
        for t in range(1, 8)
        if labels[b, t] != -100
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), abs=1e-4)


def test_forward_shapes_and_returns(model: ProxyTunedModel) -> None:
    ids = torch.randint(3, 240, (2, 6))
    with torch.no_grad():
        full = model(ids)
        assert full.logits.shape == (2, 6, VOCABULARY + 5)
        assert full.logits.dtype == torch.float32
        assert isinstance(full.past_key_values, DynamicCache)
        assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        kept = torch.tensor([0, 3])
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, full.logits[:, kept])
        assert model(ids, use_cache=False).past_key_values is None
        logits, _ = model(ids, return_dict=False)
        assert torch.equal(logits, full.logits)


def test_member_logits_are_the_members_own(members: list[PreTrainedModel], model: ProxyTunedModel) -> None:
    ids, mask = torch.randint(3, 240, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    got = model.member_logits(ids, mask)
    assert list(got) == ["base", "expert", "antiexpert"]
    for role, member in zip(got, members, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(got[role][0], member(ids[:1]).logits[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[role][1, 2:], member(ids[1:, 2:]).logits[0], atol=1e-4, rtol=1e-4)


def test_the_members_are_not_changed(members: list[PreTrainedModel]) -> None:
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in members]
    base, expert, antiexpert = members
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, check_vocabulary=False)
    model.generate(torch.randint(3, 240, (1, 5)), eos_token_id=EOS, **RUN)
    assert model.base is base
    for member, weights in zip(members, before, strict=True):
        for name, value in member.state_dict().items():
            assert torch.equal(value, weights[name])
