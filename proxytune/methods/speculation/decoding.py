"""Lossless speculation: a draft proposes tokens, one pass of the steered model verifies all of them.

A round is propose → verify → commit. It starts from the rows' texts, whose last tokens no cache has read yet:

- *propose*: the draft runs ahead by K tokens.
- *verify*: the target reads the last token and the K draft tokens in one pass. Draft tokens are accepted from the left;
  after a rejection a recovered token is drawn from the residual, after a whole draft a bonus token from the target.
- *commit*: the accepted tokens and the one after them join the texts; the caches drop what was rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from proxytune import ops
from proxytune.costs.speculation import DraftCosts
from proxytune.generation.call import Call
from proxytune.generation.processor_rules import refuse_stateful
from proxytune.generation.seeds import StreamIds
from proxytune.methods.speculation.checks import refuse_call, refuse_settings
from proxytune.methods.speculation.draft_length import DraftLength
from proxytune.methods.speculation.drafts import Draft, DraftContext, Drafter
from proxytune.methods.speculation.model_drafts import ExpertDraft
from proxytune.methods.speculation.output import SpeculativeOutput, SpeculativeRecorder
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_cache import ahead, forget, refuse_cache
from proxytune.methods.speculation.round import Commit, Proposal, RoundResult
from proxytune.methods.speculation.target import TargetModel
from proxytune.methods.speculation.verifier import Accept, DraftVerifier

__all__ = ["SpeculativeDecoding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SpeculativeDecoding:
    """A loop for `model.generate(..., custom_generate=SpeculativeDecoding(seed=0))`, with nothing lost.

    Greedy tokens are those of plain greedy decoding, and samples have the distribution of plain sampling, whatever the
    draft proposes; a bad draft is only slow. (Up to the rounding of a forward pass over several tokens, which in low
    precision may decide between two tokens that are nearly equal, as another batch size may.)

    By default the expert of a composed model drafts, on the composite's own cache: it has to run anyway, so a round of
    k draft tokens costs k passes of it, one more if all k are accepted, and one of the base and of the antiexpert.
    Rows accept different numbers of tokens and go on by themselves.

    Attributes:
        draft: "expert", or a `Draft`: `ModelDraft(model)`, `PromptLookupDraft()`, `BigramDraft.of(model.base)`.
        draft_tokens: How many tokens to draft in each round; "auto" for what `costs` and the acceptance so far say is
            fastest (`proxytune.costs.speculation.best_draft_length`).
        accept: Where tokens are sampled: "rejection" accepts most (p(x) / q(x), then the residual relu(p − q)); with
            "coupled" draft and model draw with the same noise, and a draft is accepted if they drew the same token.
            Then tokens are those of `FusedDecoding(seed=…)`, whatever the draft and its length (drafter-invariant
            speculation, Daliri et al. 2024, arXiv 2408.07978); fewer are accepted: at least (1 − TV) / (1 + TV) in
            place of 1 − TV.
        seed: The key of all draws; None for another one in each call, from torch's default generator. With "rejection"
            a text depends on the draft lengths too, so only a fixed `draft_tokens` gives a row the same text in another
            batch.
        costs: What a round takes; None for round figures of the kind of device (`proxytune.costs.devices`).
        impl: "triton", "torch", or "auto" for Triton where it runs.
        stream_ids: As for `FusedDecoding`.
        branch_ids: As for `FusedDecoding`.
        streamer: A streamer for plain models, for one row; it gets the prompt too.

    Raises:
        InputError: If a setting is out of its range.
    """

    draft: Draft | Literal["expert"] = "expert"
    draft_tokens: int | Literal["auto"] = "auto"
    accept: Accept = "rejection"
    seed: int | None = None
    costs: DraftCosts | None = None
    impl: ops.Impl = "auto"
    stream_ids: StreamIds = None
    branch_ids: StreamIds = None
    streamer: BaseStreamer | None = None

    def __post_init__(self) -> None:
        refuse_settings(
            draft=self.draft,
            draft_tokens=self.draft_tokens,
            accept=self.accept,
            costs=self.costs,
            seed=self.seed,
            impl=self.impl,
        )

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        assistant_model: Any = None,
        **model_kwargs: Any,
    ) -> SpeculativeOutput | torch.Tensor:
        """Decode; `generate()` calls this with what it has prepared.

        Args:
            model: The composed model, or a plain causal LM.
            input_ids: `[B, T]`, int64, expanded by `num_return_sequences`.
            logits_processor: The processors, the user's among them. They have to take any text, as in assisted
                decoding: drafts that will be rejected, and padding behind rows that have not come as far as others.
            stopping_criteria: The criteria. They are asked once about each token that may be kept, and get no scores.
            generation_config: The settings.
            synced_gpus: Refused.
            streamer: Gets the tokens one by one; for one row.
            tokenizer: The stop strings' criterion has taken it.
            assistant_model: The composed model's expert, or none.
            **model_kwargs: What the forward passes need; the cache among them.

        Returns:
            `[B, T + new]`, int64; with `return_dict_in_generate` a `SpeculativeOutput`. Its cache is None for several
            rows, which have come differently far.

        Raises:
            UnsupportedModeError: For encoder-decoders, for every mode but greedy decoding and sampling, and for
                processors that count their calls (`guidance_scale`, SynthID watermarks).
            InputError: If the draft does not fit, or there is an EOS but no padding token.
            CacheError: If rejected drafts cannot be taken out of the cache.
            NumericalError: If an unfinished row has no distribution, with the row and the step.
        """
        streams = streamer is not None or self.streamer is not None
        refuse_call(
            model,
            input_ids,
            generation_config,
            synced_gpus,
            model_kwargs,
            draft=self.draft,
            streams=streams,
            assistant_model=assistant_model,
        )
        call = Call.begin(
            "SpeculativeDecoding",
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            seed=self.seed,
            stream_ids=self.stream_ids,
            branch_ids=self.branch_ids,
            streamer=streamer,
            own_streamer=self.streamer,
        )
        refuse_stateful(call.plan.before)
        draft = ExpertDraft() if isinstance(self.draft, str) else self.draft
        costs = draft.costs(model, len(input_ids)) if self.costs is None else self.costs
        length = DraftLength(costs, None if isinstance(self.draft_tokens, str) else self.draft_tokens, len(input_ids))
        outputs = call.prefill()
        cache = outputs.past_key_values
        refuse_cache(cache)
        logits = [z[:, None] for z in call.ensemble.last_logits(outputs)]  # [B, 1, V_i]
        del outputs  # the logits of a whole prompt may hang on it

        settings = call.draw_settings(logits[0], self.impl)
        recorder = SpeculativeRecorder(generation_config, len(input_ids))
        rows = RowProgress(call, cache)
        with ahead(cache):
            mask = call.kwargs.get("attention_mask")
            run = _Rounds(
                call=call,
                rows=rows,
                drafter=draft.begin(DraftContext(model, cache, input_ids, mask, settings.usable)),
                length=length,
                target=TargetModel(call.ensemble, cache),
                verifier=DraftVerifier(settings, self.accept, recorder.wanted),
                recorder=recorder,
            )
            proposal = Proposal.none(input_ids)  # the prompt's own logits give the first token
            run.commit(run.verify(proposal, logits))
            while not rows.finished:
                del proposal, logits  # they take as much memory as the next ones
                proposal = run.propose()
                logits = run.target(proposal, rows, run.drafter)  # [B, K + 1, V_i]
                run.commit(run.verify(proposal, logits))
            run.close(cache)
        sequences = rows.texts.upto(rows.steps)
        if not generation_config.return_dict_in_generate:
            return sequences
        return recorder.output(sequences, rows.steps, cache if len(input_ids) == 1 else None)


@dataclass(eq=False)
class _Rounds:
    """The three steps of a round, and what they work on."""

    call: Call
    rows: RowProgress
    drafter: Drafter
    length: DraftLength
    target: TargetModel
    verifier: DraftVerifier
    recorder: SpeculativeRecorder

    def propose(self) -> Proposal:
        """Draft as many tokens as is fastest, as far as every row and every context has room."""
        rows, width = self.rows, self.rows.columns.width
        count = self.length.choose(min(rows.room, self.target.room(width), self.drafter.room(width)))
        self.recorder.lengths.append(count)
        proposal = Proposal.none(self.call.input_ids)
        if count:
            proposal = rows.trim(self.drafter.propose(count, rows, partial(self.verifier.draw, rows=rows)))
        if not proposal.length:
            self.drafter.skip(rows)
        return proposal

    def verify(self, proposal: Proposal, logits: list[torch.Tensor]) -> RoundResult:
        """Accept or reject the draft tokens, and draw the token after them. Waits for the device."""
        weights = self.call.ensemble.weights
        # A member that drafts has not read its own last token: until it has, the bonus token is a placeholder.
        placeholder = self.drafter.role is not None and proposal.length > 0
        verification = self.verifier.verify(logits, weights, proposal, self.rows)
        result = self.rows.inspect(verification, proposal, bonus=not placeholder)
        if self.rows.accepted_whole(result):
            last = self.drafter.read_last(self.rows)  # only now: after a rejection nobody needs these logits
            if placeholder and last is not None:
                logits = self.target.with_last(logits, self.drafter, last)
                verification = self.verifier.verify(logits, weights, proposal, self.rows)
                result = self.rows.inspect(verification, proposal, earlier=result)
        return result

    def commit(self, result: RoundResult) -> None:
        """Add what was accepted, and the token after it, to texts and record; bring the caches in line with them."""
        commit = self.rows.commit(result)
        self.recorder.add(result.verification, commit, self.rows.texts.pad)
        self.length.learn(sum(commit.accepted), sum(commit.rejected))
        self._stream(commit)
        if self.target.added:  # none after the prompt, which is in the caches already
            going = self.rows.going
            if not self.rows.finished:
                self.rows.columns.settle(self.target.caches(self.drafter), commit.kept, going)
            elif len(going) == 1:  # the caller's cache: of the last round it holds what the sequence holds
                self.rows.columns.settle(self.target.caches(self.drafter), [max(commit.kept[0], 1)], [True])

    def _stream(self, commit: Commit) -> None:
        if self.call.streamer is not None:
            texts, start = self.rows.texts, self.rows.texts.prompts.shape[1] + commit.start[0]
            for token in texts.upto(texts.counts[0])[0, start:].cpu():
                self.call.streamer.put(token[None])

    def close(self, cache: Any) -> None:
        """End the stream, and empty a cache whose rows are not in line with the sequences."""
        if self.call.streamer is not None:
            self.call.streamer.end()
        if len(self.rows.going) > 1:
            forget(cache)
