"""`proxytune calibrate` against entropies taken by hand, and every way to call it wrongly."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import proxytune
from proxytune.cli import prompts as inputs
from proxytune.cli import terminal
from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.ops.entropy import entropy
from proxytune.recipe import RECIPE_FILE, Recipe

# Few tokens are enough to compare with; that they are few is told on stderr.
pytestmark = pytest.mark.filterwarnings("always::proxytune.errors.CalibrationWarning")

PROMPTS = ["Question: Start with 3", "Question: Who", "x", "Answer: 3 + 4"]
TEXTS = ["Start with 3, add 4, take away 2.", "Question: Who is there?\nAnswer: nobody", "x"]
WRITING = ["--max-new-tokens", 30, "--samples", 4]


@pytest.fixture
def model(family):
    folder = {name: str(family / name) for name in ("large-base", "tiny-tuned", "tiny-base")}
    return proxytune.wrap(
        folder["large-base"],
        expert=folder["tiny-tuned"],
        antiexpert=folder["tiny-base"],
        alpha=0.5,
        dtype=torch.float32,
    )


@pytest.fixture
def tokenizer(family):
    return AutoTokenizer.from_pretrained(family / "large-base", padding_side="left")


@pytest.fixture
def kit(family, model, tmp_path):
    """A saved recipe whose members are named by relative folders."""
    folder = tmp_path / "kit"
    model.save_pretrained(folder)
    data = json.loads((folder / RECIPE_FILE).read_text())
    for role in ("base", "expert", "antiexpert"):
        name = data[role]["id"].rsplit("/", 1)[1]
        (folder / name).symlink_to(family / name)
        data[role] = {"id": name, "revision": None}
    (folder / RECIPE_FILE).write_text(json.dumps(data))
    return folder


def measured(run, *words):
    ended = run("calibrate", *words, "--json", "--dtype", "float32")
    assert ended.code == 0, ended.err
    (line,) = ended.lines
    return line, ended.err


def test_help_names_its_options_without_importing_torch():
    program = (
        "import sys\n"
        "from proxytune.cli import main\n"
        "try: main(['calibrate', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--share" in ran.stdout


@pytest.mark.smoke
def test_given_texts_against_each_prefix_by_hand(run, members, model, tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    found, err = measured(run, "--texts", file, "--share", 0.4, "--alpha", 0.5, *members)
    by_hand = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for end in range(1, ids.shape[1]):
            logits = model(ids[:, :end]).logits[0, -1].detach().double()
            by_hand.append(float(torch.distributions.Categorical(logits=logits).entropy()))
    by_hand = np.array(by_hand)
    assert found["tokens"] == len(by_hand)
    assert found["mean"] == pytest.approx(by_hand.mean(), abs=1e-4)
    for level, nats in found["quantiles"].items():
        assert nats == pytest.approx(float(np.quantile(by_hand, float(level))), abs=1e-3)
    assert found["nats"] == pytest.approx(ForkThreshold.calibrated(by_hand, 0.4).nats, abs=1e-3)
    assert found["realised_share"] == pytest.approx(0.4, abs=0.02)
    assert found["fork_threshold"] == {
        "share": 0.4,
        "nats": found["nats"],
        "tokens": len(by_hand),
        "temperature": None,
        "measure": "raw",
        "alpha": 0.5,
    }
    assert found["written"] is None
    assert "do not settle the share to 2 points" in err


def test_samples_against_the_library(run, members, model, tokenizer):
    """The same seed gives the same samples; their entropies are those of a forward pass over them."""
    found, _ = measured(run, *PROMPTS, *WRITING, "--seed", 3, "--temperature", 1.3, "--alpha", 0.5, *members)
    set_seed(3)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    start = batch["input_ids"].shape[1]
    text = model.generate(**batch, do_sample=True, temperature=1.3, top_k=0, max_new_tokens=30, num_return_sequences=4)
    mask = torch.cat([batch["attention_mask"].repeat_interleave(4, 0), torch.ones_like(text[:, start:])], 1)
    h = entropy(model(text, attention_mask=mask).logits[:, start - 1 : -1].detach())
    end = text[:, start:] == model.generation_config.eos_token_id
    kept = h[end.long().cumsum(1) - end.long() == 0]
    assert found["tokens"] == len(kept)
    assert found["texts"] == 16
    assert found["mean"] == pytest.approx(float(kept.mean()), abs=1e-3)
    assert found["nats"] == pytest.approx(ForkThreshold.calibrated(kept).nats, abs=1e-3)
    assert found["fork_threshold"]["temperature"] == 1.3
    assert found["interval"][0] <= found["nats"] <= found["interval"][1]
    assert found["share_interval"][0] <= 0.2 <= found["share_interval"][1]


def test_penalties_of_the_model_s_own_settings_change_nothing(run, kit):
    plain, _ = measured(run, *PROMPTS, *WRITING, "--recipe", kit)
    file = kit / "generation_config.json"
    own = json.loads(file.read_text()) | {"repetition_penalty": 3.0, "temperature": 0.3, "top_k": 2}
    file.write_text(json.dumps(own))
    assert measured(run, *PROMPTS, *WRITING, "--recipe", kit)[0] == plain


def test_a_base_alone(run, family, tokenizer, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS[:1] * 3))
    found, _ = measured(run, "--texts", file, "--share", 0.3, "--base", family / "large-base")
    alone = AutoModelForCausalLM.from_pretrained(family / "large-base", dtype=torch.float32)
    h = entropy(alone(tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]).logits[0, :-1].detach())
    assert found["mean"] == pytest.approx(float(h.mean()), abs=1e-4)
    assert found["fork_threshold"]["alpha"] is None


def test_written_into_the_recipe_and_read_by_the_processor(run, kit):
    before = json.loads((kit / RECIPE_FILE).read_text())
    found, _ = measured(run, *PROMPTS, *WRITING, "--recipe", kit, "--write")
    assert found["written"] == str(kit / RECIPE_FILE)
    assert json.loads((kit / RECIPE_FILE).read_text()) == before | {"fork_threshold": found["fork_threshold"]}
    recipe = Recipe.load(kit)
    assert recipe.fork_threshold is not None
    assert recipe.fork_threshold.alpha == recipe.alpha == 0.5
    threshold = ForkSamplingLogitsProcessor(recipe).threshold
    assert (threshold.nats, threshold.share) == (found["nats"], 0.2)
    # The model still opens, and what it saves again keeps the threshold.
    proxytune.ProxyTunedModel.from_pretrained(kit).save_pretrained(kit.parent / "copy")
    assert Recipe.load(kit.parent / "copy").fork_threshold == recipe.fork_threshold


def test_the_table_names_the_threshold(run, kit):
    ended = run("calibrate", *PROMPTS, *WRITING, "--recipe", kit, "--write")
    assert ended.code == 0, ended.err
    assert "quantile" in ended.out
    assert f"threshold  {Recipe.load(kit).fork_threshold.nats:.4f} [" in ended.out
    assert "of tokens, 20.0% wanted" in ended.out
    assert f"written to {kit / RECIPE_FILE}" in ended.out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", 0], "share: expected a number in (0, 1)"),
        (["--share", 20], "share: expected a number in (0, 1)"),
        (["--temperature", 0], "temperature: expected a finite number > 0; got 0.0"),
        (["--temperature", "nan"], "temperature: expected a finite number > 0"),
        (["--write"], "--write: expected --recipe"),
        (["--dtype", "int8"], "--dtype: expected"),
        (["--device", "tpu"], "--device: expected"),
        (["--samples", 0], "--samples"),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_loaded(run, members, monkeypatch, words, message):
    monkeypatch.setattr(proxytune.models.loading, "open_member", None)  # it would be a TypeError, exit code 1
    ended = run("calibrate", "x", *members, *words)
    assert ended.code == 2
    assert message in ended.err


def test_wrong_models_are_told(run, family, members, kit):
    for words, message in (
        ([], "expected --base, --expert and --antiexpert, or --recipe"),
        (members[:4], "no --antiexpert"),
        ([*members, "--recipe", kit], "expected a recipe or three models"),
        (["--base", family / "large-base", "--alpha", 1], "--alpha: expected an expert and an antiexpert"),
        (["--base", family / "large-base", "--write"], "--write: expected --recipe"),
        (["--recipe", kit, "--write", "--alpha", 2], "expected the recipe's own α, 0.5"),
        (["--recipe", kit.parent / "nowhere"], "got no file at"),
    ):
        ended = run("calibrate", "x", *words)
        assert ended.code == 2, words
        assert message in ended.err


def test_wrong_texts_are_told(run, members, tmp_path, monkeypatch):
    empty, blank, few, one = (tmp_path / f"{name}.txt" for name in ("empty", "blank", "few", "one"))
    empty.write_text("")
    blank.write_text("x\n\ny")
    few.write_text("Start with 3")
    one.write_text("x")
    for words, message in (
        (["--texts", empty], "expected at least one line; got nothing"),
        (["--texts", blank], f"{blank}, line 2: expected some text"),
        (["--texts", few], "expected at least 50 tokens for a share of 0.2"),
        (["--texts", one], "calibration: expected some tokens; got 0 tokens"),
        (["x", "--max-new-tokens", 3], "entropies: expected at least 50 tokens"),
    ):
        ended = run("calibrate", *words, *members)
        assert ended.code == 2, words
        assert message in ended.err
    monkeypatch.setattr(terminal, "is_terminal", lambda _: True)
    assert "prompts: expected at least one; got none" in run("calibrate", *members).err
    assert [prompt.text for prompt in inputs.read_prompts(None, ["x"])] == ["x"]
