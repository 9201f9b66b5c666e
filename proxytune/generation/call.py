"""One call of a loop by `generate()`: what every loop sets up before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from proxytune import ops
from proxytune.generation.batch import is_synced, lengths_of, padding_of
from proxytune.generation.call_log import CallLog, log_on
from proxytune.generation.modes import refuse_modes
from proxytune.generation.processor_plan import ProcessorPlan, plan_processors
from proxytune.generation.sampler import DrawSettings
from proxytune.generation.seeds import StreamIds, keys_of, seed_of
from proxytune.models.ensemble import Ensemble
from proxytune.models.foreign_processors import DRAFTS, processors_of_call
from proxytune.models.learned_prompts import refuse_unfound_cache
from proxytune.models.members.long_rope import read_whole, refuse_unread
from proxytune.models.members.own_cache import refuse_reordering
from proxytune.models.members.whole_text import reads_whole_text
from proxytune.models.own_prompts import PROMPTS
from proxytune.models.vision import refuse_images
from proxytune.ops.noise import Noise

__all__ = ["Call"]


@dataclass(eq=False)
class Call:
    """The arguments of one call, checked and prepared.

    Attributes:
        model: The composed model, or a plain causal LM.
        ensemble: Its members and weights.
        input_ids: `[B, T]`, int64.
        config: The generation config.
        kwargs: Keyword arguments of the forward passes; the cache among them.
        criteria: The stopping criteria.
        processors: The logits processors, as this call runs them.
        plan: Which of them run, and which became settings of the draw.
        lengths: `[B]`, int64: tokens per row, padding not counted.
        keys: The noise keys of each row, except for the seed.
        streamer: Gets each step's tokens.
        synced: Whether this process goes on until all others have finished.
        log: Takes the loop's decisions, if the call is recorded and the loop `logs`.
    """

    model: Any
    ensemble: Ensemble
    input_ids: torch.Tensor
    config: Any
    kwargs: dict[str, Any]
    criteria: StoppingCriteriaList
    processors: LogitsProcessorList
    plan: ProcessorPlan
    lengths: torch.Tensor
    keys: Noise
    streamer: BaseStreamer | None
    synced: bool
    given_seed: int | None
    owns_streamer: bool
    log: CallLog | None

    @classmethod
    def begin(
        cls,
        loop: str,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *,
        seed: int | None = None,
        stream_ids: StreamIds = None,
        branch_ids: StreamIds = None,
        streamer: BaseStreamer | None = None,
        own_streamer: BaseStreamer | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        beams: bool = False,
        drafts: bool = False,
        images: bool = False,
        logs: bool = False,
    ) -> Call:
        """Prepare a call, and refuse what the loop cannot do.

        Takes what `generate()` passes to a loop and the loop's own settings; `loop` is its name, for messages.
        `own_streamer` is used where `generate()` passes none, as on a plain model; `synced_gpus=None` means to find
        out; `beams` says that the loop supports beam search, `drafts` that processors see texts that are not final,
        `images` that every pass is over the prompts' own rows, as where they hold images it has to be; `logs` that the
        loop adds its decisions to the log.

        Raises:
            UnsupportedModeError: For modes that the loop does not support.
            InputError: If stream or branch ids do not fit the batch.
        """
        refuse_modes(loop, model, generation_config, assistant_model, beams=beams)
        if not images:
            refuse_images(loop, model_kwargs)
        if not drafts:  # those refuse every learned prompt
            refuse_unfound_cache(model, model_kwargs.get("use_cache"))
        batch, width = input_ids.shape
        ensemble = Ensemble.of(model)
        read_whole(ensemble.switches, generation_config, model_kwargs, width)
        if (generation_config.num_beams or 1) > 1 and not ensemble.composed:
            refuse_reordering("beams", model, model_kwargs.get("use_cache"))
        plain = not ensemble.composed and reads_whole_text(model) is None
        if generation_config.prefill_chunk_size is not None and plain:
            for member in ensemble.members:
                member.read_rightly(generation_config, model_kwargs.get("attention_mask"))
        processors = processors_of_call(logits_processor, generation_config, width, DRAFTS if drafts else None)
        steered = any(getattr(p, "shifts_logits", False) for p in processors)
        log = log_on(model) if logs and not steered else None
        if log is not None:
            log.by_loop = True
        keys = keys_of(stream_ids, branch_ids, batch)
        lengths = lengths_of(batch, width, input_ids.device, generation_config, model_kwargs)
        if not ensemble.composed and generation_config.use_cache:
            most_new = int(stopping_criteria.max_length) - width
            refuse_unread(loop, model, ensemble.switches, lengths, width, most_new)
        return cls(
            model=model,
            ensemble=ensemble,
            input_ids=input_ids,
            config=generation_config,
            kwargs=model_kwargs,
            criteria=stopping_criteria,
            processors=processors,
            plan=plan_processors(processors, bool(generation_config.do_sample)),
            lengths=lengths,
            keys=keys,
            streamer=own_streamer if streamer is None else streamer,
            synced=is_synced(model) if synced_gpus is None else synced_gpus,
            given_seed=seed,
            owns_streamer=streamer is None and own_streamer is not None,
            log=log,
        )

    @cached_property
    def pads(self) -> torch.Tensor | None:
        """The padding token for finished rows; None if such rows go on (see `padding_of`)."""
        return padding_of(self.criteria, self.config, self.input_ids.device)

    @cached_property
    def seed(self) -> int:
        """The seed; if none was given, a new one per call, drawn from torch's generator at first use."""
        return seed_of(self.given_seed)

    @property
    def most_new(self) -> int:
        """The maximum number of new tokens per row."""
        return int(self.criteria.max_length) - self.input_ids.shape[1]

    def start_stream(self) -> None:
        """Put the prompt to the loop's own streamer; one that `generate()` was given has it already."""
        if self.owns_streamer and self.streamer is not None:
            own = self.kwargs.get(PROMPTS)  # the longest of which may have padded the base's prompt
            self.streamer.put(self.input_ids[:, 0 if own is None else own.added :].cpu())

    def prefill(self, *, first: bool = True, everyone: bool = False) -> Any:
        """The prompt's forward pass; from here on every pass returns the members' own logits (`Ensemble.request`)."""
        self.start_stream()
        self.kwargs |= self.ensemble.request(everyone=everyone)
        return self.model._prefill(self.input_ids, self.config, self.kwargs, is_first_iteration=first)

    def draw_settings(
        self, base: torch.Tensor, impl: ops.Impl, *, noise: Noise | None = None, **more: Any
    ) -> DrawSettings:
        """The settings that all draws share, once the width and device of the logits are known.

        `base` are the base's logits, `[B, …, V]`; `noise` are the keys at the next position, by default those of the
        call; `more` are further settings of `SamplingParams.of`.
        """
        width, plan = base.shape[-1], self.plan
        usable = min(self.ensemble.usable(width), width if plan.usable is None else plan.usable)
        # Processors were made for the ids' device, and expect all V columns.
        place = self.input_ids.device if plan.before else base.device
        if not plan.do_sample:
            return DrawSettings(plan, None, None, width, usable, place, impl)
        if noise is None:
            rows = len(self.lengths)
            noise = Noise.of(rows, seed=self.seed, row=self.keys.row, branch=self.keys.branch, device=place)
            noise = noise.at(self.lengths.to(place, copy=True))
        noise = Noise(*(x.to(place) for x in (noise.seed, noise.row, noise.position, noise.branch)))
        sampling = plan.sampling(len(noise.position), width if plan.before else usable, place, **more)
        return DrawSettings(plan, sampling, noise, width, usable, place, impl)
