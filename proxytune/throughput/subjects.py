"""What the throughput bench runs on: cells of the protocol, the lab's family, random members of given shapes.

A pass takes as long with random weights as with trained ones. The acceptance of drafts does depend on the weights, so
in random models it is planted (see `proxytune.throughput.planted_models`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from proxytune.costs.model_size import pass_bytes
from proxytune.costs.roofline import PassBytes
from proxytune.demo.bundle import bundled_family, load_family, read_record
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import problems
from proxytune.demo.world import build_world
from proxytune.errors import InputError
from proxytune.formulas.gates import Gate
from proxytune.models.model import ProxyTunedModel
from proxytune.models.wrap import wrap
from proxytune.throughput.planted_models import plant
from proxytune.throughput.shapes import Trio

__all__ = [
    "LAB",
    "PROTOCOL",
    "Cell",
    "Subject",
    "lab_subject",
    "random_subject",
]

LAB = "lab"
Setting = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Cell:
    """One cell of the protocol: B prompts of so many tokens, and exactly `new` tokens each.

    "sampled" is temperature 1 with top-k 50 and top-p 0.95.
    """

    prompt: int
    new: int
    rows: int = 1
    setting: Setting = "greedy"

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.prompt}→{self.new}, batch {self.rows}" + ("" if self.setting == "greedy" else ", sampled")

    @property
    def config(self) -> GenerationConfig:
        """The generation config of all methods."""
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
        return GenerationConfig(
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            pad_token_id=0,
            use_cache=True,
            **(drawn if self.setting == "sampled" else {"do_sample": False}),
        )


PROTOCOL = (Cell(8, 512), Cell(512, 8), Cell(8, 8), Cell(8, 128, 8), Cell(8, 128, 32), Cell(8, 128, 1, "sampled"))


@dataclass
class Subject:
    """The models that are compared.

    Attributes:
        models: `base`, `tuned`, `expert` and `antiexpert`.
        steered: The composed model.
        text: `[N]`, int64: prompts are cut from it.
        trained: Whether the weights are trained; if not, acceptance is planted.
        compiled: Whether the members' steps are compiled.
        dry: Whether a CPU stands in for a GPU: what needs one runs too, and graphs have no compiler.
        gate: The gate of methods that have one; None until it is asked for.
    """

    name: str
    models: dict[str, PreTrainedModel]
    steered: ProxyTunedModel
    text: torch.Tensor
    trained: bool
    compiled: bool = False
    dry: bool = False
    gate: Gate | None = None

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.steered.device

    @property
    def alpha(self) -> float:
        """Strength of the shift."""
        return self.steered.alpha

    @property
    def bytes(self) -> dict[str, PassBytes]:
        """Role → what a pass reads."""
        return {role: pass_bytes(model) for role, model in self.models.items()}

    @property
    def longest(self) -> int:
        """The longest text that all members have room for, in tokens."""
        return min(int(model.config.max_position_embeddings) for model in self.models.values())

    def accept(self, rate: float, *, unsure: float = 0.0) -> None:
        """Plant an acceptance: the share of tokens at which expert and composition agree.

        `unsure` is the share at which the base is unsure, for gates.

        No effect on a trained family. Raises `InputError` if the share is outside [0, 1].
        """
        if not self.trained:
            plant({role: self.models[role] for role in ("base", "expert", "antiexpert")}, rate, unsure=unsure, seed=0)

    def prompts(self, cell: Cell) -> torch.Tensor:
        """`[B, P]`, int64: prompts without padding, each from another place in the text.

        Raises:
            InputError: If the text is too short.
        """
        spare = len(self.text) - cell.prompt
        if spare < cell.rows - 1:
            raise InputError.of(
                cell.name,
                expected=f"prompts from a text of {len(self.text)} tokens",
                got=f"{cell.rows} of {cell.prompt} tokens",
                remedy="Ask for shorter prompts or fewer rows.",
            )
        step = spare // max(1, cell.rows - 1) if cell.rows > 1 else 0
        # The first row's prompt ends where the text does, with an open question.
        ends = [len(self.text) - step * row for row in range(cell.rows)]
        return torch.stack([self.text[end - cell.prompt : end] for end in ends]).to(self.device)


def random_subject(trio: Trio, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> Subject:
    """Random members of given shapes, with an acceptance of 1; the tuned model is the base itself.

    Heads are always untied, so that next tokens can be planted. That takes more memory where the shape has a tied head,
    but as many bytes per pass.
    """
    base = replace(trio.base, tied=False).build(dtype=dtype, device=device, seed=seed)
    expert, antiexpert = (
        replace(trio.small, tied=False).build(dtype=dtype, device=device, seed=seed + i) for i in (1, 2)
    )
    ids = min(trio.base.vocabulary, trio.small.vocabulary)
    text = torch.randint(1, ids, (4096,), generator=torch.Generator().manual_seed(seed))
    models: dict[str, PreTrainedModel] = {"base": base, "tuned": base, "expert": expert, "antiexpert": antiexpert}
    subject = _subject(trio.name, models, 1.0, text, trained=False)
    subject.accept(1.0)
    return subject


def lab_subject(folder: Path | None = None, alpha: float | None = None) -> Subject:
    """The family of a folder (default: the bundled one), in float32 on the CPU: real weights, text and acceptance.

    `alpha` is the strength of the shift; None for the recorded one.

    Raises:
        LabError: If a model is missing from the folder, or the record without an `alpha`.
    """
    folder = folder or bundled_family()
    found, tokenizer = load_family(folder)
    strength = float(read_record(folder)["alpha"]) if alpha is None else alpha
    models: dict[str, PreTrainedModel] = {
        "base": found["large-base"],
        "tuned": found["large-tuned"],
        "expert": found["tiny-tuned"],
        "antiexpert": found["tiny-base"],
    }
    world = build_world()
    chains, questions = (problems(task, "test", 40, world) for task in ("chain", "qa"))
    asked = [problem for both in zip(chains, questions, strict=True) for problem in both]
    shown = "".join(f"{prompt_of(problem.question)} {problem.answer}\n" for problem in asked[:-1])
    ids = tokenizer(shown + prompt_of(asked[-1].question))["input_ids"]
    return _subject(LAB, models, strength, torch.tensor(ids), trained=True)


def _subject(
    name: str, models: dict[str, PreTrainedModel], alpha: float, text: torch.Tensor, *, trained: bool
) -> Subject:
    for model in models.values():
        # One config for all: generate() would fill in whatever the call leaves out from the model's own.
        model.generation_config = GenerationConfig(pad_token_id=0)
    companions = {role: models[role] for role in ("expert", "antiexpert")}
    steered = wrap(models["base"], **companions, alpha=alpha, check_vocabulary=False)
    return Subject(name, models, steered, text, trained)
