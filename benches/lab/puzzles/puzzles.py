"""The three puzzles by name, the training batches of a model, and its score.

=============== ============================================ ==================================================
`"colouring"`   `lab.puzzles.colouring`, a colour per node tens of solutions, a choice at most of the nodes
`"queens"`      `lab.puzzles.queens`, a column per row     two or three solutions, decided at the first token
`"countdown"`   `lab.puzzles.scratchpad`, two steps        some three solutions, after `<think>` … `</think>`
=============== ============================================ ==================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from lab.family.training import IGNORED, BatchSource
from lab.puzzles.colouring import Colouring
from lab.puzzles.puzzle import Instance, Puzzle, Solution, Twin, keyed_generator
from lab.puzzles.queens import Queens
from lab.puzzles.scratchpad import Scratchpad
from lab.puzzles.vocabulary import EOS, PAD

__all__ = ["PUZZLES", "PuzzleName", "PuzzleScore", "puzzle_batches", "sample_puzzle", "score_puzzle"]

PuzzleName = Literal["colouring", "queens", "countdown"]
PUZZLES: dict[PuzzleName, Puzzle] = {"colouring": Colouring(), "queens": Queens(), "countdown": Scratchpad()}


@dataclass(frozen=True)
class PuzzleScore:
    """Score of several answers to each of several instances.

    Attributes:
        valid: Share of answers that are solutions.
        solved: Share of instances with at least one valid answer.
        distinct: Mean number of distinct solutions found per instance.
        agreement: Probability that two valid answers to one instance are the same solution, averaged over the instances
            with two or more; 1 for a model without variety, NaN if there is no such instance.
        solutions: Mean number of solutions per instance.
    """

    instances: int
    samples: int
    valid: float
    solved: float
    distinct: float
    agreement: float
    solutions: float


def puzzle_batches(
    turns: Sequence[PuzzleName], rows: Mapping[PuzzleName, int], twin: Twin, *, seed: int
) -> BatchSource:
    """Batches of one puzzle each, in turns; only answers and their end of text have a loss.

    A mixed batch would be mostly padding, and nearly all of its gradient would come from the puzzle with the longest
    answers. Both twins see the same instances in the same order. A pure function of the step.
    """

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        name = turns[step % len(turns)]
        puzzle, key = PUZZLES[name], f"{name}:{seed}:{step}"
        instances = puzzle.draw(rows[name], keyed_generator(f"instances:{key}"), "train")
        answers = puzzle.answers(instances, twin, keyed_generator(f"answers:{key}"))
        ids = torch.cat([puzzle.prompts(instances), answers], 1)  # [B, T]
        ids = ids[:, : int((ids != PAD).sum(1).max())]
        labels = ids.masked_fill(ids == PAD, IGNORED)
        labels[:, : puzzle.prompt_length] = IGNORED
        return ids[:, :-1], labels[:, 1:]

    return batch


def sample_puzzle(
    model: PreTrainedModel,
    puzzle: Puzzle,
    instances: Sequence[Instance],
    samples: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[Solution | None]]:
    """Sample `samples` answers to each instance, and read each: its canonical solution, or None."""
    prompts = puzzle.prompts(torch.tensor(instances)).repeat_interleave(samples, 0)
    read: list[Solution | None] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), 256):  # rows at a time, for the memory
            chunk = prompts[start : start + 256]
            written = model.generate(
                input_ids=chunk,
                attention_mask=torch.ones_like(chunk),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=puzzle.answer_length,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )[:, puzzle.prompt_length :]
            asked = (instances[(start + row) // samples] for row in range(len(chunk)))
            read += [puzzle.read(instance, ids) for instance, ids in zip(asked, written.tolist(), strict=True)]
    return [read[start : start + samples] for start in range(0, len(read), samples)]


def score_puzzle(
    puzzle: Puzzle, instances: Sequence[Instance], verdicts: Sequence[Sequence[Solution | None]]
) -> PuzzleScore:
    """Validity and variety of the answers that `sample_puzzle` returned."""
    found = [[solution for solution in row if solution is not None] for row in verdicts]
    pairs = [
        sum(row.count(solution) - 1 for solution in row) / (len(row) * (len(row) - 1)) for row in found if len(row) > 1
    ]
    count = len(instances)
    return PuzzleScore(
        instances=count,
        samples=len(verdicts[0]),
        valid=sum(map(len, found)) / sum(map(len, verdicts)),
        solved=sum(map(bool, found)) / count,
        distinct=sum(len(set(row)) for row in found) / count,
        agreement=sum(pairs) / len(pairs) if pairs else float("nan"),
        solutions=sum(len(puzzle.solutions(instance)) for instance in instances) / count,
    )
