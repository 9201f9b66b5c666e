"""The four models of the lab: their shapes, their training, and how a family folder is written.

A family folder holds one sub-folder per member (model in bfloat16, tokenizer, generation settings), the measurements in
`family.json`, and `checkpoints/` (float32 weights and optimizer states), which only resuming needs.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.multiprocessing.spawn import spawn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lab.family.corpus import CorpusRecipe, pretraining_document
from lab.family.tokenizer import build_tokenizer
from lab.family.training import TrainingPlan, TrainingReport, instruction_batches, pretraining_batches, train
from proxytune.demo.bundle import MEMBERS, RECORD_NAME, MemberName
from proxytune.demo.instructions import InstructionRecipe, instruction_set, prompt_of
from proxytune.demo.world import build_world
from proxytune.errors import LabError


@dataclass(frozen=True)
class Architecture:
    """The shape of a Llama whose attention heads all have their own keys and values."""

    width: int
    layers: int
    heads: int
    feed_forward: int

    def build(self, vocabulary: int, seed: int) -> LlamaForCausalLM:
        """A randomly initialised model of this shape: float32, tied embeddings, a context of 512 tokens."""
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            rms_norm_eps=1e-5,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


@dataclass(frozen=True)
class FamilyRecipe:
    """Everything that decides the four models, apart from the training seed.

    Attributes:
        rows: Rows per pre-training batch.
        length: Tokens per pre-training row.
        tuning_rows: Examples per tuning batch.
        plans: The training plan of each member; a tuned one starts from the base of its size.
    """

    large: Architecture = Architecture(128, 4, 4, 320)
    tiny: Architecture = Architecture(48, 2, 4, 128)
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    instructions: InstructionRecipe = field(default_factory=InstructionRecipe)
    rows: int = 12
    length: int = 256
    tuning_rows: int = 32
    plans: dict[MemberName, TrainingPlan] = field(
        default_factory=lambda: {
            "large-base": TrainingPlan(1600, 1e-2),
            # Short on purpose: with five times the steps the tiny pair memorises the people and learns to count. The
            # expert alone then answers most questions, which would leave nothing to show.
            "tiny-base": TrainingPlan(300, 1e-2),
            "tiny-tuned": TrainingPlan(200, 2e-3, optimizer="adamw", warmup=10, decay=0.7),
            "large-tuned": TrainingPlan(100, 1e-3, optimizer="adamw", warmup=10, decay=0.7),
        }
    )


def generation_defaults() -> GenerationConfig:
    """Generation settings saved with every member: greedy, long enough for any answer, stop at the end of text."""
    return GenerationConfig(eos_token_id=1, pad_token_id=0, max_new_tokens=64, do_sample=False)


def train_family(
    out: Path,
    *,
    seed: int = 0,
    recipe: FamilyRecipe | None = None,
    resume: bool = True,
    processes: int = 2,
    members: Iterable[MemberName] = MEMBERS,
) -> dict[MemberName, TrainingReport]:
    """Train the family from scratch, and return each member's cost. All processes share every batch, one thread each.

    The seed decides initial weights, text and order, but not the world and the hold-out. Without `resume`, existing
    checkpoints in `out` are removed first. A tuned member needs its base in `out` or in `members`.

    Raises:
        LabError: If `out` holds checkpoints of another seed or recipe.
    """
    recipe = recipe or FamilyRecipe()
    chosen = set(members)
    wanted: list[MemberName] = [member for member in MEMBERS if member in chosen]
    if not resume:
        for member in wanted:
            _checkpoint(out, member).unlink(missing_ok=True)
            _report(out, member).unlink(missing_ok=True)
    claim_folder(out / "checkpoints" / "run.json", {"seed": seed, "recipe": asdict(recipe)}, resume=resume)
    # The report is written last, so a member that has one is complete.
    unfinished: list[MemberName] = [member for member in wanted if not _report(out, member).exists()]
    if unfinished and processes == 1:
        # One thread here too: sums in another order would train another model.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _train_members(out, seed, recipe, unfinished)
        finally:
            torch.set_num_threads(threads)
    elif unfinished:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(_worker, args=(processes, port, out, seed, recipe, unfinished), nprocs=processes, join=True)
    return {member: TrainingReport(**json.loads(_report(out, member).read_text())) for member in wanted}


def _worker(
    rank: int, processes: int, port: int, out: Path, seed: int, recipe: FamilyRecipe, members: list[MemberName]
) -> None:
    """One of several training processes, set up here because `accelerate launch --cpu` starts only one."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _train_members(out, seed, recipe, members)
    torch.distributed.destroy_process_group()


def _leave_with_parent() -> None:
    """End this process with its parent: orphaned workers would write checkpoints into those of a resumed run."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_members(out: Path, seed: int, recipe: FamilyRecipe, members: list[MemberName]) -> None:
    """Train members one after the other, in this process or in step with its peers."""
    accelerator = Accelerator(cpu=True)
    world = build_world()
    tokenizer = build_tokenizer(world)
    for member in members:
        plan = recipe.plans[member]
        if member.endswith("-base"):
            shape = recipe.large if member == "large-base" else recipe.tiny
            model = shape.build(len(tokenizer), seed)
            batches = pretraining_batches(
                lambda rng: pretraining_document(world, rng, recipe.corpus),
                tokenizer,
                rows=recipe.rows,
                length=recipe.length,
                seed=seed,
            )
        else:
            base = out / member.replace("tuned", "base")
            model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
            examples = [
                (prompt_of(problem.question), f" {problem.answer}")
                for problem in instruction_set(world, recipe.instructions)
            ]
            batches = instruction_batches(examples, tokenizer, rows=recipe.tuning_rows, seed=seed)
        report = train(model, batches, plan, accelerator, checkpoint=_checkpoint(out, member), description=member)
        if accelerator.is_main_process:
            save_member(out / member, model, tokenizer)
            _report(out, member).write_text(json.dumps(asdict(report)))
        accelerator.wait_for_everyone()


def save_member(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the weights (rounded to bfloat16), the tokenizer and the generation settings into one folder."""
    rounded = type(model)(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = generation_defaults()
    rounded.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `family.json`, the measurements of a family."""
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")


def claim_folder(
    note: Path,
    wanted: dict[str, Any],
    *,
    resume: bool = True,
    remedy: str = "Choose another folder, or train from nothing with --no-resume.",
) -> None:
    """Note what is trained in a folder, so that a resumed run cannot mix two seeds or recipes.

    `wanted` decides the models, the seed first. Without `resume` an existing note is replaced; else it has to match.

    Raises:
        LabError: If an existing note differs.
    """
    wanted = json.loads(json.dumps(wanted))
    if resume and note.exists() and (found := json.loads(note.read_text())) != wanted:
        differing = next(key for key in wanted if found.get(key) != wanted[key])
        raise LabError.of(
            f"training folder {note.parents[1]}",
            expected=f"checkpoints of this {differing}, to resume from",
            got=f"checkpoints of another {differing}" + (f" ({found['seed']})" if differing == "seed" else ""),
            remedy=remedy,
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted, indent=1) + "\n")


def _checkpoint(out: Path, member: MemberName) -> Path:
    return out / "checkpoints" / f"{member}.pt"


def _report(out: Path, member: MemberName) -> Path:
    return out / "checkpoints" / f"{member}.json"
