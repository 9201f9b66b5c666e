"""The training loop: it learns, a killed run ends where an unbroken one does, and two processes do the work of one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from lab.family.corpus import CorpusRecipe
from lab.family.family import Architecture, FamilyRecipe, train_family
from lab.family.tokenizer import build_tokenizer
from lab.family.training import (
    IGNORED,
    TrainingPlan,
    TrainingReport,
    instruction_batches,
    pretraining_batches,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from proxytune.demo.bundle import MEMBERS, MemberName, load_family
from proxytune.demo.instructions import InstructionRecipe
from proxytune.demo.world import build_world
from proxytune.errors import LabError

MINIATURE = FamilyRecipe(
    large=Architecture(16, 1, 2, 32),
    tiny=Architecture(8, 1, 2, 16),
    corpus=CorpusRecipe(),
    instructions=InstructionRecipe(chain=8, qa=4, countdown=4),
    rows=2,
    length=32,
    tuning_rows=4,
    plans={
        "large-base": TrainingPlan(6, 1e-2, warmup=2, checkpoint_every=2),
        "tiny-base": TrainingPlan(4, 1e-2, warmup=2, checkpoint_every=2),
        "tiny-tuned": TrainingPlan(4, 2e-3, optimizer="adamw", warmup=2, checkpoint_every=2),
        "large-tuned": TrainingPlan(4, 1e-3, optimizer="adamw", warmup=2, checkpoint_every=2),
    },
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(build_world())


def numbers_document(rng: random.Random) -> str:
    """A language that is quickly learned: the digits in order, from a random one on."""
    start = rng.randrange(10)
    return " ".join(str((start + offset) % 10) for offset in range(8))


def test_the_loop_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = pretraining_batches(numbers_document, tokenizer, rows=4, length=32, seed=0)
    model = Architecture(32, 1, 2, 64).build(len(tokenizer), seed=0)
    report = train(model, batches, TrainingPlan(150, 2e-2, warmup=5), Accelerator(cpu=True))
    # ln 564 = 6.3 nats at the start; the language itself has about 0.2 nats per token (the first digit of each line).
    assert report.loss < 1.0
    assert report.tokens == 150 * 4 * 32
    assert not model.training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("killed_at", [1, 4, 7])  # before the first checkpoint, right after one, between two
def test_a_killed_run_resumes_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, optimizer: str, killed_at: int
) -> None:
    plan = TrainingPlan(10, 1e-2, optimizer=optimizer, warmup=3, checkpoint_every=4)  # type: ignore[arg-type]
    batches = pretraining_batches(numbers_document, tokenizer, rows=2, length=16, seed=0)

    class Killed(Exception):
        pass

    def dying(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == killed_at:
            raise Killed
        return batches(step)

    shape = Architecture(16, 1, 2, 32)
    unbroken = shape.build(len(tokenizer), seed=3)
    report = train(unbroken, batches, plan, Accelerator(cpu=True))
    with pytest.raises(Killed):
        train(shape.build(len(tokenizer), seed=3), dying, plan, Accelerator(cpu=True), checkpoint=tmp_path / "run.pt")
    assert (tmp_path / "run.pt").exists() == (killed_at >= 4)
    resumed = shape.build(len(tokenizer), seed=3)
    steps_seen: list[int] = []
    resumed_report = train(
        resumed, _recording(batches, steps_seen), plan, Accelerator(cpu=True), checkpoint=tmp_path / "run.pt"
    )
    assert steps_seen[0] == (killed_at // 4) * 4  # work before the checkpoint is not repeated
    assert (resumed_report.tokens, resumed_report.loss) == (report.tokens, report.loss)
    for name, parameter in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], parameter, rtol=0, atol=0, msg=name)


def _recording(
    batches: Callable[[int], tuple[torch.Tensor, torch.Tensor]], seen: list[int]
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def recorded(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(step)
        return batches(step)

    return recorded


def test_rate_rises_holds_and_falls() -> None:
    plan = TrainingPlan(100, 1.0, warmup=10, decay=0.5)
    assert plan.rate_at(0) == pytest.approx(0.1)
    assert plan.rate_at(9) == plan.rate_at(49) == 1.0
    assert plan.rate_at(75) == pytest.approx(0.5)
    assert 0.0 < plan.rate_at(99) <= 0.02


def test_pretraining_labels_are_the_next_tokens_of_packed_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = pretraining_batches(numbers_document, tokenizer, rows=3, length=64, seed=5)
    input_ids, labels = batches(7)
    assert input_ids.shape == labels.shape == (3, 64)
    torch.testing.assert_close(input_ids[:, 1:], labels[:, :-1])
    documents = str(tokenizer.decode(input_ids[0])).split("<|end|>")
    assert len(documents) > 2
    assert all(len(document) == 15 for document in documents[:-1])  # whole documents, only the last one is cut
    torch.testing.assert_close(batches(7)[0], input_ids)  # a pure function of the step
    assert not torch.equal(batches(8)[0], input_ids)


def test_instruction_loss_falls_on_the_answer_and_its_end_only(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [("Question: A?\nAnswer:", " 12."), ("Question: What is B?\nAnswer:", " 3.")]
    input_ids, labels = instruction_batches(examples, tokenizer, rows=2, seed=0)(0)
    scored = {str(tokenizer.decode(row[row != IGNORED])) for row in labels}
    assert scored == {" 12.<|end|>", " 3.<|end|>"}
    for inputs, row in zip(input_ids, labels, strict=True):
        first = int((row != IGNORED).nonzero()[0, 0])
        assert str(tokenizer.decode(inputs[: first + 1])).endswith("Answer:")


def test_instruction_epochs_visit_every_example_once(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [("Question:", f" {index}") for index in range(7)]
    batches = instruction_batches(examples, tokenizer, rows=2, seed=0)
    seen = [tokenizer.decode(row[row != IGNORED]) for step in range(7) for row in batches(step)[1]]
    assert sorted(seen) == sorted([f" {index}<|end|>" for index in range(7)] * 2)
    assert sorted(seen[:7]) == sorted(f" {index}<|end|>" for index in range(7))
    assert seen[:7] != seen[7:]  # the order changes


@pytest.fixture(scope="module")
def miniature_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family")
    train_family(out, seed=1, recipe=MINIATURE, processes=1)
    return out


def test_a_family_folder_opens_with_the_auto_classes(miniature_family: Path) -> None:
    for member in MEMBERS:
        model = AutoModelForCausalLM.from_pretrained(miniature_family / member)
        tokenizer = AutoTokenizer.from_pretrained(miniature_family / member)
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert tokenizer.padding_side == "left"


def test_tuning_starts_from_the_base_and_changes_it(miniature_family: Path) -> None:
    models, _ = load_family(miniature_family)
    for size in ("large", "tiny"):
        base = models[f"{size}-base"].state_dict()  # type: ignore[index]
        tuned = models[f"{size}-tuned"].state_dict()  # type: ignore[index]
        distance = sum(float((base[name] - tuned[name]).abs().max()) for name in base)
        assert 0.0 < distance < 1.0  # independent initialisations would differ by several units


def test_two_processes_train_the_same_family_as_one(miniature_family: Path, tmp_path: Path) -> None:
    # Also the proof that there *are* two: each process then takes half of every batch, and sums are merely reordered.
    train_family(tmp_path, seed=1, recipe=MINIATURE, processes=2, members=["large-base"])
    assert json.loads((tmp_path / "checkpoints" / "large-base.json").read_text())["processes"] == 2
    one, two = (torch.load(folder / "checkpoints" / "large-base.pt") for folder in (miniature_family, tmp_path))
    for name, parameter in one["model"].items():
        # Muon's bfloat16 iteration amplifies last-bit differences of the gradient, hence no tighter tolerance.
        torch.testing.assert_close(two["model"][name], parameter, rtol=0.05, atol=5e-3, msg=name)


BENCHES = Path(__file__).resolve().parents[3] / "benches"

KILLED_RUN = """
import sys
from pathlib import Path
from lab.family.family import Architecture, FamilyRecipe, train_family
from lab.family.training import TrainingPlan

recipe = FamilyRecipe(large=Architecture(16, 1, 2, 32), rows=2, length=32)
recipe.plans["large-base"] = TrainingPlan(int(sys.argv[2]), 1e-2, checkpoint_every=10)
if __name__ == "__main__":
    train_family(Path(sys.argv[1]), seed=0, recipe=recipe, processes=2, members=["large-base"])
"""


@pytest.mark.slow
def test_workers_of_a_killed_run_end_with_it(tmp_path: Path) -> None:
    # Orphans would go on writing the checkpoints that a resumed run reads and writes as well.
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUN)
    checkpoint = tmp_path / "family" / "checkpoints" / "large-base.pt"
    # Like a run that a shell put into the background: with SIGINT ignored, torch's own signal to orphans does nothing.
    run = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(script), str(tmp_path / "family"), "1000000"],
        env=os.environ | {"PYTHONPATH": str(BENCHES)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(checkpoint.exists, seconds=120)
        run.send_signal(signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    # Ten steps, the way to the next checkpoint, take a fifth of a second; a worker has some seconds to notice.
    wait_until(lambda: time.time() - checkpoint.stat().st_mtime > 3.0, seconds=8.0)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.1)


def test_resuming_with_another_seed_or_recipe_is_refused(miniature_family: Path) -> None:
    with pytest.raises(LabError, match=r"expected checkpoints of this seed.*got checkpoints of another seed \(1\)"):
        train_family(miniature_family, seed=2, recipe=MINIATURE, processes=1)
    with pytest.raises(LabError, match="another recipe"):
        train_family(miniature_family, seed=1, recipe=replace(MINIATURE, rows=4), processes=1)


def test_resuming_a_finished_family_is_free(miniature_family: Path) -> None:
    members: list[MemberName] = ["large-base"]
    weights = miniature_family / "large-base" / "model.safetensors"
    cost = json.loads((miniature_family / "checkpoints" / "large-base.json").read_text())
    written = weights.stat().st_mtime_ns
    # Two processes are asked for, but none is started, and the recorded cost stays that of the one that trained.
    report = train_family(miniature_family, seed=1, recipe=MINIATURE, processes=2, members=members)
    assert report == {"large-base": TrainingReport(**cost)}
    assert (report["large-base"].steps, report["large-base"].processes) == (6, 1)
    assert weights.stat().st_mtime_ns == written


def test_training_from_nothing_forgets_the_checkpoints(tmp_path: Path) -> None:
    first = train_family(tmp_path, seed=1, recipe=MINIATURE, processes=1, members=["tiny-base"])
    again = train_family(tmp_path, seed=2, recipe=MINIATURE, processes=1, members=["tiny-base"], resume=False)
    assert again["tiny-base"].steps == first["tiny-base"].steps
    assert again["tiny-base"].loss != first["tiny-base"].loss


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="got no large-base, tiny-base, tiny-tuned, large-tuned"):
        load_family(tmp_path)
