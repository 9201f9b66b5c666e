"""Do two members mean the same tokens by the same ids: the comparison, and that wrapping really makes it."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.errors import InputError, VocabularyMismatchError, VocabularyWarning
from proxytune.models.member_tokenizers import find_tokenizer
from proxytune.models.vocabulary import check_same_tokens, differing_tokens
from proxytune.recipe import MemberRef

BASE = {"<pad>": 0, "<s>": 1, "the": 2, "cat": 3, "dog": 4, "sat": 5}


def moved(**ids: int) -> dict[str, int]:
    return BASE | ids


# --- the comparison ----------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (BASE, []),
        (dict(reversed(BASE.items())), []),  # the order of a mapping says nothing
        ({}, []),  # nothing in common, so no contradiction either
        # One-sided additions, on either side: tokens added after training, at new ids.
        (BASE | {"<tool>": 6, "<end>": 7}, []),
        ({t: i for t, i in BASE.items() if i < 4}, []),
        # Two tokens swapped, one id given to another token, one token moved to a free id.
        (moved(cat=4, dog=3), [(3, "cat", "dog"), (4, "dog", "cat")]),
        ({("fish" if t == "cat" else t): i for t, i in BASE.items()}, [(3, "cat", "fish")]),
        (moved(cat=9), [(3, "cat", None), (9, None, "cat")]),
        # A token inserted early moves all that follow it: what a retrained tokenizer looks like.
        (
            {"<pad>": 0, "<s>": 1, "a": 2, "the": 3, "cat": 4},
            [(2, "the", "a"), (3, "cat", "the"), (4, "dog", "cat")],
        ),
        # Tokens are compared to the letter: the space markers of two tokenizers are two tokens.
        ({"▁the": 2}, [(2, "the", "▁the")]),
    ],
)
def test_differing_tokens(other: dict[str, int], differing: list[tuple[int, str | None, str | None]]) -> None:
    assert differing_tokens(BASE, other) == differing
    # Seen from the other side it is the same list, with the sides exchanged.
    assert differing_tokens(other, BASE) == [(i, b, a) for i, a, b in differing]


# Few letters and few ids, so that drawn vocabularies do collide.
vocabularies = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 6)).filter(
    lambda v: len(set(v.values())) == len(v)
)


@given(vocabularies, vocabularies)
@settings(max_examples=300, deadline=None)
def test_nothing_differs_exactly_if_shared_ids_and_tokens_agree(a: dict[str, int], b: dict[str, int]) -> None:
    tokens_agree = all(a[t] == b[t] for t in a.keys() & b.keys())
    of_a, of_b = ({i: t for t, i in v.items()} for v in (a, b))
    ids_agree = all(of_a[i] == of_b[i] for i in of_a.keys() & of_b.keys())
    differing = differing_tokens(a, b)
    assert (differing == []) == (tokens_agree and ids_agree)
    # Every entry is a true statement about both sides, and is told once, in order.
    assert [(i, of_a.get(i), of_b.get(i)) for i, _, _ in differing] == differing
    assert [i for i, _, _ in differing] == sorted({i for i, _, _ in differing})
    assert all(x != y for _, x, y in differing)


@given(vocabularies, st.permutations("abcdef"))
@settings(max_examples=100, deadline=None)
def test_the_order_of_a_mapping_says_nothing(a: dict[str, int], order: list[str]) -> None:
    assert differing_tokens(a, {t: a[t] for t in order if t in a}) == []


def test_the_message_shows_the_first_tokens_and_the_way_out() -> None:
    with pytest.raises(VocabularyMismatchError) as caught:
        check_same_tokens(BASE, moved(cat=9), role="expert")
    assert str(caught.value) == (
        "vocabulary of the expert: expected the base's token ids (only the padding of the head may differ); got 2 ids "
        "that mean different tokens (id 3: 'cat' in the base, nothing in the expert; id 9: nothing in the base, 'cat' "
        "in the expert). Adding logits id by id would mix unrelated tokens. Use an expert with the base's tokenizer."
    )


# Five are shown; one less, exactly five, one more, and very many.
@pytest.mark.parametrize(("count", "more"), [(4, None), (5, None), (6, 1), (1000, 995)])
def test_a_long_list_is_cut(count: int, more: int | None) -> None:
    base = {f"a{i}": i for i in range(count)}
    with pytest.raises(VocabularyMismatchError, match=f"got {count} ids that mean different tokens") as caught:
        check_same_tokens(base, {f"b{i}": i for i in range(count)}, role="antiexpert")
    message = str(caught.value)
    assert len(re.findall(r"id \d+: 'a\d+' in the base, 'b\d+' in the antiexpert", message)) == min(count, 5)
    assert re.findall(r"; and (\d+) more\)", message) == ([] if more is None else [str(more)])
    assert len(message) < 700


def test_agreeing_vocabularies_pass() -> None:
    check_same_tokens(BASE, BASE | {"<tool>": 6}, role="expert")


# --- wrapping makes the comparison -------------------------------------------------------------------------------

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 250)}


def tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def swapped(a: str, b: str) -> dict[str, int]:
    return WORDS | {a: WORDS[b], b: WORDS[a]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without tokenizers; companions' heads are padded to another width than the base's."""
    folder = tmp_path_factory.mktemp("weights")
    build("llama", 1, 256).save_pretrained(folder / "base")
    build("gpt2", 2, 264).save_pretrained(folder / "expert")
    build("gpt2", 3, 264).save_pretrained(folder / "antiexpert")
    return folder


@pytest.fixture
def members(weights: Path, tmp_path: Path) -> Path:
    shutil.copytree(weights, tmp_path / "members")
    return tmp_path / "members"


def give(members: Path, **vocabularies: dict[str, int]) -> None:
    for role, vocabulary in vocabularies.items():
        tokenizer(vocabulary).save_pretrained(members / role)


def open_all(members: Path, **kwargs: Any) -> ProxyTunedModel:
    return proxytune.wrap(members / "base", expert=members / "expert", antiexpert=members / "antiexpert", **kwargs)


@pytest.mark.smoke
def test_equal_tokenizers_are_accepted_though_heads_are_padded(members: Path) -> None:
    give(members, base=WORDS, expert=WORDS | {"<tool>": 250}, antiexpert=WORDS)
    model = open_all(members)  # a warning would be an error here
    # The base's width, with the ids that only companions have dropped.
    ids = torch.tensor([[5, 6, 7]])
    alone = {role: m(ids).logits[0, -1] for role, m in (("base", model.base), ("expert", model.expert))}
    assert (len(alone["base"]), len(alone["expert"])) == (256, 264)
    want = alone["base"] + alone["expert"][:256] - model.antiexpert(ids).logits[0, -1, :256]
    torch.testing.assert_close(model(ids).logits[0, -1], want, atol=1e-4, rtol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_swapped_tokens_are_refused_by_name(members: Path, role: str) -> None:
    give(members, **({"base": WORDS, "expert": WORDS, "antiexpert": WORDS} | {role: swapped("w7", "w100")}))
    match = (
        f"vocabulary of the {role}: .* got 2 ids that mean different tokens "
        rf"\(id 7: 'w7' in the base, 'w100' in the {role}; id 100: 'w100' in the base, 'w7' in the {role}\)"
    )
    with pytest.raises(VocabularyMismatchError, match=match):
        open_all(members)
    # Whoever insists gets no comparison; whoever knows better says which tokenizer is meant.
    open_all(members, check_vocabulary=False)
    open_all(members, tokenizers={role: tokenizer(WORDS)})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_has_the_tokens_of_the_model_that_carries_it(members: Path, tmp_path: Path) -> None:
    give(members, base=WORDS, expert=WORDS, antiexpert=WORDS)
    folders = {role: members / role for role in ("base", "expert", "antiexpert")}
    lora = {
        role: peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=2,
                target_modules=["q_proj" if role == "base" else "c_attn"],
                fan_in_fan_out=role != "base",
            ),
        )
        for role, folder in folders.items()
    }
    model = proxytune.wrap(**lora)  # a warning would be an error here
    assert model.recipe is None  # an adapter in memory cannot be loaded again
    with ProxyTuningLogitsProcessor(lora["expert"], lora["antiexpert"]).attach(lora["base"]):
        pass
    lora["expert"].save_pretrained(tmp_path / "adapter")  # without a tokenizer
    saved = proxytune.wrap(**folders | {"expert": tmp_path / "adapter"})
    assert saved.recipe is not None
    assert find_tokenizer(MemberRef(str(tmp_path), load={"subfolder": "adapter"})) is not None
    give(members, expert=swapped("w7", "w100"))
    match = "vocabulary of the expert: .* got 2 ids that mean different tokens"
    for expert in (lora["expert"], tmp_path / "adapter"):
        with pytest.raises(VocabularyMismatchError, match=match):
            proxytune.wrap(**folders | {"expert": expert})
        with pytest.raises(VocabularyMismatchError, match="vocabulary of the antiexpert"):
            ProxyTuningLogitsProcessor(expert, folders["antiexpert"])
    tokenizer(WORDS).save_pretrained(tmp_path / "adapter")  # its own comes first
    assert isinstance(proxytune.wrap(**folders | {"expert": tmp_path / "adapter"}), ProxyTunedModel)


def test_a_tokenizer_given_counts_more_than_the_one_in_the_folder(members: Path) -> None:
    give(members, base=WORDS, expert=WORDS, antiexpert=WORDS)
    with pytest.raises(VocabularyMismatchError, match="vocabulary of the expert"):
        open_all(members, tokenizers={"expert": tokenizer(swapped("w4", "w5"))})


def test_the_comparison_is_made_for_models_that_were_loaded_before(members: Path) -> None:
    give(members, base=WORDS, expert=WORDS, antiexpert=swapped("w4", "w5"))
    loaded = open_all(members, check_vocabulary=False)
    with pytest.raises(VocabularyMismatchError, match="vocabulary of the antiexpert"):
        proxytune.wrap(loaded.base, expert=loaded.expert, antiexpert=loaded.antiexpert)


# Every family, because transformers makes up an empty tokenizer for some of them and raises for others.
@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma3"])
def test_a_member_without_a_tokenizer_is_told(tmp_path: Path, kind: str) -> None:
    for seed, role in enumerate(("base", "expert", "antiexpert")):
        build(kind, seed, 256, hidden=16).save_pretrained(tmp_path / role)
    with pytest.warns(VocabularyWarning, match="no tokenizer was found for base, expert, antiexpert"):
        open_all(tmp_path)
    # One tokenizer at the base's side alone: the companions' empty ones must neither agree nor disagree with it.
    give(tmp_path, base=WORDS)
    with pytest.warns(VocabularyWarning, match=r"no tokenizer was found for expert, antiexpert\. If ids mean"):
        open_all(tmp_path)


@pytest.mark.smoke
def test_what_silences_the_warning(members: Path) -> None:
    give(members, base=WORDS)
    with pytest.warns(VocabularyWarning, match=r"for antiexpert\. "):
        open_all(members, tokenizers={"expert": tokenizer(WORDS)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_all(members, check_vocabulary=False)
        open_all(members, tokenizers={"expert": tokenizer(WORDS), "antiexpert": tokenizer(WORDS)})


def test_companions_that_contradict_each_other_are_refused_without_the_base(members: Path) -> None:
    give(members, expert=WORDS, antiexpert=swapped("w4", "w5"))
    match = "vocabulary of the antiexpert: expected the expert's .*id 4: 'w4' in the expert, 'w5' in the antiexpert"
    for attempt in (open_all, lambda m: ProxyTuningLogitsProcessor(m / "expert", m / "antiexpert")):
        with pytest.raises(VocabularyMismatchError, match=match):
            attempt(members)
    give(members, antiexpert=WORDS)
    with pytest.warns(VocabularyWarning, match=r"for base\. "):
        open_all(members)


def test_models_from_nowhere_are_told() -> None:
    with pytest.warns(VocabularyWarning, match="for base, expert, antiexpert"):
        proxytune.wrap(build("llama", 1), expert=build("gpt2", 2), antiexpert=build("gpt2", 3))


def test_a_tokenizer_without_vocabulary_files_is_one(members: Path) -> None:
    # Byte-level tokenizers have nothing to save but their settings.
    for role in ("base", "expert", "antiexpert"):
        ByT5Tokenizer().save_pretrained(members / role)
    assert not list(members.glob("*/tokenizer.json"))
    open_all(members)


def test_roles_that_are_none(members: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizers: expected roles out of .*; got teacher\."):
        open_all(members, tokenizers={"teacher": tokenizer(WORDS)})


def test_the_processor_compares_companions_and_the_base_it_is_attached_to(members: Path) -> None:
    give(members, base=swapped("w7", "w8"), expert=WORDS, antiexpert=WORDS)
    base = open_all(members, check_vocabulary=False).base
    processor = ProxyTuningLogitsProcessor(members / "expert", members / "antiexpert")
    with pytest.raises(VocabularyMismatchError, match="id 7: 'w8' in the base, 'w7' in the expert"):
        processor.attach(base)
    with pytest.raises(VocabularyMismatchError, match="id 7: 'w8' in the base, 'w7' in the expert"):
        ProxyTuningLogitsProcessor(
            members / "expert", members / "antiexpert", tokenizers={"base": tokenizer(swapped("w7", "w8"))}
        )


def test_a_folder_without_the_file_of_its_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    assert find_tokenizer(MemberRef(str(tmp_path))) is None
