"""Lossless speculation: a draft proposes tokens, one pass of the target verifies all of them.

A round is propose → verify → commit. When it starts, each row's last token is in its text, but in no cache yet.

- *propose* (`drafts`, `model_drafts`, `lookup_drafts`): the draft runs ahead by K tokens.
- *verify* (`target`, `verifier`; the arithmetic is `ops.verify`): the target reads the last token and the K draft
tokens
  in one pass. Draft tokens are accepted from the left; after a rejection a recovered token is drawn from the residual,
  after a whole draft a bonus token from the target.
- *commit* (`progress`, `ragged_text`, `ragged_cache`): the accepted tokens and the one after them join the texts; the
  caches drop what was rejected.
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
from proxytune.methods.speculation.ragged_cache import ahead, forget, in_place, make_room, refuse_cache
from proxytune.methods.speculation.round import Commit, Proposal, RoundResult
from proxytune.methods.speculation.round_log import add_round
from proxytune.methods.speculation.target import TargetModel
from proxytune.methods.speculation.verifier import Accept, DraftVerifier
from proxytune.models.members.cache_name import cache_of
from proxytune.models.members.rewind import made_rewindable
from proxytune.validation import named_settings

__all__ = ["SpeculativeDecoding"]


@named_settings
@dataclass(frozen=True, eq=False, kw_only=True)
class SpeculativeDecoding:
    """Lossless speculative decoding: `model.generate(..., custom_generate=SpeculativeDecoding(seed=0))`.

    Whatever the draft proposes, greedy tokens are those of plain greedy decoding, and samples have the distribution of
    plain sampling; a bad draft only costs time. (As with another batch size, rounding of a pass over several tokens may
    decide between two tokens of nearly equal score in low precision.)

    By default the expert of a composed model drafts, on the composite's own cache. It has to run anyway, so a round of
    k draft tokens costs k passes of the expert (one more if all k are accepted) and one of the base and of the
    antiexpert. Rows accept different numbers of tokens, and advance independently.

    Attributes:
        draft: "expert", or a `Draft`: `ModelDraft(model)`, `PromptLookupDraft()`, `BigramDraft.of(model.base)`.
        draft_tokens: Tokens to draft per round; "auto" for the fastest length given `costs` and the acceptance so far
            (`proxytune.costs.speculation.best_draft_length`).
        accept: How sampled drafts are accepted. "rejection" accepts most: x with probability min(1, p(x) / q(x)), else
            a token from the residual relu(p − q). With "coupled", draft and target draw with the same noise, and a
            draft token is accepted if both drew it. Then the tokens are those of `FusedDecoding(seed=…)` whatever the
            draft and its length (drafter-invariant speculation, Daliri et al. 2024, arXiv 2408.07978), but fewer are
            accepted: at least (1 − TV) / (1 + TV) instead of 1 − TV.
        seed: The key of all draws; None draws one per call from torch's default generator. With "rejection" a text also
            depends on the draft lengths, so only a fixed `draft_tokens` gives a row the same text in another batch.
        costs: What a round takes; None for typical figures of the kind of device (`proxytune.costs.devices`).
        impl: "triton", "torch", or "auto" for Triton where it runs.
        stream_ids: As for `FusedDecoding`.
        branch_ids: As for `FusedDecoding`.
        streamer: A transformers streamer, for one row; it gets the prompt too.

    Raises:
        InputError: If a setting is out of range.
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

    logs = True
    """This loop writes its decisions to a recording (`proxytune.record`)."""

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
            logits_processor: All processors. As in assisted decoding they see texts that are not final: drafts that
                will be rejected, and padding after rows that are shorter than others.
            stopping_criteria: Called once per token that may be kept, without scores.
            generation_config: The settings.
            synced_gpus: Refused.
            streamer: Gets the tokens one by one; for one row.
            tokenizer: Unused: the stop strings' criterion has it already.
            assistant_model: The composed model's expert, or None.
            **model_kwargs: Inputs of the forward passes, the cache among them.

        Returns:
            `[B, T + new]`, int64; with `return_dict_in_generate` a `SpeculativeOutput`, whose cache is None for several
            rows (they differ in length).

        Raises:
            UnsupportedModeError: For encoder-decoders, modes other than greedy decoding and sampling, and processors
                that count their calls (`guidance_scale`, SynthID watermarks).
            InputError: If the draft does not fit the model, or there is an EOS but no padding token.
            CacheError: If rejected drafts cannot be removed from the cache.
            UnsupportedModelError: If a plain model has layers other than attention.
            NumericalError: If an unfinished row has no distribution; names the row and the step.
        """
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
            synced_gpus=synced_gpus,
            drafts=True,
            logs=True,
        )
        refuse_call(call, self.draft, assistant_model)
        refuse_stateful(call.plan.before)
        pads = call.pads  # before the first pass: it may be refused
        draft = ExpertDraft() if isinstance(self.draft, str) else self.draft
        costs = draft.costs(model, len(input_ids)) if self.costs is None else self.costs
        length = DraftLength(costs, None if isinstance(self.draft_tokens, str) else self.draft_tokens, len(input_ids))
        make_room(call)
        outputs = call.prefill(everyone=True)
        cache = cache_of(outputs)
        refuse_cache(cache)
        logits = [z[:, None] for z in call.ensemble.last_logits(outputs) if z is not None]  # [B, 1, V_i]
        del outputs  # it may hold the logits of the whole prompt

        settings = call.draw_settings(logits[0], self.impl)
        recorder = SpeculativeRecorder(generation_config, len(input_ids))
        # A plain model's layers; a composed one's can go back.
        mask = call.kwargs.get("attention_mask")
        with (
            made_rewindable(cache.layers, input_ids.shape[1]),
            ahead(cache),
            in_place(cache, call.ensemble, mask, len(input_ids)),
        ):
            rows = RowProgress(call, cache, pads)
            run = _Rounds(
                call=call,
                rows=rows,
                drafter=draft.begin(DraftContext(model, cache, input_ids, mask, settings.usable)),
                length=length,
                target=TargetModel(call.ensemble, cache, call.kwargs.get("adapter_names")),
                verifier=DraftVerifier(settings, self.accept, recorder.wanted),
                recorder=recorder,
            )
            proposal = Proposal.none(input_ids)  # the prompt's logits give the first token
            run.commit(run.verify(proposal, logits))
            while not rows.finished:
                del proposal, logits  # frees their memory before the next ones are allocated
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
    """The steps of a round, and the state they share."""

    call: Call
    rows: RowProgress
    drafter: Drafter
    length: DraftLength
    target: TargetModel
    verifier: DraftVerifier
    recorder: SpeculativeRecorder
    shown: list[torch.Tensor] | None = None
    """The members' logits of the round, `[B, K + 1, V_i]`, if the call is recorded."""

    def propose(self) -> Proposal:
        """Draft the fastest number of tokens that every row and every context has room for."""
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
        weigh = self.call.ensemble.weigh
        # A drafting member has not read its own last draft token, so the bonus token drawn now is provisional.
        placeholder = self.drafter.role is not None and proposal.length > 0
        verification = self.verifier.verify(logits, weigh, proposal, self.rows)
        result = self.rows.inspect(verification, proposal, bonus=not placeholder)
        if self.rows.accepted_whole(result):
            last = self.drafter.read_last(self.rows)  # only now: after a rejection these logits are not needed
            if placeholder and last is not None:
                logits = self.target.with_last(logits, self.drafter, last)
                verification = self.verifier.verify(logits, weigh, proposal, self.rows)
                result = self.rows.inspect(verification, proposal, earlier=result)
        self.shown = logits if self.call.log is not None else None
        return result

    def commit(self, result: RoundResult) -> None:
        """Append each row's new tokens to its text and to the record, and realign the caches."""
        commit = self.rows.commit(result)
        self.recorder.add(result.verification, commit, self.rows.texts.pad)
        if self.call.log is not None and self.shown is not None:
            add_round(self.call.log, self.call.ensemble, self.shown, result, commit, self.verifier.usable)
            self.shown = None
        self.length.learn(sum(commit.accepted), sum(commit.rejected))
        self._stream(commit)
        if self.target.added:  # 0 after the prompt, which the caches hold already
            going = self.rows.going
            if not self.rows.finished:
                self.rows.columns.settle(self.target.caches(self.drafter), commit.kept, going)
            elif len(going) == 1:  # the caller gets the cache: it must match the sequence
                self.rows.columns.settle(self.target.caches(self.drafter), [max(commit.kept[0], 1)], [True])

    def _stream(self, commit: Commit) -> None:
        if self.call.streamer is not None:
            texts, start = self.rows.texts, self.rows.texts.prompts.shape[1] + commit.start[0]
            for token in texts.upto(texts.counts[0])[0, start:].cpu():
                self.call.streamer.put(token[None])

    def close(self, cache: Any) -> None:
        """End the stream, and empty a cache whose rows do not match the sequences."""
        if self.call.streamer is not None:
            self.call.streamer.end()
        if len(self.rows.going) > 1:
            forget(cache)
        elif not self.call.ensemble.composed:  # whose own passes cannot tell that its layers are behind
            self.call.ensemble.members[0].catch_up(cache, self.rows.columns.mask(0))
