"""Lossless speculation: a draft runs ahead, and one pass of the steered model decides about all of its tokens.

A round reads top to bottom in `SpeculativeDecoding.__call__`: settle what the last one left → draft → verify → what
stands. Rows accept different numbers of tokens and go on by themselves; `RaggedCache` keeps their caches in line,
`RaggedText` shows processors and stopping criteria the text as it would stand without speculation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from proxytune import ops
from proxytune.costs.speculation import DraftCosts
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.batch import is_synced, last_logits, lengths_of, padding_of, usable_columns
from proxytune.generation.modes import refuse_modes
from proxytune.generation.processor_plan import plan_processors
from proxytune.generation.processor_rules import refuse_stateful
from proxytune.generation.seeds import StreamIds, keys_of, seed_of
from proxytune.methods.speculation.draft_length import DraftLength
from proxytune.methods.speculation.drafts import Draft, DraftContext
from proxytune.methods.speculation.model_drafts import ExpertDraft
from proxytune.methods.speculation.output import SpeculativeOutput, SpeculativeRecorder
from proxytune.methods.speculation.progress import RowProgress
from proxytune.methods.speculation.ragged_cache import RaggedCache, ahead, forget, refuse_cache
from proxytune.methods.speculation.ragged_text import RaggedText
from proxytune.methods.speculation.target import TargetModel
from proxytune.methods.speculation.verifier import Accept, DraftVerifier
from proxytune.models.model import ProxyTunedModel
from proxytune.ops.noise import Noise
from proxytune.validation import refuse_seed, whole

__all__ = ["SpeculativeDecoding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SpeculativeDecoding:
    """A loop for `model.generate(..., custom_generate=SpeculativeDecoding(seed=0))`, with nothing lost.

    Greedy tokens are those of plain greedy decoding, and samples have the law of plain sampling, whatever the draft
    proposes; a bad draft is only slow. "Those of" up to the rounding of a forward pass over several tokens, which in
    low precision may decide between two tokens that are nearly equal, as another batch size may.

    By default the expert of a composed model drafts, on the composite's own cache: it has to run anyway, so a round of
    k drafted tokens costs k passes of it, one more if all k are accepted, and one of the base and of the antiexpert.
    Batches go on row by row.

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
        refuse_seed(self.seed, "SpeculativeDecoding")
        if self.draft != "expert" and not isinstance(self.draft, Draft):
            raise InputError.of(
                "draft",
                expected="'expert', or a draft such as ModelDraft(model), PromptLookupDraft() or BigramDraft.of(base)",
                got=repr(self.draft) if isinstance(self.draft, str) else f"a {type(self.draft).__name__}",
                remedy="Wrap a model: draft=ModelDraft(model).",
            )
        if self.costs is not None and not isinstance(self.costs, DraftCosts):
            raise InputError.of(
                "costs",
                expected="DraftCosts, or None for the figures of proxytune.costs.devices",
                got=f"a {type(self.costs).__name__}",
                remedy="Pass DraftCosts(round=…, draft=…), in any unit of time.",
            )
        if self.draft_tokens != "auto":
            whole("draft_tokens", self.draft_tokens, "of tokens, or 'auto'")
        for name, value, allowed in (("accept", self.accept, Accept), ("impl", self.impl, ops.Impl)):
            if value not in get_args(allowed):
                raise InputError.of(
                    name,
                    expected=" or ".join(map(repr, get_args(allowed))),
                    got=repr(value),
                    remedy="Leave it out for the default.",
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
            stopping_criteria: The criteria. They are asked at every token, and get no scores.
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
        self._refuse(model, generation_config, synced_gpus, assistant_model, model_kwargs)
        batch, width = input_ids.shape
        draft = ExpertDraft() if isinstance(self.draft, str) else self.draft
        fixed = None if isinstance(self.draft_tokens, str) else self.draft_tokens
        length = DraftLength(draft.costs(model, batch) if self.costs is None else self.costs, fixed, batch)
        pads = padding_of(stopping_criteria, generation_config, input_ids.device)
        pad = 0 if pads is None else int(pads)
        streamer = self._streamer(streamer, input_ids)
        lengths = lengths_of(batch, width, input_ids.device, generation_config, model_kwargs)
        translation = plan_processors(logits_processor, bool(generation_config.do_sample))
        refuse_stateful(translation.before)
        keys = keys_of(self.stream_ids, self.branch_ids, batch)
        if isinstance(model, ProxyTunedModel):
            model_kwargs["combine"] = False
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        cache = outputs.past_key_values
        refuse_cache(cache)
        mask = model_kwargs.get("attention_mask")
        given = model_kwargs.get("position_ids")
        following = lengths if given is None else (given[:, -1] + 1).expand(batch)
        columns = RaggedCache(following, int(cache.get_seq_length()), mask)
        last, weights = last_logits(model, outputs)
        members = [z[:, None] for z in last]  # [B, 1, V_i]
        del outputs, last  # the logits of a whole prompt may hang on it

        noted = SpeculativeRecorder(generation_config, batch)
        usable = usable_columns(model, translation, members[0].shape[2])
        place = input_ids.device if translation.before else members[0].device
        sampling = noise = None
        if translation.do_sample:
            sampling = translation.sampling(batch, members[0].shape[2] if translation.before else usable, place)
            noise = Noise.of(batch, seed=seed_of(self.seed), row=keys.row, branch=keys.branch, device=place)
            noise = noise.at(lengths.to(place))
        judge = DraftVerifier(
            translation,
            sampling,
            noise,
            width=members[0].shape[2],
            usable=usable,
            place=place,
            impl=self.impl,
            accept=self.accept,
            record=noted.wanted,
        )
        most = int(stopping_criteria.max_length) - width
        texts = RaggedText(input_ids, most, pad)
        verifying = TargetModel(model, cache)
        with ahead(cache):
            drafter = draft.begin(DraftContext(model, cache, input_ids, mask, usable))
            rows = RowProgress(texts, stopping_criteria, most=most, fills_up=pads is not None)
            drafted, drawn_from, new = input_ids[:, :0], None, 0
            while True:
                whole = drafter.role is None or not drafted.shape[1]  # a member that drafts has not read its last token
                ruling = judge.verdict(members, weights, drafted, drawn_from, texts, rows.going)
                reading = rows.read(ruling, drafted, last=whole)
                # The host waits for the device here, and again below if a row came through. A draft that was rejected
                # before its end needs no pass over its last token, which a large draft takes long for.
                behind = drafter.finish(columns) if rows.through(reading) else None
                if behind is not None and drafter.role is not None:
                    members = verifying.finished(members, drafter, behind)
                    ruling = judge.verdict(members, weights, drafted, drawn_from, texts, rows.going)
                    reading = rows.read(ruling, drafted, before=reading)
                del members, drawn_from
                before = texts.counts
                decided, accepted = rows.take(reading)
                taken = noted.count(decided, accepted)
                length.learn(*taken)
                got = [after - n for after, n in zip(texts.counts, before, strict=True)]
                noted.keep(ruling, before, got, pad)
                if streamer is not None:
                    for token in texts.upto(texts.counts[0])[0, width + before[0] :].cpu():
                        streamer.put(token[None])
                if rows.finished:
                    break
                if new:
                    columns.settle(verifying.caches(drafter, new), got, rows.going)
                count = length.choose(min(rows.room, verifying.room(columns.width), drafter.room(columns.width)))
                noted.lengths.append(count)
                token = texts.last()
                if count:
                    drafted, drawn_from = drafter.propose(
                        count, token, texts, columns, lambda z, d: judge.draw(z, d, texts, rows.going)
                    )
                    drafted = rows.within(drafted)
                else:
                    drafted, drawn_from = token[:, :0], None
                new = drafted.shape[1] + 1
                if new == 1:
                    drafter.undrafted(token, columns)
                ids = torch.cat([token, drafted.clamp(min=0)], 1)
                members = verifying(ids, columns, drafter)  # [B, K + 1, V_i]
            if streamer is not None:
                streamer.end()
            sequences = texts.upto(rows.steps)
            if batch == 1 and new:
                columns.settle(verifying.caches(drafter, new), [max(got[0], 1)], [True])
            if batch > 1:
                forget(cache)
        if not generation_config.return_dict_in_generate:
            return sequences
        return noted.output(sequences, rows.steps, cache if batch == 1 else None)

    def _streamer(self, given: BaseStreamer | None, input_ids: torch.Tensor) -> BaseStreamer | None:
        if given is None and self.streamer is not None:
            self.streamer.put(input_ids.cpu())  # to its own, generate() has given it
        streamer = self.streamer if given is None else given
        if streamer is not None and input_ids.shape[0] > 1:
            raise UnsupportedModeError.of(
                "streamer",
                expected="one row: several go on by themselves, and have no step in common",
                got=f"{input_ids.shape[0]} rows",
                remedy="Stream one prompt at a time.",
            )
        return streamer

    def _refuse(
        self,
        model: Any,
        generation_config: Any,
        synced_gpus: bool | None,
        assistant_model: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        if assistant_model is not None and (
            assistant_model is not getattr(model, "expert", None) or not isinstance(self.draft, str)
        ):
            raise InputError.of(
                "assistant_model",
                expected="none beside SpeculativeDecoding, which has a draft of its own",
                got=f"a {type(assistant_model).__name__}",
                remedy="Pass SpeculativeDecoding(draft=ModelDraft(model)).",
            )
        refuse_modes("SpeculativeDecoding", model, generation_config, None)
        known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}
        others = [name for name, value in model_kwargs.items() if name not in known and value is not None]
        refused = {
            "synced_gpus": is_synced(model) if synced_gpus is None else synced_gpus,
            "output_attentions": generation_config.output_attentions,
            "output_hidden_states": generation_config.output_hidden_states,
            others[0] if others else "model_kwargs": bool(others),
        }
        for what, given in refused.items():
            if given:
                raise UnsupportedModeError.of(
                    what,
                    expected="none with SpeculativeDecoding: passes are over drafts, and rows differ in length",
                    got="one",
                    remedy="Leave it out, or decode without speculation.",
                )
        if not model_kwargs.get("use_cache"):
            refuse_cache(None)
