"""A pipeline makes the prompts of members that read their own, from texts and from chat messages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import VOCABULARY, build, tokenizer
from transformers import TextStreamer, pipeline

import proxytune
from proxytune.errors import InputError
from proxytune.formulas import ContextAware, Formula, PromptView, View
from proxytune.generation import PromptViewPipeline

TEXTS = ["<c>Bo lives in Oslo.</c>Where is Bo?", "<c>He is nine.</c>Age?", "Hi <c>x</c>there"]
WITHOUT = ["Where is Bo?", "Age?", "Hi there"]
RUN: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
VIEW = PromptView(without=("<c>", "</c>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    build("llama", 1, VOCABULARY).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return proxytune.wrap(folder, formula=ContextAware(alpha=2.0), members={"no_context": View(prompt=VIEW)})


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def by_hand(model: Any, text: str, own: str) -> str:
    tok = tokenizer()
    ids, theirs = (tok(t, return_tensors="pt", add_special_tokens=False) for t in (text, own))
    out = model.generate(**ids, prompts=dict.fromkeys(model.formula.roles, theirs), **RUN)
    return tok.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def written(messages: Any, template: str | None = None) -> str:
    return tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **({"chat_template": template} if template else {})
    )


def piped(model: Any) -> Any:
    return pipeline("text-generation", model=model, tokenizer=tokenizer(), pipeline_class=PromptViewPipeline)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_and_messages(model: Any, batch_size: int) -> None:
    pipe = piped(model)
    out = pipe(TEXTS, batch_size=batch_size, return_full_text=False, **RUN)
    assert [x[0]["generated_text"] for x in out] == [by_hand(model, *pair) for pair in zip(TEXTS, WITHOUT, strict=True)]
    out = pipe([chat(t) for t in TEXTS], batch_size=batch_size, **RUN)
    wanted = [by_hand(model, written(chat(t)), written(chat(w))) for t, w in zip(TEXTS, WITHOUT, strict=True)]
    assert [x[0]["generated_text"][-1]["content"] for x in out] == wanted
    assert out[0][0]["generated_text"][:2] == chat(TEXTS[0])  # what the base read


def test_a_template_a_system_message_and_roles_left_out(folder: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    views = {
        "one": View(prompt=PromptView(drop=("system",), template=template)),
        "two": View(prompt=PromptView(system="Lie.")),
        "three": View(prompt=PromptView(text="Say nothing.")),
    }
    for role, own in {
        "one": written(chat("Hi")[1:], template),
        "two": written([{"role": "system", "content": "Lie."}, chat("Hi")[1]]),
        "three": written([chat("Hi")[0], {"role": "user", "content": "Say nothing."}]),
    }.items():
        formula = Formula.parse(f"2*base - {role}")
        model = proxytune.wrap(folder, formula=formula, members={role: views[role]})
        out = piped(model)(chat("Hi"), **RUN)
        assert out[0]["generated_text"][-1]["content"] == by_hand(model, written(chat("Hi")), own)
    with pytest.raises(InputError, match=r"a prompt: expected messages, .*PromptView\(.*got a text, 'Hi'"):
        piped(proxytune.wrap(folder, formula="2*base - two", members={"two": views["two"]}))("Hi", **RUN)


def test_a_stream_samples_and_given_ids(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = piped(model)
    (out,) = pipe(TEXTS[0], streamer=TextStreamer(tokenizer()), **RUN)
    assert capsys.readouterr().out == out["generated_text"] + "\n"
    several = pipe(TEXTS[:2], num_return_sequences=2, max_new_tokens=3, do_sample=True, batch_size=2)
    assert [len(x) for x in several] == [2, 2]
    ids = tokenizer()(WITHOUT[1], return_tensors="pt")
    (other,) = pipe(TEXTS[0], prompts={"no_context": ids}, return_full_text=False, **RUN)
    assert other["generated_text"] == by_hand(model, TEXTS[0], WITHOUT[1])


def test_from_the_folder_of_a_recipe(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), pipeline_class=PromptViewPipeline)
    assert pipe.model.views == model.views == {"no_context": View("base", prompt=VIEW)}
    assert pipe(TEXTS[0], **RUN) == piped(model)(TEXTS[0], **RUN)


def test_without_prompt_views_it_is_transformers_own(folder: Path) -> None:
    plain = build("llama", 1, VOCABULARY)
    own = pipeline("text-generation", model=plain, tokenizer=tokenizer())
    assert piped(plain)(TEXTS[0], **RUN) == own(TEXTS[0], **RUN)
    neutral = proxytune.wrap(folder, formula="base + 0*other", members={"other": View()})
    assert piped(neutral)(TEXTS[0], **RUN) == own(TEXTS[0], **RUN)


def test_what_is_refused(folder: Path, model: Any) -> None:
    both = r"prompts: expected a prompt for .*: no_context; got None. Call generate\(.*PromptViewPipeline"
    with pytest.raises(InputError, match=both):
        pipeline("text-generation", model=model, tokenizer=tokenizer())(TEXTS[0], **RUN)
    with pytest.raises(InputError, match=both):
        model.generate(torch.tensor([[5, 6]]), **RUN)
    undeclared = proxytune.wrap(folder, formula=ContextAware())
    with pytest.raises(InputError, match=r"the no_context: expected a PromptView.*got View\(.*prompt=PromptView"):
        piped(undeclared)
    with pytest.raises(InputError, match=r"a prompt: expected '</c>' after '<c>'.*got '<c>open'"):
        piped(model)("<c>open", **RUN)
