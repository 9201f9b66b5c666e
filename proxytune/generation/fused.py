"""The fused loop: greedy decoding and sampling with one `ops.step` on the members' logits per token.

A decode step reads top to bottom in `FusedDecoding.__call__`: forward → members' rows → `ops.step` → tokens. Prefill,
caches, masks and stopping criteria are transformers' own, through the hooks of `generate()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import StaticCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import ALL_CACHE_NAMES

from proxytune import ops
from proxytune.errors import InputError
from proxytune.generation.call import Call
from proxytune.generation.recorder import OutputRecorder
from proxytune.generation.sampler import Sampler
from proxytune.generation.seeds import StreamIds
from proxytune.generation.stopping import Ends
from proxytune.models.members.cache_name import cache_of
from proxytune.validation import named_settings, refuse_seed

__all__ = ["FusedDecoding"]


@named_settings
@dataclass(frozen=True, eq=False, kw_only=True)
class FusedDecoding:
    """A loop for `model.generate(..., custom_generate=FusedDecoding(seed=0))`, for composed and for plain causal LMs.

    Greedy decoding gives the tokens of transformers' own loop, and sampling the same distribution (except that all
    tokens tied at the end of top-p are kept, where transformers keeps an arbitrary part of them). Temperature, top-k,
    top-p and min-p at the end of the list of processors become part of the step; processors before them run unchanged
    on the combined logits. The host waits for the device once per step, to know whether to stop.

    A draw depends only on (seed, row, position), not on padding or the other rows. `row` is the row's number in the
    batch, with `num_return_sequences` counted in; `position` the number of tokens before the drawn one, padding not
    counted.

    On a plain model transformers does not pass `streamer=`, `tokenizer=` and `assistant_model=` of `generate()` to a
    callable: give the streamer here and stop strings as a `StopStringCriteria`; an assistant is ignored, which only
    affects speed. A composed model passes them on, and refuses an assistant. `generate_batch` and
    `cache_implementation="paged"` never call this loop.

    Attributes:
        seed: The key of all draws; None for a new one in each call, from torch's default generator.
        impl: "triton", "torch", or "auto" for Triton where it runs.
        stream_ids: `[B]`, int64, or a list: which stream of the seed each row draws from [0, 1, 2, …]. With it, a row
            of a batch can be drawn again alone.
        branch_ids: `[B]`, int64, or a list, in [0, 2³⁰): which of several continuations of its stream each row is [0,
            0, 0, …].
        streamer: A streamer for plain models; it gets the prompt too.

    Raises:
        InputError: If a setting is out of its range.
    """

    seed: int | None = None
    impl: ops.Impl = "auto"
    stream_ids: StreamIds = None
    branch_ids: StreamIds = None
    streamer: BaseStreamer | None = None

    logs = True
    """This loop writes its decisions to a recording (`proxytune.record`)."""

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
        """Decode; called by `generate()` with its prepared arguments, `input_ids` being `[B, T]`, int64.

        Returns:
            `[B, T + new]`, int64; with `return_dict_in_generate` the same output as transformers' loop.

        Raises:
            UnsupportedModeError: For encoder-decoders and for every mode but greedy decoding and sampling.
            InputError: If `stream_ids` or `branch_ids` do not fit the batch, or there is an EOS but no padding token.
            NumericalError: If an unfinished row has no distribution, with the row and the step.
        """
        call = Call.begin(
            "FusedDecoding",
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
            assistant_model=assistant_model,
            images=True,
            logs=True,
        )
        pads, record, graphs = call.pads, OutputRecorder(generation_config), getattr(model, "_joint", None) is not None
        forward = (
            model.get_compiled_call(generation_config.compile_config)
            if model._valid_auto_compile_criteria(model_kwargs, generation_config)
            else model
        )

        sampler: Sampler | None = None
        unfinished: torch.Tensor | None = None  # `[B]`, bool, once a criterion has looked at the rows
        ends = Ends(stopping_criteria)
        finished, step = False, 0
        first = not generation_config.is_assistant
        outputs = call.prefill(first=first)
        with model._optimize_model_for_decode():
            while model._has_unfinished_sequences(finished, call.synced, device=input_ids.device):
                if outputs is None:
                    new = 1 if model_kwargs["use_cache"] else None
                    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
                    if sampler is not None and graphs:
                        inputs["decision"] = sampler.decision(record)
                    outputs = forward(**inputs, return_dict=True)
                model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
                if call.synced and finished:
                    outputs = None
                    continue
                members, weights = call.ensemble.last_rows(outputs)  # [B, V_i] each
                shown = None if call.log is None else call.ensemble.shown(outputs)
                record.add(outputs)
                decided = getattr(outputs, "decided", None)
                outputs = None  # may hold the logits of a whole prompt

                if sampler is None:  # width and device of the rows are known only now
                    cache = cache_of(model_kwargs) if graphs else None
                    settings = call.draw_settings(members[0], self.impl)
                    sampler = Sampler(settings, cache if isinstance(cache, StaticCache) else None)
                want = ("tokens",) if shown is None or not sampler.forks else ("tokens", "fork")
                found, rows = sampler(members, weights, input_ids, record, decided=decided, want=want)
                assert found.tokens is not None
                if call.log is not None and shown is not None:
                    call.log.add(
                        (members, weights), shown.rows, found.tokens[:, 0], step,
                        usable=sampler.settings.usable, alive=unfinished, gate=shown.opened,
                        fork=call.log.said("fork") if found.fork is None else found.fork,
                    )  # fmt: skip
                tokens = found.tokens[:, 0].to(input_ids.device)  # [B]
                bad = tokens < 0 if unfinished is None else (tokens < 0) & unfinished
                tokens = tokens.clamp(min=0)  # a finished row's token does not matter, but it is embedded
                if pads is not None and unfinished is not None:
                    tokens = torch.where(unfinished, tokens, pads)
                input_ids = torch.cat([input_ids, tokens[:, None]], -1)
                if (ended := ends(input_ids, record.scores)) is not None:
                    unfinished = ~ended if unfinished is None else unfinished & ~ended
                # The one place where the host waits for the device.
                status = bad[None] if unfinished is None else torch.stack((bad, unfinished))
                failed, *alive = status.any(1).tolist()
                going = all(alive) and not ends.at(input_ids.shape[1])
                if failed:
                    raise sampler.failure(rows, bad, step)
                del members, rows
                if call.streamer is not None:
                    call.streamer.put(tokens.cpu())
                finished, step = not going, step + 1

        if call.streamer is not None:
            call.streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        cache = next((model_kwargs[name] for name in ALL_CACHE_NAMES if name in model_kwargs), None)
        return record.output(input_ids, cache)
