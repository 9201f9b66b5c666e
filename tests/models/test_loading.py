"""Members are opened whole and as they were, and run only code that is trusted; or the error says what to do.

The models are tiny and random; the quantiser is one of the test's own, and GGUF files are made on the spot.
"""

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import proxytune
from proxytune import ProxyTunedModel, ProxyTuningLogitsProcessor
from proxytune.cli import main
from proxytune.errors import (
    InputError,
    MemberError,
    MemberNotFoundError,
    RecipeError,
    UnsupportedModelError,
    VocabularyMismatchError,
    VocabularyWarning,
)
from proxytune.models import checkpoints
from proxytune.models.member_tokenizers import check_vocabularies
from proxytune.recipe import RECIPE_FILE, MemberRef, Recipe

IDS = torch.arange(20, 28)[None]
ROLES = ("base", "expert", "antiexpert")
COMMIT = "0123456789" * 4


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(vocab_size=64, initializer_range=0.5, **(sizes | ids | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind, and a recipe of the first three; nobody may write to them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(ROLES):
        torch.manual_seed(seed)
        LlamaForCausalLM(config()).save_pretrained(folder / name)
    compose(folder).save_pretrained(folder / "recipe")
    LlamaForSequenceClassification(config()).save_pretrained(folder / "reward")
    LlamaForSequenceClassification(config(tie_word_embeddings=True)).save_pretrained(folder / "tied-reward")
    LlamaModel(config()).save_pretrained(folder / "encoder")
    LlamaForCausalLM(config(tie_word_embeddings=True)).save_pretrained(folder / "tied")
    LlamaForCausalLM(config()).save_pretrained(folder / "shards", max_shard_size="3KB")
    for name, changes in {"wider": {"vocab_size": 80}, "deeper": {"num_hidden_layers": 2}}.items():
        edit(shutil.copytree(folder / "expert", folder / name) / "config.json", **changes)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def compose(place: Path, **given: Any) -> ProxyTunedModel:
    family = {role: place / role for role in ROLES}
    return proxytune.wrap(**(family | {"alpha": 0.5, "check_vocabulary": False} | given))


def reopen(folder: Path, **given: Any) -> ProxyTunedModel:
    return ProxyTunedModel.from_pretrained(folder, **({"check_vocabulary": False} | given))


def auto(folder: Path, **given: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, check_vocabulary=False, **given)


DOORS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "wrap": lambda place, expert, recipe: compose(place, expert=expert),
    "processor": lambda place, expert, recipe: ProxyTuningLogitsProcessor(expert, place / "antiexpert"),
    "recipe": lambda place, expert, recipe: reopen(recipe),
    "Auto class": lambda place, expert, recipe: AutoModelForCausalLM.from_pretrained(recipe),
}


@pytest.fixture(params=[*DOORS, "command line"])
def open_expert(request: pytest.FixtureRequest, place: Path, tmp_path: Path, capsys: Any) -> Any:
    """Open a composition whose expert is this folder, through every door."""

    def opened(expert: Path) -> Any:
        recipe = shutil.copytree(place / "recipe", tmp_path / "recipe", dirs_exist_ok=True)
        members = {role: {"id": str(place / role)} for role in ROLES}
        edit(recipe / RECIPE_FILE, **members | {"expert": {"id": str(expert)}})
        if request.param != "command line":
            return DOORS[request.param](place, expert, recipe)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "x", "--recipe", str(recipe), "--device", "cpu"])
        if ended.value.code:
            raise MemberError(capsys.readouterr().err.split("rror: ", 1)[1].replace("\n", " "))
        return None

    return opened


# --- weights that are missing --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_checkpoint_without_its_head_is_refused_at_every_door(open_expert: Any, place: Path) -> None:
    match = (
        r"the expert: expected a checkpoint with all weights of LlamaForCausalLM; got '.*/reward', a checkpoint of "
        r"LlamaForSequenceClassification, without lm_head\.weight\. transformers would draw these weights at random"
    )
    with pytest.raises(MemberError, match=match.replace(" ", r"\s+")):
        open_expert(place / "reward")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder", r"'.*/encoder', a checkpoint of LlamaModel, without lm_head\.weight\. "),
        ("tied-reward", "'.*/tied-reward', a checkpoint of LlamaForSequenceClassification, which scores texts"),
        ("deeper", r"without model\.layers\.1\.input_layernorm\.weight, .* and 5 more\. "),
        (
            "wider",
            r"with another shape of lm_head\.weight \(\[64, 16\] there, \[80, 16\] in the model\), "
            r"model\.embed_tokens\.weight \(\[64, 16\] there, \[80, 16\] in the model\)\. ",
        ),
    ],
)
def test_every_kind_of_missing_weight_is_named(place: Path, name: str, message: str) -> None:
    for role in ROLES:
        with pytest.raises(MemberError, match=f"the {role}: expected .*; got .*{message}"):
            compose(place, **{role: place / name})
    with pytest.raises(MemberError, match=message):  # nobody can have meant random weights
        compose(place, base=place / name, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", ["tied", "shards"])
def test_whole_checkpoints_are_opened(place: Path, name: str) -> None:
    assert len(list((place / name).glob("*.safetensors"))) == 1 or name == "shards"
    assert torch.equal(
        compose(place, base=place / name).base(IDS).logits,
        AutoModelForCausalLM.from_pretrained(place / name)(IDS).logits,
    )
    with pytest.raises(InputError, match="output_loading_info: expected no such argument; got True"):
        compose(place, base=place / name, output_loading_info=True)


def with_more(place: Path, to: Path, layers: int = 1, **more: torch.Tensor) -> Path:
    """A copy of the expert of `layers` layers, with further weights (`__` is a dot), and a config of one layer."""
    torch.manual_seed(3)
    LlamaForCausalLM(config(num_hidden_layers=layers)).save_pretrained(to)
    edit(to / "config.json", num_hidden_layers=1)
    held = load_file(to / "model.safetensors") | {name.replace("__", "."): weight for name, weight in more.items()}
    save_file(held, to / "model.safetensors", metadata={"format": "pt"})
    return to


PROJECTION = "model__layers__0__self_attn__q_proj"


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        (
            2,
            [],
            r"with model\.layers\.1\..* and 5 more, which .* out. Correct the number of layers",
        ),
        (
            1,
            [f"{PROJECTION}__weight_scale"],
            r"with model\..*\.weight_scale, .* Put its quantization_config back",
        ),
        (1, [f"{PROJECTION}__weight_scale_inv"], "Put its quantization_config back"),
        (1, [f"{PROJECTION}__lora_A__weight"], "They are an adapter's: merge it into the weights"),
    ],
)
def test_weights_that_would_be_left_out_are_named(
    place: Path, tmp_path: Path, layers: int, more: list[str], message: str
) -> None:
    folder = with_more(place, tmp_path / "more", layers, **{name: torch.ones(1) for name in more})
    with pytest.raises(MemberError, match=f"the expert: expected a checkpoint whose weights LlamaFor.*{message}"):
        compose(place, expert=folder)


def test_weights_that_change_nothing_may_be_left_out(place: Path, tmp_path: Path) -> None:
    # A head for values, a cache's scale, a buffer of old, layers that guess further tokens; and fewer layers as meant.
    names = ["v_head__summary__weight", "model__layers__0__self_attn__k_scale", "model__layers__1__eh_proj__weight"]
    names += ["model__layers__1__input_layernorm__weight", "model__layers__0__self_attn__masked_bias"]
    compose(place, expert=with_more(place, tmp_path / "more", **{name: torch.ones(1) for name in names}))
    deep = with_more(place, tmp_path / "deep", 2)
    compose(place, members={"expert": {"num_hidden_layers": 1}}, expert=deep)
    edit(deep / "config.json", num_nextn_predict_layers=1)
    compose(place, expert=deep)


def test_a_weight_of_one_layer_alone_makes_no_further_layer() -> None:
    own = ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.gate.weight"]  # layers of two kinds
    names = ["model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"]
    assert checkpoints._further_layers(None, names, own) == names[1:]


def test_a_tied_weight_is_not_missing() -> None:
    for tied in (True, False):
        model = LlamaForCausalLM(config(tie_word_embeddings=tied))
        told = {"missing_keys": {"lm_head.weight"}}
        with nullcontext() if tied else pytest.raises(MemberError, match=r"without lm_head\.weight"):
            checkpoints.refuse_incomplete(model, told, "expert", "'here'")


# PEFT calls transformers by names that the newest version has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_on_a_checkpoint_without_a_head(place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    opened = {}
    for name, saved in (("expert", None), ("reward", None), ("encoder", ["lm_head"])):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / name), settings)
        model.save_pretrained(tmp_path / name)
        opened[name] = model.eval()
    # The loading info is the adapter's, which is whole.
    with pytest.raises(MemberError, match=r"the expert: .*/reward', .*, without lm_head\.weight"):
        compose(place, expert=tmp_path / "reward")
    assert torch.equal(compose(place, expert=tmp_path / "expert").expert(IDS).logits, opened["expert"](IDS).logits)
    # This one's head is in the adapter. transformers 5.17 does not read it.
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    if info["missing_keys"]:
        with pytest.raises(MemberError, match=r"without lm_head\.modules_to_save.*peft\.PeftModel\.from_pretrained"):
            compose(place, expert=tmp_path / "encoder")
    else:
        got = compose(place, expert=tmp_path / "encoder").expert(IDS).logits
        assert torch.equal(got, opened["encoder"](IDS).logits)


# --- how a member was loaded ---------------------------------------------------------------------------------------


@register_quantization_config("halves")
class HalvesConfig(QuantizationConfigMixin):
    def __init__(self, step: float = 0.5, **kwargs: Any) -> None:
        self.quant_method: Any = "halves"
        self.step = step


@register_quantizer("halves")
class HalvesQuantizer(HfQuantizer):
    """Rounds all weights to multiples of a step: no package, and no mistaking it for the plain model."""

    requires_calibration = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_((weight / self.quantization_config.step).round() * self.quantization_config.step)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["all", "one", "object"])
def test_a_quantised_member_reopens_quantised(place: Path, tmp_path: Path, way: str) -> None:
    settings = HalvesConfig(step=0.25)
    if way == "object":
        loaded = AutoModelForCausalLM.from_pretrained(place / "expert", quantization_config=settings)
        model = compose(place, expert=loaded)
    elif way == "one":
        model = compose(place, members={"expert": {"quantization_config": settings}})
    else:
        model = compose(place, quantization_config=settings)
    plain = compose(place)
    assert not torch.equal(model.expert(IDS).logits, plain.expert(IDS).logits)
    assert torch.equal(model.base(IDS).logits, plain.base(IDS).logits) == (way != "all")
    model.save_pretrained(tmp_path / "one")
    kept = {"quant_method": "halves", "step": 0.25}
    recipe = Recipe.load(tmp_path / "one")
    assert recipe.expert.load == {"quantization_config": kept}
    assert recipe.base.load == ({"quantization_config": kept} if way == "all" else {})
    again = reopen(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")  # and what was reopened is not forgotten either
    for opened in (again, reopen(tmp_path / "two"), auto(tmp_path / "two")):
        assert opened.recipe == model.recipe
        assert torch.equal(opened(IDS).logits, model(IDS).logits)
    # An argument of the caller's comes before the recipe's.
    assert torch.equal(reopen(tmp_path / "one", quantization_config=None)(IDS).logits, plain(IDS).logits)


def test_where_a_member_runs_is_not_kept(place: Path, tmp_path: Path) -> None:
    compose(
        place, dtype="bfloat16", attn_implementation="eager", device_map="cpu", use_safetensors=True
    ).save_pretrained(tmp_path)
    assert [ref.load for ref in Recipe.load(tmp_path).members.values()] == [{}] * 3


def test_folders_in_folders_are_kept(place: Path, tmp_path: Path) -> None:
    for role in ROLES:
        shutil.copytree(place / role, tmp_path / role / "inner")
    model = compose(tmp_path, subfolder="inner")
    model.save_pretrained(tmp_path / "kit")
    assert torch.equal(reopen(tmp_path / "kit")(IDS).logits, compose(place)(IDS).logits)
    assert Recipe.load(tmp_path / "kit").base.load == {"subfolder": "inner"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"rms_norm_eps": 0.5}, "rms_norm_eps=0.5 of the expert"),
        ({"config": config(rms_norm_eps=0.5)}, "config=LlamaConfig"),
        ({"key_mapping": {"a": "b"}}, "key_mapping={'a': 'b'} of the expert"),
    ],
)
def test_what_a_recipe_cannot_keep_is_not_saved(place: Path, tmp_path: Path, given: Any, shown: str) -> None:
    model = compose(place, members={"expert": given})
    assert model.recipe is None
    match = f"save_pretrained: expected members loaded with no other lasting arguments .*; got {shown}"
    with pytest.raises(RecipeError, match=match):
        model.save_pretrained(tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_member_that_another_library_quantised_is_not_saved(place: Path, tmp_path: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(place / "expert")
    packed.model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RecipeError, match=r"got quantization_config=torch\.uint8 of the expert.*Save that member with"):
        compose(place, expert=packed).save_pretrained(tmp_path / "kit")


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """The model as a GGUF file of float32 tensors (Llama's rotary halves interleaved, as llama.cpp has them)."""
    gguf = pytest.importorskip("gguf")
    at, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    for name, value in {
        "context_length": at.max_position_embeddings,
        "embedding_length": at.hidden_size,
        "block_count": at.num_hidden_layers,
        "feed_forward_length": at.intermediate_size,
        "head_count": at.num_attention_heads,
        "head_count_kv": at.num_key_value_heads,
        "layer_norm_rms_eps": at.rms_norm_eps,
        "rope_dimension_count": at.head_dim,
        "vocab_size": at.vocab_size,
    }.items():
        getattr(writer, f"add_{name}")(value)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {"model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm"}
    names |= {"input_layernorm": "attn_norm"}
    for name, weight in model.state_dict().items():
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            weight = weight.view(at.num_attention_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_member_reopens(place: Path, tmp_path: Path) -> None:
    plain = compose(place)
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "base.gguf", plain.base)
    given = {"gguf_file": "base.gguf"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "models", **given)
    for model in (compose(place, base=tmp_path / "models", members={"base": given}), compose(place, base=loaded)):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        model.save_pretrained(tmp_path / "kit")
        assert Recipe.load(tmp_path / "kit").base.load == given
        assert torch.equal(reopen(tmp_path / "kit")(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            {"dtype": "float32"},
            "recipe key 'load' of 'base': expected only the keys quantization_config, gguf_file, .*",
        ),
        ({"weights_only": False}, "got unknown 'weights_only'"),  # no recipe says that pickled code may run
        ({"gguf_file": 3}, "'gguf_file' in recipe key 'load' of 'base': expected a str; got 3"),
        ({"quantization_config": "nf4"}, "'quantization_config' in .*: expected an object; got 'nf4'"),
        ({"trust_remote_code": 1}, "'trust_remote_code' in .*: expected a bool; got 1"),
        ("large.gguf", "recipe key 'load' of 'base': expected an object; got str"),
    ],
)
def test_a_recipe_says_only_so_much_about_loading(load: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MemberRef.from_json({"id": "org/large", "load": load}, "base")


def test_arguments_for_one_member(place: Path) -> None:
    model = compose(place, dtype="bfloat16", members={"expert": {"dtype": torch.float32}})
    assert [m.model.dtype for m in model.members] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for given, got in (
        ({"expert": {"dtype": "bf16"}}, "dtype: .*; got 'bf16'. Did you mean 'bfloat16'"),
        ({"expert": {"dytpe": "bfloat16"}}, "dytpe: .*Did you mean dtype"),
        ({"exprt": {}}, "members: expected roles out of base, expert, antiexpert; got exprt"),
        (
            {"expert": "bfloat16"},
            "members: expected for each role a mapping .*; got expert: 'bfloat16'. Pass the expert as expert=",
        ),
        ({"base": {"dtype": "auto"}}, "members: .* by id or folder; got .* for the base, a LlamaForCausalLM"),
    ):
        with pytest.raises(InputError, match=got):
            compose(place, base=model.base, members=given)


# --- code of a member's own ----------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        Path({marker!r}).write_text("ran")
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where transformers copies such code; and nobody may be asked on the terminal."""

    def asked(*words: Any) -> Any:
        raise AssertionError("a question on stdin")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(builtins, "input", asked)
        yield


@pytest.fixture
def own(modules: None, place: Path, tmp_path: Path) -> Path:
    """A model with code of its own, which leaves a marker when it runs."""
    folder = shutil.copytree(place / "expert", tmp_path / "own-model")
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=code)
    return folder


REFUSED = (
    "the expert: expected a model whose class is transformers' own; got '.*/own-model', which would run "
    "modeling_own.py of its own. Read that file first. If you trust it, pass "
)
IN_PYTHON = REFUSED + "members={'expert': {'trust_remote_code': True}}, or "


@pytest.mark.smoke
def test_code_that_is_not_trusted_is_refused_at_every_door(
    request: pytest.FixtureRequest, open_expert: Any, own: Path, tmp_path: Path
) -> None:
    on_command_line = request.node.callspec.params["open_expert"] == "command line"
    options = REFUSED + r"--trust expert, or --trust all for all members\."
    with pytest.raises(MemberError, match=options if on_command_line else IN_PYTHON + "trust_"):
        open_expert(own)
    assert not (tmp_path / "marker").exists()


def test_trust_in_a_recipe_is_no_trust_in_its_members(own: Path, place: Path, tmp_path: Path) -> None:
    trusting = {"expert": {"trust_remote_code": True}}
    model = compose(place, expert=own, members=trusting)
    assert (tmp_path / "marker").exists()
    model.save_pretrained(tmp_path / "kit")
    assert Recipe.load(tmp_path / "kit").expert.load == {"trust_remote_code": True}
    assert Recipe.load(tmp_path / "kit").base.load == {}
    (tmp_path / "marker").unlink()
    # The recipe's word is not enough for a folder, whose content may change.
    for door in (ProxyTunedModel, AutoModelForCausalLM):
        for given in (
            {},
            {"trust_remote_code": True},
            {"trust_remote_code": True, "members": {"base": trusting["expert"]}},
        ):
            with pytest.raises(MemberError, match=IN_PYTHON + "trust_members=True for all members"):
                door.from_pretrained(tmp_path / "kit", **given)
            assert not (tmp_path / "marker").exists()
        for given in ({"members": trusting}, {"trust_members": True}):
            opened = door.from_pretrained(tmp_path / "kit", check_vocabulary=False, **given)
            (tmp_path / "marker").unlink()
            assert torch.equal(opened(IDS).logits, compose(place)(IDS).logits)
            assert opened.recipe == model.recipe
    # What runs already has been trusted.
    (tmp_path / "marker").unlink(missing_ok=True)
    compose(place, expert=model.expert).save_pretrained(tmp_path / "of-objects")
    assert Recipe.load(tmp_path / "of-objects").expert.load == {"trust_remote_code": True}
    with pytest.raises(MemberError, match=IN_PYTHON + "trust_remote_code=True for all members"):
        compose(place, expert=own)
    compose(place, expert=own, trust_remote_code=True)
    assert (tmp_path / "marker").exists()


def test_a_recipe_may_pin_code_on_the_hub(own: Path, place: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "hub" / "models--org--own" / "snapshots"
    shutil.copytree(own, snapshots / COMMIT)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text(COMMIT)
    kit = shutil.copytree(place / "recipe", tmp_path / "kit")
    members: dict[str, Any] = {role: str(place / role) for role in ROLES}
    where = {"cache_dir": tmp_path / "hub", "check_vocabulary": False}

    def name(revision: str | None, **load: Any) -> None:
        edit(kit / RECIPE_FILE, **members | {"expert": {"id": "org/own", "revision": revision, "load": load}})

    for revision, load in (("main", {"trust_remote_code": True}), (None, {"trust_remote_code": True}), (COMMIT, {})):
        name(revision, **load)
        with pytest.raises(MemberError, match="the expert: .*; got 'org/own', which would run modeling_own.py"):
            reopen(kit, trust_remote_code=True, **where)
    name(COMMIT, trust_remote_code=True)
    with pytest.raises(MemberError, match="the expert: .*; got 'org/own', which would run modeling_own.py"):
        reopen(kit, **where)
    assert not (tmp_path / "marker").exists()
    reopen(kit, trust_remote_code=True, **where)
    assert (tmp_path / "marker").exists()
    # The member's commit does not pin code that its config takes from another repository.
    pinned = MemberRef("org/own", COMMIT, {"trust_remote_code": True}).trusted(True)
    assert pinned.load == {"trust_remote_code": True, "code_revision": COMMIT}
    assert MemberRef("org/own", COMMIT, {"trust_remote_code": True, "code_revision": "main"}).trusted(True).load == {
        "code_revision": "main"
    }


def test_a_tokenizer_with_code_of_its_own(own: Path, tmp_path: Path) -> None:
    code = {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}
    (own / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": code}))
    with pytest.warns(VocabularyWarning, match=r"for expert \(its tokenizer would run modeling_own.py of its own\)"):
        check_vocabularies({"expert": MemberRef(str(own))})
    assert not (tmp_path / "marker").exists()


# --- folders that moved, and folders of other kinds ----------------------------------------------------------------


@pytest.mark.smoke
def test_members_beside_a_recipe_move_with_it(place: Path, tmp_path: Path) -> None:
    for role in ROLES:
        shutil.copytree(place / role, tmp_path / "all" / ("kit" if role == "expert" else "models") / role)
    names = {"base": "models", "expert": "kit", "antiexpert": "models"}
    model = compose(place, **{role: tmp_path / "all" / name / role for role, name in names.items()})
    model.save_pretrained(tmp_path / "all" / "kit")
    written = json.loads((tmp_path / "all" / "kit" / RECIPE_FILE).read_text())
    assert [written[role]["id"] for role in ROLES] == ["../models/base", "./expert", "../models/antiexpert"]
    assert Recipe.load(tmp_path / "all" / "kit") == model.recipe
    (tmp_path / "all").rename(tmp_path / "moved")
    assert torch.equal(reopen(tmp_path / "moved" / "kit")(IDS).logits, model(IDS).logits)
    # Elsewhere alone, it says what it misses, and in which file that can be mended.
    source = shutil.copytree(tmp_path / "moved" / "kit", tmp_path / "far" / "off")
    match = (
        "the base: expected a hub id, or a folder .*; got '../models/base', where there is no folder.*It is named in "
        f"the recipe {source / RECIPE_FILE}: if the member was moved, write there where it is now; a relative folder "
        f"is looked for beside that file, in {source}."
    )
    for door in (source, source / RECIPE_FILE):
        with pytest.raises(MemberNotFoundError, match=match):
            ProxyTunedModel.from_pretrained(door)
    # Members that lie elsewhere are named in full.
    compose(place).save_pretrained(tmp_path / "deep" / "kit")
    assert Recipe.from_json(json.loads((tmp_path / "deep" / "kit" / RECIPE_FILE).read_text())) == compose(place).recipe


def seq2seq(folder: Path, kind: str) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "decoder_start_token_id": 2}
    if kind == "T5":
        made = transformers.T5Config(**sizes, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    else:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
        layers = {"decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": None}
        made = transformers.BartConfig(**sizes, **heads, **layers)
    getattr(transformers, f"{kind}ForConditionalGeneration")(made).save_pretrained(folder)


def seeing(folder: Path, kind: str) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight = transformers.CLIPVisionConfig(**vision, image_size=4, patch_size=2, projection_dim=16)
    made = transformers.LlavaConfig(vision_config=sight, text_config=config(), image_token_index=63)
    transformers.LlavaForConditionalGeneration(made).save_pretrained(folder)


def gguf_folder(folder: Path, kind: str) -> None:
    folder.mkdir()
    (folder / "large.gguf").write_bytes(b"GGUF")


def orphan(folder: Path, kind: str) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/no/where", "peft_type": "LORA"})
    )


def pointer(folder: Path, kind: str) -> None:
    folder.mkdir()
    config().save_pretrained(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def single_file(folder: Path, kind: str) -> None:
    (folder.parent / kind).write_bytes(b"")


GGUF_CURE = r"Pass '{at}' as the expert, with members=\{{'expert': \{{'gguf_file': 'large.gguf'\}}\}}"
KINDS = [
    (seq2seq, "T5", UnsupportedModelError, r"decoder-only .*T5ForConditionalGeneration \(t5\), an encoder-decoder"),
    (seq2seq, "Bart", UnsupportedModelError, r"decoder-only .*BartForCond.* \(bart\), an encoder-decoder"),
    (
        seeing,
        "Llava",
        UnsupportedModelError,
        r"a causal LM .*\(llava\), which takes more than text. .*AutoModelForImageTextToText.* pass the model; it is",
    ),
    (gguf_folder, "", MemberNotFoundError, "got '{at}', which has GGUF files only. " + GGUF_CURE),
    (
        orphan,
        "",
        MemberNotFoundError,
        "got '{at}', an adapter of '/no/where', where there is no folder. Write where .*",
    ),
    (pointer, "", MemberError, "got '{at}' with none. transformers says: .*SafetensorError"),
    (single_file, "model.safetensors", MemberNotFoundError, "got the file '.*model.safetensors'. Name its folder"),
]


@pytest.mark.parametrize(("make", "kind", "error", "message"), KINDS, ids=[f"{k[0].__name__} {k[1]}" for k in KINDS])
def test_folders_of_other_kinds(
    place: Path, tmp_path: Path, make: Callable[[Path, str], None], kind: str, error: type[Exception], message: str
) -> None:
    at = tmp_path / "member"
    make(at, kind)
    at = at if at.exists() else tmp_path / kind
    # The member is looked at before another one's weights are read: here the base's, which are not there.
    with pytest.raises(error, match="the expert: expected .*" + message.format(at=at)):
        compose(place, expert=at)


def test_a_gguf_file_is_no_folder(place: Path, tmp_path: Path) -> None:
    gguf_folder(tmp_path / "models", "")
    with pytest.raises(
        MemberNotFoundError, match="got the file '.*large.gguf'. " + GGUF_CURE.format(at=tmp_path / "models")
    ):
        compose(place, expert=tmp_path / "models" / "large.gguf")


def test_an_adapter_without_peft(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan(tmp_path / "adapter", "")
    monkeypatch.setattr("proxytune.models.checkpoints.is_peft_available", lambda: False)
    match = (
        r"the expert: expected a model, or PEFT for .*; got '.*/adapter', a PEFT adapter .* Run pip install peft, or"
    )
    with pytest.raises(MemberError, match=match):
        compose(place, expert=tmp_path / "adapter")


@pytest.mark.parametrize(("word", "remedy"), [("bf16", "Did you mean 'bfloat16'"), (16, "Pass one of these")])
def test_a_dtype_that_is_none_at_every_door(place: Path, word: Any, remedy: str) -> None:
    match = f"dtype: expected 'auto', or the name of a dtype of torch, .*; got {word!r}. {remedy}"
    for door in (
        lambda: compose(place, dtype=word),
        lambda: ProxyTuningLogitsProcessor(place / "expert", place / "antiexpert", dtype=word),
        lambda: reopen(place / "recipe", dtype=word),
        lambda: AutoModelForCausalLM.from_pretrained(place / "recipe", dtype=word),
    ):
        with pytest.raises(InputError, match=match):
            door()


# --- nothing is loaded in vain --------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""

    def opened(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a member was opened")

    monkeypatch.setattr("proxytune.models.loading.open_member", opened)


def test_a_place_without_a_config_is_refused_before_weights_are_read(unread: None, place: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-90").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-100").mkdir()
    for name, message in {
        "no-such/model": rf"got 'no-such/model' \(there is no folder {Path.cwd()}/no-such/model\). transformers says: ",
        str(tmp_path): f"got '{tmp_path}'. It has no config.json",
        str(tmp_path / "run"): "run', which holds checkpoint-100 and no model itself. Name '.*/run/checkpoint-100'",
    }.items():
        with pytest.raises(MemberNotFoundError, match=f"the expert: .*{message}"):
            compose(place, expert=name)


def test_tokens_are_compared_before_weights_are_read(unread: None, place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "expert", tmp_path / "expert")
    tokenizer().save_pretrained(folder)
    other = tokenizer()
    other.add_tokens(["<tool>"])
    file = shutil.copytree(folder, tmp_path / "base") / "tokenizer.json"
    edit(file, model=json.loads(file.read_text())["model"] | {"vocab": {"b": 0, "a": 1}})
    with pytest.raises(VocabularyMismatchError, match="vocabulary of the expert"):
        compose(place, base=tmp_path / "base", expert=folder, check_vocabulary=True)


def test_without_a_network_two_look_ups_are_enough(unread: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(name: str, file: str, **how: Any) -> None:
        asked.append(file)
        if how.get("_raise_exceptions_for_connection_errors", True):
            raise OSError("We couldn't connect")

    monkeypatch.setattr("proxytune.models.checkpoints.cached_file", unreachable)
    monkeypatch.setattr("transformers.configuration_utils.cached_file", unreachable)
    with pytest.raises(MemberNotFoundError, match="the base: .*got 'no/such' .*transformers says: We couldn't connect"):
        compose(place, base="no/such")
    assert asked == ["config.json", "adapter_config.json"]
