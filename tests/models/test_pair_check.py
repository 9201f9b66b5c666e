"""Every wrong pair gets its sentence, all of them at once; a right one gets none."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import VOCABULARY, build, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, DynamicCache

import proxytune
from proxytune.costs.model_size import cached_values, weight_bytes
from proxytune.demo import bundled
from proxytune.models import loading, pair_check, pair_files, pair_probe
from proxytune.models.members.member import Member
from proxytune.models.pair_check import check_pair
from proxytune.models.pair_probe import Text, measured
from proxytune.models.pair_report import PairReport

# What PEFT asks the model for on loading, and what it says of an adapter in a model that has one.
peft_warnings = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft")

Change = Callable[["Folders"], Sequence[Any]]


class Folders:
    """Makes the folders of a pair, and of what is wrong with it."""

    def __init__(self, place: Path, made: Path) -> None:
        self.place, self.made = place, made
        self.base, self.expert, self.antiexpert = (made / name for name in ("large", "small-it", "small"))

    def copy(self, source: Path, name: str = "changed") -> Path:
        return shutil.copytree(source, self.place / name)

    def edited(self, source: Path, file: str, name: str = "changed", **changes: Any) -> Path:
        folder = self.copy(source, name)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
        return folder

    def cut(self, source: Path) -> Path:
        file = self.copy(source) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-999])
        return file.parent

    def model(self, name: str, kind: str = "llama", seed: int = 7, vocab: int = VOCABULARY, **settings: Any) -> Path:
        if kind == "bert":
            ids = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            return save(self.place / name, BertLMHeadModel(BertConfig(**ids, intermediate_size=32)))
        return save(self.place / name, build(kind, seed, vocab, **settings))


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert and an antiexpert, random and small."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, (name, hidden) in enumerate((("large", 32), ("small-it", 16), ("small", 16))):
        save(folder / name, build("llama", seed, VOCABULARY, hidden=hidden))
    return folder


@pytest.fixture
def folders(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setattr(pair_files, "cached", lambda member: 1.0)  # half of the time, and it has its own test
    return Folders(tmp_path, made)


def checked(sources: Sequence[Any], **settings: Any) -> PairReport:
    return check_pair(dict(zip(("base", "expert", "antiexpert"), map(str, sources), strict=True)), **settings)


# --- right use ------------------------------------------------------------------------------------------------------


def test_a_right_pair_has_no_finding(folders: Folders) -> None:
    small = checked((folders.base, folders.expert, folders.antiexpert))
    own = checked((bundled("large-base"), bundled("tiny-tuned"), bundled("tiny-base")), alpha=0.5)
    files = checked((folders.base, folders.expert, folders.antiexpert), weights=False)
    for report in (small, own, files):
        assert (report.findings, report.refused, report.ok) == ([], {}, True)
        assert [member.role for member in report.members] == ["base", "expert", "antiexpert"]
        assert report.cost is not None
    assert (files.shift, files.weights, small.weights) == (None, False, True)
    assert files.members == small.members


def test_the_figures_are_those_of_the_models(folders: Folders) -> None:
    report = checked((folders.base, folders.expert, folders.antiexpert))
    model = proxytune.wrap(folders.base, expert=folders.expert, antiexpert=folders.antiexpert)
    for figures, member in zip(report.members, model.members, strict=True):
        assert figures.parameters == member.model.num_parameters()
        assert figures.weights["float32"] == 4 * figures.parameters == 2 * figures.weights["bfloat16"]
        head = 2 * 2 * VOCABULARY * member.model.config.hidden_size  # in 16 bits, like the norms
        assert head < figures.weights["4 bits"] < figures.weights["8 bits"] < figures.weights["bfloat16"]
        assert (figures.context, figures.rows, figures.dtype) == (512, VOCABULARY, "float32")
    assert list(report.ends) == [model.generation_config.eos_token_id] == [2]
    widths = (32, 16, 16)
    sizes = [own.weights["float32"] - 4 * VOCABULARY * w for own, w in zip(report.members, widths, strict=True)]
    assert report.cost is not None
    assert report.cost.bytes == pytest.approx(sum(sizes) / sizes[0])
    assert report.cost.seconds["cpu"] > report.cost.base_seconds["cpu"]


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gemma3", "jamba"])
@pytest.mark.filterwarnings("ignore")
def test_a_text_takes_as_much_cache_as_is_said(kind: str) -> None:
    model = build(kind, 0, 64, context=1000)

    def held(length: int) -> list[int]:
        cache = DynamicCache(config=model.config)
        model(torch.arange(length)[None] % 64, past_key_values=cache, use_cache=True)
        states = [state for layer in cache.layers for state in vars(layer).values()]
        every = [x for state in states for x in (state.values() if isinstance(state, dict) else [state])]
        return [x.numel() for x in every if isinstance(x, torch.Tensor)]

    grown, whole = sum(held(5)) - sum(held(4)), sum(held(1000))
    assert grown == cached_values(model.config)
    assert weight_bytes(model, 16) == 2 * model.num_parameters()
    assert pair_probe.cached(Member(model.to("meta"), "base")) == whole


def test_the_shift_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    logits = {role: [torch.randn(3, 9), torch.randn(2, 9)] for role in ("base", "expert", "antiexpert")}
    texts = [Text((1, 2, 3, 4), 2, True), Text((1, 2, 3), 2, False)]
    shift = measured(texts, logits, (0.5, -0.5), {4})
    assert shift is not None
    assert shift.tokens == 5
    base, expert, antiexpert = (torch.cat(logits[role]) for role in logits)
    wanted = torch.nn.functional.kl_div(antiexpert.log_softmax(-1), expert.softmax(-1), reduction="sum") / 5
    assert shift.pair == pytest.approx(float(wanted), abs=1e-6)
    moved = base + 0.5 * (expert - antiexpert)
    wanted = torch.nn.functional.kl_div(base.log_softmax(-1), moved.softmax(-1), reduction="sum") / 5
    assert shift.steered == pytest.approx(float(wanted), abs=1e-6)
    assert shift.changed == float((moved.argmax(-1) != base.argmax(-1)).sum()) / 5
    assert shift.turn_ends["expert"] == pytest.approx(float(logits["expert"][0][-1].softmax(-1)[4]))
    alone = measured(texts, {role: logits[role] for role in ("expert", "antiexpert")}, (0.5, -0.5), {4})
    assert alone is not None
    assert (alone.steered, alone.changed, alone.pair) == (None, None, pytest.approx(shift.pair))


def test_one_member_is_in_memory_at_a_time(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Any]] = []

    def open_member(*args: Any, **settings: Any) -> Any:
        assert not any(model() is not None for model in opened)
        model = loading.open_member(*args, **settings)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(pair_check, "open_member", open_member)
    assert checked((folders.base, folders.expert, folders.base)).weights
    assert len(opened) == 2, "the base and the antiexpert are one model"


def test_what_does_not_fit_into_memory_is_not_loaded(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_check, "_memory", lambda device: 60_000.0)
    report = checked((folders.base, folders.expert, folders.antiexpert))
    assert [found.kind for found in report.findings] == ["note"]
    assert re.search(r"the base's weights \(.* GiB\) were not looked at: cpu has", report.findings[0].text)
    assert (report.ok, report.weights) == (True, False)
    assert report.shift is not None
    assert report.shift.steered is None


# --- wrong pairs ----------------------------------------------------------------------------------------------------


def reworded(folder: Path, *swaps: str) -> Path:
    """Give each token of one letter the id of the next, round in a circle."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = vocab | {a: vocab[b] for a, b in zip(swaps, swaps[1:] + swaps[:1], strict=True)}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def without(folder: Path, pattern: str) -> Path:
    for file in folder.glob(pattern):
        file.unlink()
    return folder


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def lose(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: [weights.pop(key) for key in list(weights) if name in key]


def only_ends(weights: dict[str, torch.Tensor]) -> None:
    """A model that ends the text, whatever came before."""
    for name, weight in weights.items():
        if ("layers" in name and "norm" not in name) or name == "lm_head.weight":
            weight.zero_()
    weights["model.embed_tokens.weight"].fill_(1.0)
    weights["lm_head.weight"][2] = 1.0


def never_ends(weights: dict[str, torch.Tensor]) -> None:
    only_ends(weights)
    weights["lm_head.weight"][2] = -1.0


def broken(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][0] = torch.nan


def adapter(folders: Folders, below: Path) -> Path:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(below)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folders.place / "adapter")
    return folders.place / "adapter"


def recipe(folders: Folders) -> Path:
    model = proxytune.wrap(folders.base, expert=folders.expert, antiexpert=folders.antiexpert)
    model.save_pretrained(folders.place / "recipe")
    return folders.place / "recipe"


def retold(folder: Path, template: str, *tokens: str) -> Path:
    """Give a folder's tokenizer another chat template, and further tokens."""
    other = AutoTokenizer.from_pretrained(folder)
    other.chat_template = template
    other.add_tokens(list(tokens), special_tokens=True)
    other.save_pretrained(folder)
    return folder


IM = "{% for m in messages %}<|im|>{{ m['content'] }}{% endfor %}"

# What is wrong → the three members, what is said of it, and whether weights have to be looked at.
PROBLEMS: dict[str, tuple[Change, str, bool]] = {
    "swapped, by their names": (
        lambda f: (f.base, f.antiexpert, f.expert),
        "look swapped: the antiexpert is '.*small-it', the expert '.*small'. Steered so",
        False,
    ),
    "swapped, by an adapter": (
        lambda f: (f.base, f.antiexpert, adapter(f, f.antiexpert)),
        "look swapped: the antiexpert is an adapter of '.*small', which is the expert",
        False,
    ),
    "swapped, by end tokens": (
        lambda f: (f.base, f.antiexpert, f.edited(f.antiexpert, "generation_config.json", eos_token_id=[2, 7])),
        r"look swapped: the antiexpert has end tokens of its own \(ids 7\)",
        False,
    ),
    "swapped, by who ends a turn": (
        lambda f: (
            f.base,
            reweighted(f.copy(f.antiexpert, "one"), never_ends),
            reweighted(f.copy(f.antiexpert, "other"), only_ends),
        ),
        r"look swapped: after a finished answer .* the antiexpert ends its turn \(.*\), and the expert goes",
        True,
    ),
    "one folder for both": (
        lambda f: (f.base, f.expert, f.expert),
        "expected another model than the expert; got '.*small-it' for both",
        False,
    ),
    "equal weights": (
        lambda f: (f.base, f.copy(f.antiexpert), f.antiexpert),
        r"look equal: they predict the same on \d+ tokens .*Check that the expert is the tuned model",
        True,
    ),
    "nearly equal weights": (
        lambda f: (
            f.base,
            reweighted(f.copy(f.antiexpert), lambda weights: weights["model.norm.weight"].mul_(1.002)),
            f.antiexpert,
        ),
        "look nearly equal: KL .* nats per token",
        True,
    ),
    "the base as expert": (
        lambda f: (f.base, f.base, f.antiexpert),
        "the expert is the base itself, so what is added is base - antiexpert",
        False,
    ),
    "an expert larger than the base": (
        lambda f: (f.antiexpert, f.base, f.copy(f.base)),
        "the expert is larger than the base",
        False,
    ),
    "another antiexpert": (
        lambda f: (f.base, f.expert, f.model("other", hidden=24)),
        "the antiexpert is another model than the expert was tuned from: hidden_size is 24, the expert's 16",
        False,
    ),
    "another tokenizer": (
        lambda f: (f.base, reworded(f.copy(f.expert), "a", "b"), f.antiexpert),
        "vocabulary of the expert: .* 2 ids that mean different tokens .*'a' in the base, 'b' in the expert",
        False,
    ),
    "another tokenizer of the base": (
        lambda f: (reworded(f.copy(f.base), "a", "b", "c"), f.expert, f.antiexpert),
        "vocabulary of the antiexpert: .* 3 ids that mean different tokens",
        False,
    ),
    "no tokenizer": (
        lambda f: (f.base, without(f.copy(f.expert), "token*"), f.antiexpert),
        "the vocabularies were not compared: no tokenizer was found for expert",
        False,
    ),
    "a chat template of other tokens": (
        lambda f: (f.base, retold(f.copy(f.expert), IM, "<|im|>"), f.antiexpert),
        r"the expert's chat template writes the token '<\|im\|>', which the base's tokenizer lacks",
        False,
    ),
    "chat tokens that a member cannot embed": (
        lambda f: (
            retold(f.copy(f.base, "b"), IM, "<|im|>"),
            retold(f.copy(f.expert, "e"), IM, "<|im|>"),
            retold(f.copy(f.antiexpert, "a"), IM, "<|im|>"),
        ),
        r"chat prompts hold id 259, and the antiexpert embeds 259 ids: each of them would be refused",
        False,
    ),
    "an end token that the base cannot embed": (
        lambda f: (
            f.base,
            f.edited(
                f.model("wide", hidden=16, vocab=VOCABULARY + 1), "generation_config.json", eos_token_id=VOCABULARY
            ),
            f.antiexpert,
        ),
        r"texts cannot end with id 259, an end token of the expert: not every member can embed it \(259 ids are common",
        False,
    ),
    "an encoder-decoder": (
        lambda f: (f.base, f.model("t5", "t5"), f.antiexpert),
        "the expert: expected a decoder-only model; got '.*t5', .*an encoder-decoder",
        False,
    ),
    "an encoder of images": (
        lambda f: (f.base, f.edited(f.expert, "config.json", model_type="vit", architectures=["ViT"]), f.antiexpert),
        r"the expert: expected a causal LM \(AutoModelForCausalLM\); got '.*', ViT",
        False,
    ),
    "an encoder of text": (
        lambda f: (f.base, f.model("bert", "bert", hidden=16), f.antiexpert),
        "the expert: expected a causal LM, whose results do not depend on later tokens",
        True,
    ),
    "a head that is missing": (
        lambda f: (f.base, reweighted(f.copy(f.expert), lose("lm_head")), f.antiexpert),
        "the expert: expected a checkpoint with all weights of LlamaForCausalLM; got .*without lm_head.weight",
        True,
    ),
    "a matrix that is missing": (
        lambda f: (f.base, reweighted(f.copy(f.expert), lose("layers.1.mlp.up")), f.antiexpert),
        "without model.layers.1.mlp.up_proj.weight. transformers would draw these weights at random",
        True,
    ),
    "layers that are left over": (
        lambda f: (f.base, f.edited(f.expert, "config.json", num_hidden_layers=1), f.antiexpert),
        "the expert: .*which transformers would leave out. Correct the number of layers",
        True,
    ),
    "weights of another shape": (
        lambda f: (f.base, f.edited(f.expert, "config.json", intermediate_size=48), f.antiexpert),
        "with another shape of model.layers.0.mlp.down_proj.weight",
        True,
    ),
    "weights that are not numbers": (
        lambda f: (f.base, reweighted(f.copy(f.expert), broken), f.antiexpert),
        "the expert: expected finite logits; got NaN or .inf on a built-in text, in float32",
        True,
    ),
    "a file that is cut off": (
        lambda f: (f.base, f.cut(f.expert), f.antiexpert),
        "the expert: expected a model that loads with these arguments; got '.*changed'",
        True,
    ),
    "a reward model": (
        lambda f: (
            f.base,
            f.edited(f.expert, "config.json", architectures=["LlamaForSequenceClassification"]),
            f.antiexpert,
        ),
        "expected a model that was trained to generate text; got .*which scores texts",
        True,
    ),
    "a quantiser that is not there": (
        lambda f: (
            f.base,
            f.edited(f.expert, "config.json", quantization_config={"quant_method": "aqlm", "nbits_per_codebook": 16}),
            f.antiexpert,
        ),
        "the expert: expected a model that loads with these arguments; .*transformers says",
        True,
    ),
    "a wrong path": (
        lambda f: (f.base, f.place / "nothing", f.antiexpert),
        "the expert: .*got '.*nothing', where there is no folder. Correct the path.",
        False,
    ),
    "a folder without a model": (
        lambda f: (f.place, f.expert, f.antiexpert),
        "the base: .*It has no config.json",
        False,
    ),
    "a family that nobody knows": (
        lambda f: (f.base, f.edited(f.expert, "config.json", model_type="no-such"), f.antiexpert),
        "the expert: expected a config that transformers reads; got '.*changed'. It says: .*no-such",
        False,
    ),
    "an adapter of another model": (
        lambda f: (f.base, adapter(f, f.expert), f.antiexpert),
        "the expert is an adapter of '.*small-it', and the antiexpert is '.*small'",
        False,
    ),
    "an adapter put onto another model": (
        lambda f: (f.base, f"lora:{adapter(f, f.expert)}", f.antiexpert),
        "the expert is an adapter of '.*small-it', and the antiexpert is '.*small'",
        False,
    ),
    "a model put onto another": (
        lambda f: (f.base, f"lora:{f.expert}", f.antiexpert),
        "the expert is lora:.*small-it, which is a whole model. Name it without lora:",
        False,
    ),
    "an adapter whose model is away": (
        lambda f: (
            f.base,
            f.edited(adapter(f, f.antiexpert), "adapter_config.json", base_model_name_or_path="/no"),
            f.antiexpert,
        ),
        "the expert: expected an adapter whose model is there; got '.*changed', an adapter of '/no'",
        False,
    ),
    "a composed model": (
        lambda f: (recipe(f), f.expert, f.antiexpert),
        "the base: expected a plain model; got '.*recipe', a recipe, which is composed already",
        False,
    ),
    "a tiny context": (
        lambda f: (f.base, f.model("brief", hidden=16, context=64), f.antiexpert),
        r"may have 64 tokens, the expert's context \(base 512, expert 64, antiexpert 512\): that holds hardly an",
        False,
    ),
}

NOTES: dict[str, tuple[Change, str]] = {
    "the base as antiexpert": (
        lambda f: (f.base, f.model("tuned", hidden=32), f.base),
        "the antiexpert is the base itself: at α = 1 only the expert is left",
    ),
    "other end tokens": (
        lambda f: (f.base, f.edited(f.expert, "generation_config.json", eos_token_id=[2, 9]), f.antiexpert),
        r"the expert also ends its turn with .* \(id 9\), .*texts stop at all of these. Nothing is wrong",
    ),
    "no end token": (
        lambda f: (
            f.edited(f.base, "generation_config.json", "b", eos_token_id=None),
            f.edited(f.expert, "generation_config.json", "e", eos_token_id=None),
            f.antiexpert,
        ),
        "neither base nor expert names an end token",
    ),
    "another context": (
        lambda f: (f.base, f.model("long", hidden=16, context=1024), f.antiexpert),
        r"prompt and answer together may have 512 tokens, the base's context \(base 512, expert 1,024, antiexp",
    ),
    "another chat template": (
        lambda f: (f.base, retold(f.copy(f.expert), "Q: {{ messages[0]['content'] }}"), f.antiexpert),
        r"chat templates differ: the base's, which is written, is 'user: …\\nassistant: '; the expert's.*is 'Q: …'",
    ),
    "no chat template of the base": (
        lambda f: (without(f.copy(f.base), "chat_template*"), f.expert, f.antiexpert),
        "the base's tokenizer has no chat template",
    ),
    "a token that one member lacks": (
        lambda f: (retold(f.copy(f.base), tokenizer().chat_template, "<x>"), f.expert, f.antiexpert),
        "the expert embeds 259 ids and lacks the token '<x>' of the base's vocabulary: none of them is ever written",
    ),
    "a token of the expert's own": (
        lambda f: (f.base, retold(f.copy(f.expert), tokenizer().chat_template, "<x>"), f.antiexpert),
        "the expert's tokenizer also has the token '<x>': prompts are read with the base's, which takes them apart",
    ),
    "an adapter of the antiexpert": (
        lambda f: (f.base, adapter(f, f.antiexpert), f.antiexpert),
        "the expert is an adapter of the antiexpert: 'lora:.*adapter' as the expert puts it onto the antiexpert",
    ),
    "a quantised member": (
        lambda f: (
            f.edited(f.base, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            f.expert,
            f.antiexpert,
        ),
        r"the base is quantised \(bitsandbytes\): .*LLM.int8\): use no speculation",
    ),
}


@peft_warnings
@pytest.mark.parametrize("wrong", PROBLEMS)
def test_a_wrong_pair_gets_its_sentence(wrong: str, folders: Folders) -> None:
    sources, said, weights = PROBLEMS[wrong]
    report = checked(sources(folders), weights=weights)
    assert len([text for text in report.problems if re.search(said, text)]) == 1, report.problems
    assert not report.ok
    assert report.findings[0].kind == "problem"


@peft_warnings
@pytest.mark.parametrize("case", NOTES)
def test_what_is_good_to_know_is_no_problem(case: str, folders: Folders) -> None:
    sources, said = NOTES[case]
    report = checked(sources(folders), weights=False)
    assert report.problems == []
    assert len([found for found in report.findings if re.search(said, found.text)]) == 1, report.findings


def test_all_that_is_wrong_is_said_at_once(folders: Folders) -> None:
    report = checked((folders.place / "no", folders.place / "nor", folders.model("t5", "t5")), weights=False)
    assert [text.split(":")[0] for text in report.problems] == ["the base", "the expert"]
    assert [member.role for member in report.members] == ["antiexpert"]


def test_a_tokenizer_that_needs_a_package_is_said(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **settings: Any) -> Any:
        raise ImportError("You need to install sacremoses")

    monkeypatch.setattr(pair_files, "find_tokenizer", missing)
    report = checked((folders.base, folders.expert, folders.antiexpert), weights=False)
    said = "the expert's tokenizer: expected files that open; got those at '.*small-it'. transformers says: You need to"
    assert len([text for text in report.problems if re.match(said, text)]) == 1


@peft_warnings
def test_an_adapter_on_the_antiexpert_takes_no_weights_and_no_bytes_of_its_own(folders: Folders) -> None:
    tuned = adapter(folders, folders.antiexpert)
    twice, once = (checked((folders.base, x, folders.antiexpert)) for x in (tuned, f"lora:{tuned}"))
    assert once.findings == []
    assert once.shift == twice.shift
    assert twice.cost is not None
    assert once.cost is not None
    assert twice.cost.bytes - once.cost.bytes == pytest.approx(once.cost.bytes - 1)
    assert [set(member.weights.values()) == {0.0} for member in once.members] == [False, True, False]


def test_members_of_another_formula_are_looked_at_by_themselves(folders: Folders) -> None:
    sources = {"base": folders.base, "amateur": folders.antiexpert, "judge": folders.place / "nothing"}
    report = check_pair(sources, steered=False)
    assert [text[:9] for text in report.problems] == ["the judge"]
    assert [member.role for member in report.members] == ["base", "amateur"]
    assert report.shift is None


def test_modes_that_a_member_cannot_do_are_named(folders: Folders) -> None:
    hybrid = folders.model("hybrid", "qwen3_5")
    for weights in (False, True):
        report = checked((hybrid, folders.expert, folders.antiexpert), weights=weights)
        assert report.refused == {"`SpeculativeDecoding` of several prompts": "base: linear_attention layers"}


def test_three_encoder_decoders_are_checked_by_their_files(folders: Folders) -> None:
    members = [folders.model(name, "t5", seed=seed) for seed, name in enumerate(("large", "one", "other"))]
    report = checked(members)
    assert report.problems == []
    assert len(report.members) == 3
    assert (report.shift, report.cost) == (None, None)
