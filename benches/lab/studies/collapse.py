"""A policy gradient on Countdown without any regularisation: what it gains and what it loses.

REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): right answers become likelier, wrong
ones less likely, and nothing keeps the policy near its start. The first answer gets better, the variety smaller (Yue et
al. 2025, arXiv 2504.13837). The tuned model that it starts from is the un-collapsed twin.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.family.training import BatchSource, answer_rows
from proxytune.demo.instructions import prompt_of
from proxytune.demo.tasks import countdown_problem
from proxytune.demo.verifiers import grade
from proxytune.generation.fused import FusedDecoding

__all__ = ["RewardPlan", "reward_batches"]


@dataclass(frozen=True)
class RewardPlan:
    """How the answers of a step are drawn: at least 2 samples per problem, at temperature 1."""

    problems: int = 16
    samples: int = 8
    max_new_tokens: int = 40


def reward_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: RewardPlan, *, seed: int
) -> BatchSource:
    """The model's own answers, each token weighted by its answer's advantage.

    Weighted so, the cross-entropy has the gradient of REINFORCE: advantage times −∇ log p. The reward is 1 for a
    strictly right answer, else 0; the baseline is the mean reward of the other answers to the same problem.

    Returns:
        A function of the step and of the model's weights: ids, labels of the answers' tokens, advantages.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        rng = random.Random(f"rewards:{seed}:{step}")
        asked = [countdown_problem(rng, "train") for _ in range(plan.problems)]
        each = [problem for problem in asked for _ in range(plan.samples)]
        encoded = tokenizer([prompt_of(problem.question) for problem in each], return_tensors="pt", padding=True)
        # A new seed for each step, since rows and positions repeat.
        loop = FusedDecoding(seed=random.Random(f"draws:{seed}:{step}").getrandbits(62))
        with torch.no_grad():
            sequences = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=plan.max_new_tokens,
                custom_generate=loop,
            )  # [B, prompt + new], padded on both sides
        start = encoded["input_ids"].shape[1]
        answers = sequences[:, start:]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        rewards = torch.tensor([float(grade(problem, text).strict) for problem, text in zip(each, texts, strict=True)])
        rewards = rewards.view(plan.problems, plan.samples)
        others = (rewards.sum(1, keepdim=True) - rewards) / (plan.samples - 1)
        advantages = (rewards - others).flatten()  # [B]

        pairs = [
            ([token for token in prompt.tolist() if token != pad], _until(answer.tolist(), eos))
            for prompt, answer in zip(encoded["input_ids"], answers, strict=True)
        ]
        input_ids, labels = answer_rows(pairs)
        return input_ids, labels, advantages[:, None].expand(input_ids.shape)

    return batch


def _until(ids: list[int], eos: int) -> list[int]:
    """An answer up to and including its end-of-text token."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids
