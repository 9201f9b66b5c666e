"""One training loop for every model of the lab: data-parallel, resumable, with a progress bar.

Batches are a pure function of the step, so a resumed run sees the same text as an uninterrupted one, and the global
batch does not depend on the number of processes.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position without loss, as in transformers."""

BatchSource = Callable[[int], tuple[torch.Tensor, ...]]
"""Step → the global batch: input ids, next-token labels, `[B, T]` int64; optional loss weights, `[B, T]` float32."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak rate of both optimizers (Muon's update is scaled to the size of AdamW's).
        optimizer: `"muon"` puts the hidden matrices under `torch.optim.Muon` and the rest under AdamW; `"adamw"` uses
            AdamW for all.
        warmup: Steps of linear warm-up.
        decay: Share of the steps, at the end, over which the rate falls linearly to 0.
        weight_decay: Decoupled weight decay of the hidden matrices.
        clip: Largest gradient norm.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    learning_rate: float
    optimizer: Literal["muon", "adamw"] = "muon"
    warmup: int = 40
    decay: float = 0.5
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_every: int = 200

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.decay * self.steps))
        return self.learning_rate * rise * fall


@dataclass(frozen=True)
class TrainingReport:
    """The cost of a finished run.

    Attributes:
        steps: Steps taken, those before a resume included.
        seconds: Wall-clock time inside the loop, over all resumed parts.
        processor_seconds: Processor time of the first process times the number of processes; unlike `seconds`, hardly
            affected by other work on the machine.
        tokens: Positions fed over all processes, padding included.
        loss: Moving average of the training loss on the first process, in nats per scored token.
    """

    steps: int
    seconds: float
    processor_seconds: float
    processes: int
    tokens: int
    loss: float


def train(
    model: PreTrainedModel,
    batches: BatchSource,
    plan: TrainingPlan,
    accelerator: Accelerator,
    *,
    checkpoint: Path | None = None,
    description: str = "training",
) -> TrainingReport:
    """Train `model` (float32, on the CPU) in place, and leave it in evaluation mode.

    Every process takes its share of the rows of each global batch. The checkpoint is resumed from if it exists, and
    written every `plan.checkpoint_every` steps and at the end, so resuming a finished run is free.
    """
    optimizers = _optimizers(model, plan)
    start, tokens, loss_average = 0, 0, math.nan
    rank, processes = accelerator.process_index, accelerator.num_processes
    clock = _Clock(processes)
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, tokens, loss_average = state["step"], state["tokens"], state["loss"]
        clock = _Clock(processes, state["seconds"], state["processor_seconds"])
    model.train()
    runner = accelerator.prepare(model)
    parameters = list(model.parameters())
    bar = tqdm(
        total=plan.steps,
        initial=start,
        desc=description,
        unit="step",
        disable=not accelerator.is_main_process,
        smoothing=0.1,
    )
    for step in range(start, plan.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
        input_ids, labels, *weights = batches(step)  # [B, T] each
        # Gradients are averaged over processes, so each divides by its share of the *global* count of scored tokens.
        share = max(1, int((labels != IGNORED).sum())) / processes
        logits = runner(input_ids=input_ids[rank::processes], use_cache=False).logits  # [B/P, T, V]
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels[rank::processes].flatten(), ignore_index=IGNORED, reduction="none"
        )
        if weights:
            losses = losses * weights[0][rank::processes].flatten()
        loss = losses.sum() / share
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, plan.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += input_ids.numel()
        value = float(loss.detach())
        loss_average = value if math.isnan(loss_average) else 0.95 * loss_average + 0.05 * value
        bar.update()
        bar.set_postfix(loss=f"{loss_average:.3f}", refresh=False)
        done = step + 1
        due = done % plan.checkpoint_every == 0 or done == plan.steps
        if checkpoint is not None and accelerator.is_main_process and due:
            progress = {"step": done, "tokens": tokens, "loss": loss_average}
            progress |= {"seconds": clock.wall(), "processor_seconds": clock.processor()}
            _save_checkpoint(checkpoint, model, optimizers, progress)
    bar.close()
    model.eval()
    return TrainingReport(plan.steps, clock.wall(), clock.processor(), processes, tokens, loss_average)


class _Clock:
    """Wall-clock time, and processor time of all processes, in seconds, continued over a resume."""

    def __init__(self, processes: int, wall: float = 0.0, processor: float = 0.0) -> None:
        self._processes, self._processor_before = processes, processor
        self._wall_origin = time.perf_counter() - wall
        self._processor_origin = time.process_time()

    def wall(self) -> float:
        return time.perf_counter() - self._wall_origin

    def processor(self) -> float:
        """Processor time; the other processes do the same work and are assumed to take as long."""
        return self._processor_before + (time.process_time() - self._processor_origin) * self._processes


def pretraining_batches(
    document: Callable[[random.Random], str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
) -> BatchSource:
    """Packed documents, each followed by the end-of-text token; a pure function of the step.

    Every row starts with the start of a document and cuts its last one off.
    """
    end = _token_id(tokenizer)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed = []
        for row in range(rows):
            rng = random.Random(f"pretraining:{seed}:{step}:{row}")
            ids: list[int] = []
            while len(ids) <= length:
                for encoded in tokenizer([document(rng) for _ in range(8)], add_special_tokens=False)["input_ids"]:
                    ids += [*encoded, end]
            packed.append(ids[: length + 1])
        rows_of_ids = torch.tensor(packed)  # [B, T+1]
        return rows_of_ids[:, :-1], rows_of_ids[:, 1:]

    return batch


def instruction_batches(
    examples: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, rows: int, seed: int
) -> BatchSource:
    """Prompt and answer pairs, shuffled every epoch; a pure function of the step.

    Only the answer and its end-of-text token have a loss.
    """
    end = _token_id(tokenizer)
    encoded = [
        (
            tokenizer(prompt, add_special_tokens=False)["input_ids"],
            [*tokenizer(answer, add_special_tokens=False)["input_ids"], end],
        )
        for prompt, answer in examples
    ]

    @lru_cache(maxsize=2)  # a batch may span two epochs
    def order(epoch: int) -> list[int]:
        return random.Random(f"instructions:{seed}:{epoch}").sample(range(len(encoded)), len(encoded))

    def chosen(position: int) -> int:
        epoch, offset = divmod(position, len(encoded))
        return order(epoch)[offset]

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return answer_rows([encoded[chosen(step * rows + row)] for row in range(rows)])

    return batch


def answer_rows(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, `[B, T]` int64, of (prompt, answer) pairs, right-padded; only answers have a loss."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        ids = torch.tensor(prompt + answer)
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return input_ids, labels


def _optimizers(model: nn.Module, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """The optimizers of a plan. Embeddings and gains stay under AdamW, as Muon's authors advise."""
    hidden = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    taken = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    if plan.optimizer == "muon":
        return [
            torch.optim.Muon(
                hidden, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=plan.learning_rate, betas=(0.9, 0.97), weight_decay=0.0),
        ]
    groups = [{"params": hidden, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98))]


def _save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], progress: dict[str, float]
) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            **progress,
        },
        partial,
    )
    os.replace(partial, path)


def _token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return end
