"""The loop of all trees: a batch whose rows are the live branches of all prompts.

Each step is one forward pass and one draw for every live row. The host then reads one small record, since it has to
know the trees: which rows continue which, which split, which have ended. A `Frontier` decides what is started and what
becomes of the draws; rows carry their part of the cache along.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from proxytune import ops
from proxytune.budget.ledger import TokenLedger
from proxytune.errors import BudgetError, NumericalError, UnsupportedModeError
from proxytune.generation.batch import selected_rows
from proxytune.generation.call import Call
from proxytune.generation.call_log import log_on
from proxytune.generation.modes import refuse_adapter_names
from proxytune.generation.processor_rules import bind_to_prompts
from proxytune.generation.prompt_rows import rows_of_prompts
from proxytune.generation.sampler import MembersAndWeights, Sampler
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.trees.checks import Where, refuse_extras, refuse_hidden_state, refuse_leaving, refuse_threshold
from proxytune.methods.trees.frontier import Frontier, RowDraws
from proxytune.methods.trees.output import TreeOutput, leaves_of, note_leaves, warn_of_shortage
from proxytune.methods.trees.tree import Branch
from proxytune.models.weighing import picked
from proxytune.ops.combination import Weights
from proxytune.ops.noise import DECISIONS, Noise

__all__ = ["TreeLoop"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TreeLoop(ABC):
    """The shared settings of tree loops, and the loop; `ForkDecoding` and `SiblingDecoding` describe the settings."""

    threshold: float | ForkThreshold | None = None
    where: Where = "forks"
    share: float = 0.2
    fork_temperature: float | None = None
    max_total_tokens: int | None = None
    reserve: int | None = None
    seed: int | None = None
    stream_ids: Sequence[int] | torch.Tensor | None = None
    impl: ops.Impl = "auto"

    _why_sampling: ClassVar[str] = ""
    """Why greedy decoding is refused; empty where it is not."""

    @abstractmethod
    def asking_for(self, leaves: int) -> Self:
        """The same loop with another number of leaves per prompt."""

    @abstractmethod
    def _start(self, prompts: int, length: int, ledgers: list[TokenLedger] | None) -> Frontier:
        """The first branches of each prompt, with at most `length` tokens per path."""

    def _gains(
        self, sampler: Sampler, rows: MembersAndWeights, frontier: Frontier, tokens: Sequence[int]
    ) -> torch.Tensor | None:
        """What a step adds to the live branches' log-weights, float64 `[rows]`, on the device; None for nothing.

        It is read only at the end, so no draw may depend on it.
        """
        return None

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        assistant_model: Any = None,
        **model_kwargs: Any,
    ) -> TreeOutput | torch.Tensor:
        """Grow a tree for each row of `input_ids`, `[B, T]`, int64; called by `generate()` with its prepared arguments.

        Returns:
            With `return_dict_in_generate` a `TreeOutput`, else its sequences.

        Raises:
            UnsupportedModeError: For what a tree does not support: other modes, a streamer, an assistant, synced GPUs,
                ….
            InputError: If there is no padding token, or the threshold belongs to another α.
            BudgetError: If the budget leaves no token to generate after a prompt.
            NumericalError: If a row has no distribution.

        Warns:
            BudgetWarning: If the budget had no room for all branches, or cut one.
        """
        name = type(self).__name__
        call = Call.begin(
            name,
            model,
            input_ids,
            bind_to_prompts(name, logits_processor),
            stopping_criteria,
            generation_config,
            model_kwargs,
            seed=self.seed,
            stream_ids=self.stream_ids,
            assistant_model=assistant_model,
        )
        refuse_extras(name, generation_config, streamer, synced_gpus, model_kwargs)
        refuse_adapter_names(name, model, model_kwargs)
        refuse_leaving(name, call)
        refuse_threshold(self.threshold, model)
        if self._why_sampling and not generation_config.do_sample:
            raise UnsupportedModeError.of(
                f"{name} without sampling", expected="do_sample=True", got="greedy decoding", remedy=self._why_sampling
            )
        prompts = len(input_ids)
        ledgers = None if self.max_total_tokens is None else _ledgers(self.max_total_tokens, call.lengths.tolist())
        frontier = self._start(prompts, call.most_new, ledgers)
        cuts = (MaxLengthCriteria, MaxTimeCriteria)  # a branch that these end counts as cut, not finished
        criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, cuts))
        clocks = StoppingCriteriaList(c for c in stopping_criteria if isinstance(c, MaxTimeCriteria))
        texts = input_ids
        outputs = call.prefill()
        refuse_hidden_state(name, model, outputs, model_kwargs.get("use_cache"))
        sampler: Sampler | None = None
        chances: Noise | None = None
        gains: list[tuple[list[Branch], torch.Tensor]] = []
        step = 0
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            members, weights = call.ensemble.last_rows(outputs)
            del outputs  # may hold the logits of a whole prompt
            roots = [prompt for prompt, _ in frontier.rows]
            if step == 0 and roots != list(
                range(prompts)
            ):  # a prompt is forwarded once, however many branches begin at it
                input_ids = input_ids.index_select(0, torch.tensor(roots, device=input_ids.device))
                model_kwargs = selected_rows(model_kwargs, roots, prompts)
                members = [z.index_select(0, torch.tensor(roots, device=z.device)) for z in members]
                weights = picked(weights, torch.tensor(roots))
            if sampler is None or chances is None:
                chances = _noise(frontier, call)
                sampler = self._sampler(call, members[0], chances.at(chances.position + step))
            uniforms = chances.at(chances.position + step).uniform(DECISIONS) if self.where == "random" else None
            drawn, drawn_from = self._draw(sampler, members, weights, input_ids, frontier, uniforms, step)
            branches = frontier.branches
            parents, tokens = frontier.advance(drawn)
            gained = self._gains(sampler, drawn_from, frontier, tokens)
            if gained is not None:
                gains.append((branches, gained))
            del members, drawn_from
            moves = torch.tensor([parents, tokens], device=input_ids.device)
            input_ids = torch.cat([input_ids.index_select(0, moves[0]), moves[1][:, None]], -1)
            done = criteria(input_ids, None).tolist() if len(criteria) else [False] * len(parents)
            keep = frontier.retire(done, halt=bool(clocks) and bool(clocks(input_ids, None).any()))
            step += 1
            if not keep:
                break
            # Comparing parents is not enough: an ended row's child may have taken its place.
            if keep != list(range(len(drawn))) or len(parents) > len(drawn):
                input_ids = input_ids.index_select(0, torch.tensor(keep, device=input_ids.device))
                model_kwargs = selected_rows(model_kwargs, [parents[row] for row in keep], len(drawn))
                sampler = None
            new = 1 if model_kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
        _settle(gains)
        rounds = ", or spend what is left with proxytune.methods.trees.rounds.grow_in_rounds"
        warn_of_shortage(name, self.max_total_tokens, frontier.trees, rounds)
        out = leaves_of(frontier.trees, texts, generation_config._pad_token_tensor, ledgers)
        if (log := log_on(model)) is not None:
            note_leaves(log, out)
        assert out.sequences is not None
        return out if generation_config.return_dict_in_generate else out.sequences

    def _sampler(self, call: Call, base: torch.Tensor, noise: Noise) -> Sampler:
        more: dict[str, float] = {}
        if self.fork_temperature is not None:
            more = {"fork_threshold": self._nats(), "fork_temperature": self.fork_temperature}
        return Sampler(call.draw_settings(base, self.impl, noise=noise, **more))

    def _draw(
        self,
        sampler: Sampler,
        members: Sequence[torch.Tensor],
        weights: Weights,
        input_ids: torch.Tensor,
        frontier: Frontier,
        uniforms: torch.Tensor | None,
        step: int,
    ) -> tuple[list[RowDraws], MembersAndWeights]:
        """Draw for every live row; returns each row's draws and whether it is at a fork, and the rows drawn from."""
        draws = min(frontier.most_draws(), sampler.settings.usable)
        want = ["tokens", "logprobs", "entropy", "confidence"]
        want += ["draw_logprobs", "keys"] if sampler.samples else ["scores"]
        with rows_of_prompts([prompt for prompt, _ in frontier.rows], len(frontier.trees)):
            stats, rows = sampler(members, weights, input_ids, draws=draws if sampler.samples else 1, want=want)
        assert stats.tokens is not None
        assert stats.entropy is not None
        tokens, keys = stats.tokens, stats.keys
        logprobs, draw_logprobs = stats.logprobs, stats.draw_logprobs
        if not sampler.samples:
            assert stats.scores is not None
            tokens, logprobs = _most_probable(stats.scores, tokens, draws)
            # Nothing was drawn at random, so the threshold κ is −inf.
            draw_logprobs, keys = logprobs, torch.full_like(logprobs, -torch.inf)
        columns = [tokens, draw_logprobs, keys, logprobs, stats.entropy, stats.confidence]
        columns.append(stats.entropy if uniforms is None else uniforms.to(stats.entropy.device))
        parts = [x.double() if x.ndim == 2 else x.double()[:, None] for x in columns if x is not None]
        packed = torch.cat(parts, 1).tolist()  # one read by the host; the stopping criteria need another
        failed = [row[0] < 0 for row in packed]
        if any(failed):
            prompt, branch = frontier.rows[failed.index(True)]
            failure = sampler.failure(rows, torch.tensor(failed), step)
            raise NumericalError(f"prompt {prompt}, branch {branch}: {failure}")
        out = [
            RowDraws(
                tokens=[int(t) for t in row[:draws]],
                draw_logprobs=row[draws : 2 * draws],
                keys=row[2 * draws : 3 * draws],
                logprobs=row[3 * draws : 4 * draws],
                entropy=row[4 * draws],
                confidence=row[4 * draws + 1],
                at_fork=self._at_fork(row[4 * draws], row[4 * draws + 2], step),
            )
            for row in packed
        ]
        return out, rows

    def _at_fork(self, entropy: float, uniform: float, step: int) -> bool:
        if self.where == "start":
            return step == 0
        if self.where == "random":
            return uniform < self.share
        return self.threshold is not None and entropy > self._nats()

    def _nats(self) -> float:
        assert self.threshold is not None
        return self.threshold.nats if isinstance(self.threshold, ForkThreshold) else self.threshold


def _ledgers(budget: int, lengths: Sequence[int]) -> list[TokenLedger]:
    """A ledger for each prompt, already charged for the prompt."""
    ledgers = []
    for prompt, length in enumerate(lengths):
        ledger = TokenLedger(budget)
        if length >= budget:
            raise BudgetError.of(
                "max_total_tokens",
                expected=f"at least {length + 1}: prompt {prompt} has {length} tokens, and one more must be generated",
                got=f"{budget}",
                remedy="Raise max_total_tokens, or shorten the prompt.",
            )
        ledger.charge(length, label="prompt")
        ledgers.append(ledger)
    return ledgers


def _noise(frontier: Frontier, call: Call) -> Noise:
    """The noise keys of the live rows at the first generated position."""
    device = call.lengths.device
    prompts, branches = torch.tensor(frontier.rows, device=device).unbind(1)
    row = call.keys.row.to(device)[prompts]
    noise = Noise.of(len(prompts), seed=call.seed, row=row, branch=branches, device=device)
    return noise.at(call.lengths[prompts])


def _most_probable(scores: torch.Tensor, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens and their log-probabilities, `[B, count]`, the argmax first; −1 for masked ones."""
    best = scores.log_softmax(-1).topk(count, -1)
    # Among ties topk may have put another token before the argmax.
    tokens = torch.where(best.indices == first, best.indices[:, :1], best.indices)
    masked = best.values[:, 1:] == -torch.inf
    return torch.cat([first, tokens[:, 1:].masked_fill(masked, -1)], 1), best.values


def _settle(gains: list[tuple[list[Branch], torch.Tensor]]) -> None:
    """Add the steps' gains to the branches' log-weights."""
    if gains:
        values = torch.cat([gained for _, gained in gains]).tolist()
        for branch, value in zip((branch for branches, _ in gains for branch in branches), values, strict=True):
            branch.log_weight += value
