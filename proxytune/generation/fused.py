"""The fused loop: greedy decoding and sampling in which one step on the members' logits does all that can be fused.

A decode step reads top to bottom in `FusedDecoding.__call__`: forward → members' rows → one `ops.step` → tokens.
Prefill, caches, masks and stopping criteria are transformers' own, through the hooks of `generate()`; nothing here
knows how members run or how their logits are combined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import ALL_CACHE_NAMES

from proxytune import ops
from proxytune.errors import InputError
from proxytune.generation.batch import is_synced, last_logits, lengths_of, padding_of, usable_columns
from proxytune.generation.modes import refuse_modes
from proxytune.generation.processor_plan import ProcessorPlan, plan_processors
from proxytune.generation.recorder import OutputRecorder
from proxytune.generation.sampler import Sampler
from proxytune.generation.seeds import StreamIds, keys_of, seed_of
from proxytune.models.model import ProxyTunedModel
from proxytune.ops.noise import Noise
from proxytune.validation import refuse_seed

__all__ = ["FusedDecoding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class FusedDecoding:
    """A loop for `model.generate(..., custom_generate=FusedDecoding(seed=0))`, for composed and for plain causal LMs.

    The tokens are those of transformers' own loop in greedy decoding, and of the same law in sampling (where tokens tie
    at the end of top-p, all are kept; transformers keeps an arbitrary part of them). Temperature,
    top-k, top-p and min-p at the end of the list of processors become part of the step; what stands before them runs
    as it is, on the combined logits. Per step, the host waits for the device once: for whether to stop.

    A draw depends on (seed, row, position) alone: neither on padding nor on the batch around the row. `row` is the
    number of the row in the batch, with `num_return_sequences` counted in; `position` the number of tokens before the
    one that is drawn, not counting padding.

    On a plain model transformers hands a callable neither `streamer=`, `tokenizer=` nor `assistant_model=` of
    `generate()`: give the streamer here, stop strings as a `StopStringCriteria`; an assistant is ignored, which is a
    matter of speed only. `generate_batch` and `cache_implementation="paged"` never call it. A composed model hands
    them over, and refuses what cannot be.

    Attributes:
        seed: The key of all draws; None for another one in each call, from torch's default generator.
        impl: "triton", "torch", or "auto" for Triton where it runs.
        stream_ids: `[B]`, int64, or a list: which stream of the seed each row draws from [0, 1, 2, …]. With it, a row
            of a batch can be drawn again alone.
        branch_ids: `[B]`, int64, or a list, in [0, 2³⁰): which of several continuations of its stream each row is
            [0, 0, 0, …].
        streamer: A streamer for plain models; it gets the prompt too.

    Raises:
        InputError: If a setting is out of its range.
    """

    seed: int | None = None
    impl: ops.Impl = "auto"
    stream_ids: StreamIds = None
    branch_ids: StreamIds = None
    streamer: BaseStreamer | None = None

    def __post_init__(self) -> None:
        refuse_seed(self.seed, "FusedDecoding")
        if self.impl not in get_args(ops.Impl):
            raise InputError.of(
                "impl",
                expected="'auto', 'triton' or 'torch'",
                got=repr(self.impl),
                remedy="Leave it out for 'auto'.",
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
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Decode; `generate()` calls this with what it has prepared.

        Args:
            model: The composed model, or a plain causal LM.
            input_ids: `[B, T]`, int64, expanded by `num_return_sequences`.
            logits_processor: The processors, the user's among them.
            stopping_criteria: The criteria.
            generation_config: The settings.
            synced_gpus: Whether to go on until the other processes have finished; None to find out.
            streamer: Gets each step's tokens `[B]`.
            tokenizer: The stop strings' criterion has taken it.
            assistant_model: Refused.
            **model_kwargs: What the forward passes need; the cache among them.

        Returns:
            `[B, T + new]`, int64; with `return_dict_in_generate` the same output as that of transformers' loop.

        Raises:
            UnsupportedModeError: For encoder-decoders and for every mode but greedy decoding and sampling.
            InputError: If `stream_ids` or `branch_ids` do not fit the batch, or there is an EOS but no padding token.
            NumericalError: If an unfinished row has no distribution, with the row and the step.
        """
        refuse_modes("FusedDecoding", model, generation_config, assistant_model)
        batch = input_ids.shape[0]
        keys = keys_of(self.stream_ids, self.branch_ids, batch)
        pads = padding_of(stopping_criteria, generation_config, input_ids.device)
        synced = is_synced(model) if synced_gpus is None else synced_gpus
        streamer = self._streamer(streamer, input_ids)
        composed = isinstance(model, ProxyTunedModel)
        if composed:
            model_kwargs["combine"] = False
        record = OutputRecorder(generation_config)
        position = lengths_of(batch, input_ids.shape[1], input_ids.device, generation_config, model_kwargs)  # [B]
        translation = plan_processors(logits_processor, bool(generation_config.do_sample))
        forward = (
            model.get_compiled_call(generation_config.compile_config)
            if model._valid_auto_compile_criteria(model_kwargs, generation_config)
            else model
        )

        drawing: Sampler | None = None
        unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        finished, step = False, 0
        first = not generation_config.is_assistant
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=first)
        with model._optimize_model_for_decode():
            while model._has_unfinished_sequences(finished, synced, device=input_ids.device):
                if outputs is None:
                    new = 1 if model_kwargs["use_cache"] else None
                    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
                    outputs = forward(**inputs, return_dict=True)
                model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
                if synced and finished:
                    outputs = None
                    continue
                members, weights = last_logits(model, outputs)  # [B, V_i] each
                record.add(outputs)
                outputs = None  # the logits of a whole prompt may hang on it

                if drawing is None:  # only now are the rows' width and device known
                    drawing = self._prepare(model, translation, members[0], position, keys)
                found, rows = drawing(members, weights, input_ids, record)
                assert found.tokens is not None
                tokens = found.tokens[:, 0].to(input_ids.device)  # [B]
                bad = (tokens < 0) & unfinished
                tokens = tokens.clamp(min=0)  # in a row that is finished it does not matter, but it is embedded
                if pads is not None:
                    tokens = torch.where(unfinished, tokens, pads)
                input_ids = torch.cat([input_ids, tokens[:, None]], -1)
                unfinished = unfinished & ~stopping_criteria(input_ids, record.scores)
                # The one place where the host waits for the device.
                going, failed = torch.stack((unfinished.any(), bad.any())).tolist()
                if failed:
                    raise drawing.failure(rows, bad, step)
                del members, rows
                if streamer is not None:
                    streamer.put(tokens.cpu())
                finished, step = not going, step + 1

        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        cache = next((model_kwargs[name] for name in ALL_CACHE_NAMES if name in model_kwargs), None)
        return record.output(input_ids, cache)

    def _prepare(
        self,
        model: Any,
        translation: ProcessorPlan,
        base: torch.Tensor,
        position: torch.Tensor,
        keys: Noise,
    ) -> Sampler:
        batch, width = base.shape
        usable = usable_columns(model, translation, width)
        # Processors were made for the device of the ids, and expect all V columns.
        place = position.device if translation.before else base.device
        sampling = noise = None
        if translation.do_sample:
            sampling = translation.sampling(batch, width if translation.before else usable, place)
            keys = Noise.of(batch, seed=seed_of(self.seed), row=keys.row, branch=keys.branch, device=place)
            noise = keys.at(position.to(place))
        return Sampler(translation, sampling, noise, width=width, usable=usable, place=place, impl=self.impl)

    def _streamer(self, given: BaseStreamer | None, input_ids: torch.Tensor) -> BaseStreamer | None:
        if given is None and self.streamer is not None:
            self.streamer.put(input_ids.cpu())  # to its own, generate() has given it
        return self.streamer if given is None else given
