"""Three more models of the lab, each trained from a member of a family to have one property for a study.

============== ==================== ===================================================================================
`"routes"`      from `large-base`    answers with forks that are known by construction (`lab.studies.routes`)
`"ponder"`      from `large-base`    answers that get worse, or better, the longer they are (`lab.studies.pondering`)
`"collapsed"`   from `large-tuned`   Countdown by a policy gradient without regularisation (`lab.studies.collapse`)
============== ==================== ===================================================================================
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from lab.family.family import claim_folder, save_member
from lab.family.tokenizer import build_tokenizer
from lab.family.training import BatchSource, TrainingPlan, TrainingReport, instruction_batches, train
from lab.studies.collapse import RewardPlan, reward_batches
from lab.studies.pondering import ponder_examples
from lab.studies.routes import route_examples
from proxytune.demo.bundle import MemberName, bundled
from proxytune.demo.instructions import prompt_of
from proxytune.demo.world import build_world
from proxytune.errors import LabError

__all__ = ["STUDIES", "StudyName", "StudyRecipe", "bundled_study", "load_study", "train_studies"]

StudyName = Literal["routes", "ponder", "collapsed"]
STUDIES: tuple[StudyName, ...] = get_args(StudyName)
"""The first and the last are bundled."""

_START: dict[StudyName, MemberName] = {"routes": "large-base", "ponder": "large-base", "collapsed": "large-tuned"}


@dataclass(frozen=True)
class StudyRecipe:
    """Everything that decides the three models, apart from the training seed and the family they start from.

    Attributes:
        examples: Number of examples for each of the two that are tuned on text.
        rows: Examples per batch.
        rewards: Answers per step of the policy gradient.
    """

    examples: int = 12_000
    rows: int = 32
    rewards: RewardPlan = field(default_factory=RewardPlan)
    plans: dict[StudyName, TrainingPlan] = field(
        default_factory=lambda: {
            "routes": TrainingPlan(400, 1e-3, optimizer="adamw", warmup=10, decay=0.7),
            "ponder": TrainingPlan(900, 1.5e-3, optimizer="adamw", warmup=10, decay=0.7),
            # Long enough that the best of 64 samples gets worse, the subject of the study.
            "collapsed": TrainingPlan(250, 3e-4, optimizer="adamw", warmup=10, decay=0.2, checkpoint_every=50),
        }
    )


def train_studies(
    out: Path,
    *,
    seed: int = 0,
    family: Path | None = None,
    recipe: StudyRecipe | None = None,
    studies: Iterable[StudyName] = STUDIES,
) -> dict[StudyName, TrainingReport]:
    """Train the models of the studies and return their costs; one thread, resumed from the checkpoints in `out`.

    The seed decides examples, their order and the draws of the policy gradient. Each model gets a sub-folder of its
    name. A `family` of None is the bundled one.

    Raises:
        LabError: If `out` holds checkpoints of another seed, family or recipe.
    """
    recipe = recipe or StudyRecipe()
    wanted = {"seed": seed, "family": None if family is None else str(family), "recipe": asdict(recipe)}
    claim_folder(out / "checkpoints" / "studies.json", wanted, remedy="Choose another folder.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would train another model
    try:
        return {name: _train(out, name, seed, family, recipe) for name in studies}
    finally:
        torch.set_num_threads(threads)


def bundled_study(name: StudyName) -> Path:
    """The folder of a study's bundled model; "ponder" has none."""
    return Path(__file__).parents[1] / "weights" / name


def load_study(name: StudyName, folder: Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the model of a study, from a folder that `train_studies` wrote or from the bundled weights (not "ponder").

    Returns:
        The model in float32 and evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        LabError: If it is missing.
    """
    place = bundled_study(name) if folder is None else folder / name
    if not (place / "config.json").exists():
        raise LabError.of(
            f"study {name!r}",
            expected=f"its model in {place}",
            got="none",
            remedy="Train it with `python -m lab studies --out FOLDER`.",
        )
    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(place)


def _train(out: Path, name: StudyName, seed: int, family: Path | None, recipe: StudyRecipe) -> TrainingReport:
    done = out / "checkpoints" / f"{name}.json"
    if done.exists():  # written last, so a study that has one is complete
        return TrainingReport(**json.loads(done.read_text()))
    start = bundled(_START[name]) if family is None else str(family / _START[name])
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer = build_tokenizer(build_world())
    rng = random.Random(f"{name}:{seed}")
    batches: BatchSource
    if name == "collapsed":
        batches = reward_batches(model, tokenizer, recipe.rewards, seed=seed)
    else:
        examples = (
            [(prompt_of(route.question), path.text) for route, path in route_examples(rng, recipe.examples)]
            if name == "routes"
            else [(prompt_of(ponder.question), text) for ponder, text in ponder_examples(rng, recipe.examples)]
        )
        batches = instruction_batches(examples, tokenizer, rows=recipe.rows, seed=seed)
    checkpoint = out / "checkpoints" / f"{name}.pt"
    report = train(model, batches, recipe.plans[name], Accelerator(cpu=True), checkpoint=checkpoint, description=name)
    save_member(out / name, model, tokenizer)
    done.write_text(json.dumps(asdict(report)))
    return report
