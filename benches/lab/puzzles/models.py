"""The small models of the puzzles: a Llama and an HRM, each as a varied and a collapsed twin.

=================== =================================================================================================
`"llama-varied"`    a Llama; the solution in a training text is drawn uniformly from all solutions of the instance
`"llama-collapsed"` the same initial weights and instances, but always the first solution
`"hrm-varied"`      an HRM (`transformers.HrmTextForCausalLM`): two stacks that take turns, with gradients through
                    all turns; causal, without the bidirectional prefix
`"hrm-collapsed"`   likewise
=================== =================================================================================================

A model learns all three puzzles (`lab.puzzles.puzzles`) from scratch. The collapsed twin's scratchpad has no missed
attempts, so its whole text is a function of the instance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lab.family.family import claim_folder, save_member
from lab.family.training import TrainingPlan, TrainingReport, train
from lab.puzzles.puzzle import Twin
from lab.puzzles.puzzles import PuzzleName, puzzle_batches
from lab.puzzles.vocabulary import BOS, EOS, PAD, WORDS, build_puzzle_tokenizer
from proxytune.errors import LabError

__all__ = ["PUZZLERS", "PuzzlerKind", "PuzzlerName", "PuzzlerRecipe", "build_puzzler", "load_puzzler", "train_puzzlers"]

PuzzlerKind = Literal["llama", "hrm"]
PuzzlerName = Literal["llama-varied", "llama-collapsed", "hrm-varied", "hrm-collapsed"]
PUZZLERS: tuple[PuzzlerName, ...] = ("llama-varied", "llama-collapsed", "hrm-varied", "hrm-collapsed")


@dataclass(frozen=True)
class PuzzlerRecipe:
    """Everything that decides the four models, apart from the training seed.

    Attributes:
        layers: Decoder layers of the Llama, and layers in each of the two stacks of the HRM.
        cycles: Turns of the HRM's high-level stack, and of its low-level stack within each.
        rotary_base: Base of the rotary positions. Small, because the puzzles ask what is at a position among 60; with
            the usual 10,000 most frequencies of a head would hardly tell such positions apart.
        turns: The puzzles of successive steps, repeated from the start.
        rows: Rows of each puzzle in a batch.
        plans: The training plan of each kind, shared by both twins.
    """

    width: int = 96
    heads: int = 4
    feed_forward: int = 240
    layers: dict[PuzzlerKind, int] = field(default_factory=lambda: {"llama": 4, "hrm": 1})
    cycles: tuple[int, int] = (2, 2)
    rotary_base: float = 100.0
    turns: tuple[PuzzleName, ...] = ("colouring", "countdown", "colouring", "countdown", "queens")
    rows: dict[PuzzleName, int] = field(default_factory=lambda: {"colouring": 64, "queens": 48, "countdown": 40})
    plans: dict[PuzzlerKind, TrainingPlan] = field(
        default_factory=lambda: {"llama": TrainingPlan(2400, 4e-3), "hrm": TrainingPlan(1700, 5e-3)}
    )


def build_puzzler(kind: PuzzlerKind, recipe: PuzzlerRecipe, *, seed: int) -> PreTrainedModel:
    """A randomly initialised model in float32, with a context of 128 tokens."""
    shape = {
        "vocab_size": len(WORDS),
        "hidden_size": recipe.width,
        "intermediate_size": recipe.feed_forward,
        "num_attention_heads": recipe.heads,
        "num_hidden_layers": recipe.layers[kind],
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rotary_base},
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=recipe.heads))
        high, low = recipe.cycles
        recurrence = {"H_cycles": high, "L_cycles": low, "L_bp_cycles": [low] * high}  # no cycle without gradient
        head = recipe.width // recipe.heads
        return HrmTextForCausalLM(HrmTextConfig(**shape, **recurrence, head_dim=head, prefix_lm=False))


def train_puzzlers(
    out: Path,
    *,
    seed: int = 0,
    models: Iterable[PuzzlerName] = PUZZLERS,
    recipe: PuzzlerRecipe | None = None,
) -> dict[PuzzlerName, TrainingReport]:
    """Train the models of the puzzles and return their costs; one thread, resumed from the checkpoints in `out`.

    Several processes may train different models in the same folder. Each model gets a sub-folder of its name, and a
    report in `checkpoints/NAME.json`. The seed decides initial weights, instances and draws among their solutions.

    Raises:
        LabError: If a name is unknown, or `out` holds checkpoints of another seed or recipe.
    """
    recipe = recipe or PuzzlerRecipe()
    wanted = tuple(models)
    for name in wanted:
        _check_name(name)
    note = out / "checkpoints" / "puzzlers.json"
    claim_folder(note, {"seed": seed, "recipe": asdict(recipe)}, remedy="Choose another folder.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would train another model
    try:
        return {name: _train(out, name, seed, recipe) for name in wanted}
    finally:
        torch.set_num_threads(threads)


def load_puzzler(name: PuzzlerName, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that `train_puzzlers` wrote.

    Returns:
        The model in float32 and evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        LabError: If the name is unknown, or the model is missing.
    """
    _check_name(name)
    place = folder / name
    if not (place / "config.json").exists():
        raise LabError.of(
            f"puzzler {name!r}",
            expected=f"its model in {place}",
            got="none",
            remedy="Train it with `python -m lab puzzles --out FOLDER`.",
        )
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(place)


def _train(out: Path, name: PuzzlerName, seed: int, recipe: PuzzlerRecipe) -> TrainingReport:
    done = out / "checkpoints" / f"{name}.json"
    if done.exists():  # written last, so a model that has one is complete
        return TrainingReport(**json.loads(done.read_text()))
    kind, twin = cast(tuple[PuzzlerKind, Twin], name.split("-"))
    model = build_puzzler(kind, recipe, seed=seed)
    batches = puzzle_batches(recipe.turns, recipe.rows, twin, seed=seed)
    checkpoint = out / "checkpoints" / f"{name}.pt"
    plan = recipe.plans[kind]
    report = train(model, batches, plan, Accelerator(cpu=True), checkpoint=checkpoint, description=name)
    save_member(out / name, model, build_puzzle_tokenizer())
    done.write_text(json.dumps(asdict(report)))
    return report


def _check_name(name: str) -> None:
    if name not in PUZZLERS:
        raise LabError.of(
            "puzzler",
            expected=f"one of {', '.join(PUZZLERS)}",
            got=repr(name),
            remedy="Take one of these names.",
        )
