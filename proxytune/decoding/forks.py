"""The fork tree: one prompt, several branches that part where the distribution is undecided.

All live branches of all prompts are one batch. Where a row forks, its children are drawn without replacement
(Gumbel-top-k, Kool et al. 2019, arXiv 1903.06059) and take copies of its row of the cache; a finished row leaves. What
is decided before a draw (whether, and how many children) depends on what was drawn before only, so the leaves' weights
are unbiased whatever the rule. The host has to know the tree, so it reads one small record per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria
from transformers.utils import ModelOutput

from proxytune import ops
from proxytune.budget import TokenLedger
from proxytune.decoding.drawing import Drawing
from proxytune.decoding.fork_checks import Where, refuse_extras, refuse_settings, refuse_threshold
from proxytune.decoding.growing import Drawn, Grove
from proxytune.decoding.stepping import last_logits, lengths_of, refuse_modes, usable_columns
from proxytune.decoding.translation import Translation, translate
from proxytune.decoding.tree import ForkTree
from proxytune.entropy import ForkThreshold
from proxytune.errors import BudgetError, NumericalError
from proxytune.model import ProxyTunedModel
from proxytune.noise import DECISIONS, Noise

__all__ = ["ForkDecoding", "ForkOutput", "Where"]


@dataclass
class ForkOutput(ModelOutput):
    """The leaves of all trees, prompt after prompt, in the order of their branches' numbers.

    Attributes:
        sequences: `[L, T]`, int64: prompt and generated tokens, padded at the right.
        prompts: `[L]`, int64: the prompt's row in the batch.
        log_weights: `[L]`, float64, nats: over a tree's leaves, Σ exp(log_weight) · f is an unbiased estimate of E[f].
        weights: `[L]`, float64: the same, self-normalised per tree.
        trees: One for each prompt.
        ledgers: One for each prompt; None without a budget.
    """

    sequences: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    log_weights: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    trees: list[ForkTree] | None = None
    ledgers: list[TokenLedger] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ForkDecoding:
    """A loop for `model.generate(..., custom_generate=ForkDecoding(threshold=…))`, for composed and plain causal LMs.

    With sampling, children are drawn without replacement, and a branch that does not fork draws as `FusedDecoding`
    does; in greedy decoding a fork's children are the most probable tokens, and weigh their probabilities. A tree
    depends on its prompt, the seed and the settings, not on the batch around it.

    Attributes:
        threshold: Entropy in nats above which a token is a fork, of the distribution after the processors that had to
            run, at temperature 1: a number or a calibrated `ForkThreshold`. Needed with `where="forks"`.
        branches: The most leaves of a tree (W).
        children: The most children of a fork, the branch that goes on among them; at the start all W.
        min_gap: The least distance between two forks on a path, in tokens.
        where: "forks"; "random" for forks at random positions, the ablation; "start" for one fork at the first token
            (with greedy decoding this is chain-of-thought decoding, Wang & Zhou 2024, arXiv 2402.10200).
        share: With "random", the chance of a position to be a fork.
        fork_temperature: The temperature above the threshold; None for the call's own everywhere.
        max_total_tokens: A hard budget for each prompt, its own tokens included, shared ones counted once; a row forks
            only if its children can be finished. None for no limit.
        seed: The key of all draws; None for another one in each call, from torch's default generator.
        rows: `[B]`, which stream of the seed each prompt draws from [0, 1, 2, …].
        impl: "triton", "torch" or "auto".

    Raises:
        InputError: If a setting is out of its range.
    """

    threshold: float | ForkThreshold | None = None
    branches: int = 8
    children: int = 2
    min_gap: int = 1
    where: Where = "forks"
    share: float = 0.2
    fork_temperature: float | None = None
    max_total_tokens: int | None = None
    seed: int | None = None
    rows: Sequence[int] | torch.Tensor | None = None
    impl: ops.Impl = "auto"

    def __post_init__(self) -> None:
        refuse_settings(self)

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
    ) -> ForkOutput | torch.Tensor:
        """Grow the trees; `generate()` calls this with what it has prepared.

        Args:
            model: The composed model, or a plain causal LM.
            input_ids: `[B, T]`, int64: a tree for each row.
            logits_processor: The processors.
            stopping_criteria: The criteria.
            generation_config: The settings.
            synced_gpus: Refused.
            streamer: Refused.
            tokenizer: The stop strings' criterion has taken it.
            assistant_model: Refused.
            **model_kwargs: What the forward passes need; the cache among them.

        Returns:
            With `return_dict_in_generate` a `ForkOutput`, else its sequences.

        Raises:
            UnsupportedModeError: For what a tree cannot do.
            InputError: If there is no padding token, or the threshold belongs to another α.
            BudgetError: If the budget leaves no token to generate after a prompt.
            NumericalError: If a row has no distribution.
        """
        refuse_modes("ForkDecoding", model, generation_config, assistant_model)
        refuse_extras(generation_config, streamer, synced_gpus, model_kwargs)
        refuse_threshold(self.threshold, model)
        prompts, length = input_ids.shape
        lengths = lengths_of(input_ids, generation_config, model_kwargs)  # [B]
        ledgers = None if self.max_total_tokens is None else _ledgers(self.max_total_tokens, lengths.tolist())
        limit = int(stopping_criteria.max_length) - length
        grove = Grove(
            prompts,
            branches=self.branches,
            children=self.branches if self.where == "start" else self.children,
            min_gap=self.min_gap,
            length=limit,
            ledgers=ledgers,
        )
        cuts = (MaxLengthCriteria, MaxTimeCriteria)  # what they end has not ended by itself
        criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, cuts))
        clocks = StoppingCriteriaList(c for c in stopping_criteria if isinstance(c, MaxTimeCriteria))
        translation = translate(logits_processor, bool(generation_config.do_sample))
        streams = Noise.of(prompts, row=None if self.rows is None else torch.as_tensor(self.rows)).row
        seed = int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64)) if self.seed is None else self.seed
        if isinstance(model, ProxyTunedModel):
            model_kwargs["combine"] = False
        texts = input_ids
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        drawing: Drawing | None = None
        chances: Noise | None = None
        step = 0
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            members, weights = last_logits(model, outputs)
            del outputs  # the logits of a whole prompt may hang on it
            if drawing is None or chances is None:
                chances = _noise(grove, lengths, streams, seed)
                drawing = self._prepare(model, translation, members[0], chances.at(chances.position + step))
            wishes = chances.at(chances.position + step).uniform(DECISIONS) if self.where == "random" else None
            drawn = self._draw(drawing, members, weights, input_ids, grove, wishes, step)
            parents, tokens = grove.grow(drawn)
            here = torch.tensor([parents, tokens], device=input_ids.device)
            input_ids = torch.cat([input_ids.index_select(0, here[0]), here[1][:, None]], -1)
            done = criteria(input_ids, None).tolist() if len(criteria) else [False] * len(parents)
            keep = grove.prune(done, halt=bool(clocks) and bool(clocks(input_ids, None).any()))
            step += 1
            if not keep:
                break
            # Not by the parents alone: where a row has ended, its child may stand in its place.
            if keep != list(range(len(drawn))) or len(parents) > len(drawn):
                input_ids = input_ids.index_select(0, torch.tensor(keep, device=input_ids.device))
                model_kwargs = _selected(model_kwargs, [parents[row] for row in keep], len(drawn))
                drawing = None
            new = 1 if model_kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
        out = _output(grove.trees, texts, generation_config._pad_token_tensor, ledgers)
        assert out.sequences is not None
        return out if generation_config.return_dict_in_generate else out.sequences

    def _prepare(self, model: Any, translation: Translation, base: torch.Tensor, noise: Noise) -> Drawing:
        width = base.shape[1]
        usable = usable_columns(model, translation, width)
        place = noise.position.device if translation.before else base.device
        if not translation.do_sample:
            return Drawing(translation, None, None, width=width, usable=usable, place=place, impl=self.impl)
        more: dict[str, float] = {}
        if self.fork_temperature is not None:
            more = {"fork_threshold": self._nats(), "fork_temperature": self.fork_temperature}
        rows = len(noise.position)
        sampling = translation.sampling(rows, width if translation.before else usable, place, **more)
        keys = Noise(*(x.to(place) for x in (noise.seed, noise.row, noise.position, noise.branch)))
        return Drawing(translation, sampling, keys, width=width, usable=usable, place=place, impl=self.impl)

    def _draw(
        self,
        drawing: Drawing,
        members: Sequence[torch.Tensor],
        weights: Sequence[float],
        input_ids: torch.Tensor,
        grove: Grove,
        wishes: torch.Tensor | None,
        step: int,
    ) -> list[Drawn]:
        """Draw for every live row, and say which of them are at a place to fork."""
        draws = min(grove.most_draws(), drawing.usable)
        want = ["tokens", "logprobs", "entropy", "confidence"]
        want += ["draw_logprobs", "keys"] if drawing.samples else ["scores"]
        found, rows = drawing(members, weights, input_ids, draws=draws if drawing.samples else 1, want=want)
        assert found.tokens is not None
        assert found.entropy is not None
        tokens, keys = found.tokens, found.keys
        logprobs, draw_logprobs = found.logprobs, found.draw_logprobs
        if not drawing.samples:
            assert found.scores is not None
            tokens, logprobs = _most_probable(found.scores, tokens, draws)
            # The children are certain: nothing that was not drawn could have been.
            draw_logprobs, keys = logprobs, torch.full_like(logprobs, -torch.inf)
        columns = [tokens, draw_logprobs, keys, logprobs, found.entropy, found.confidence]
        columns.append(found.entropy if wishes is None else wishes.to(found.entropy.device))
        parts = [x.double() if x.ndim == 2 else x.double()[:, None] for x in columns if x is not None]
        packed = torch.cat(parts, 1).tolist()  # the one read of a step
        failed = [row[0] < 0 for row in packed]
        if any(failed):
            prompt, branch = grove.rows[failed.index(True)]
            failure = drawing.failure(rows, torch.tensor(failed), step)
            raise NumericalError(f"prompt {prompt}, branch {branch}: {failure}")
        return [
            Drawn(
                tokens=[int(t) for t in row[:draws]],
                draw_logprobs=row[draws : 2 * draws],
                keys=row[2 * draws : 3 * draws],
                logprobs=row[3 * draws : 4 * draws],
                entropy=row[4 * draws],
                confidence=row[4 * draws + 1],
                wants=self._wants(row[4 * draws], row[4 * draws + 2], step),
            )
            for row in packed
        ]

    def _wants(self, entropy: float, uniform: float, step: int) -> bool:
        if self.where == "start":
            return step == 0
        return uniform < self.share if self.where == "random" else entropy > self._nats()

    def _nats(self) -> float:
        assert self.threshold is not None
        return self.threshold.nats if isinstance(self.threshold, ForkThreshold) else self.threshold


def _ledgers(budget: int, lengths: Sequence[int]) -> list[TokenLedger]:
    """A ledger for each prompt, which has paid for it."""
    ledgers = []
    for prompt, length in enumerate(lengths):
        ledger = TokenLedger(budget)
        if length >= budget:
            raise BudgetError.of(
                "max_total_tokens",
                expected=f"at least {length + 1}: prompt {prompt} has {length} tokens, and one has to be generated",
                got=f"{budget}",
                remedy="Raise max_total_tokens, or shorten the prompt.",
            )
        ledger.charge(length, label="prompt")
        ledgers.append(ledger)
    return ledgers


def _noise(grove: Grove, lengths: torch.Tensor, streams: torch.Tensor, seed: int) -> Noise:
    """The keys of the live rows at the first generated position."""
    device = lengths.device
    prompts, branches = torch.tensor(grove.rows, device=device).unbind(1)
    noise = Noise.of(len(prompts), seed=seed, row=streams.to(device)[prompts], branch=branches, device=device)
    return noise.at(lengths[prompts])


def _most_probable(scores: torch.Tensor, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens and their log-probabilities, `[B, count]`, the argmax first; −1 for masked ones."""
    best = scores.log_softmax(-1).topk(count, -1)
    # Of equal ones topk may have put another before the first.
    tokens = torch.where(best.indices == first, best.indices[:, :1], best.indices)
    masked = best.values[:, 1:] == -torch.inf
    return torch.cat([first, tokens[:, 1:].masked_fill(masked, -1)], 1), best.values


def _selected(model_kwargs: dict[str, Any], select: list[int], rows: int) -> dict[str, Any]:
    """The rows of a batch in another choice: the cache in place, every other tensor of the batch anew."""
    out = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
            out[name] = value.index_select(0, torch.tensor(select, device=value.device))
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        cache.reorder_cache(torch.tensor(select))  # each layer takes it to its own device
    return out


def _output(
    trees: list[ForkTree], texts: torch.Tensor, pad: torch.Tensor, ledgers: list[TokenLedger] | None
) -> ForkOutput:
    leaves = [(tree.prompt, branch) for tree in trees for branch in tree]
    longest = max(len(branch) for _, branch in leaves)
    generated = torch.full((len(leaves), longest), int(pad), dtype=torch.int64)
    for row, (_, branch) in enumerate(leaves):
        generated[row, : len(branch)] = torch.tensor(branch.along("tokens"))
    prompts = torch.tensor([prompt for prompt, _ in leaves])
    text = texts.index_select(0, prompts.to(texts.device))
    return ForkOutput(
        sequences=torch.cat([text, generated.to(text.device)], 1),
        prompts=prompts,
        log_weights=torch.tensor([branch.log_weight for _, branch in leaves], dtype=torch.float64),
        weights=torch.tensor([w for tree in trees for w in tree.weights()], dtype=torch.float64),
        trees=trees,
        ledgers=ledgers,
    )
