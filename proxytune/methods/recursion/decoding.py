"""Stochastic recursion: several noisy trajectories of a recurrent-depth model in one batch, one of them selected.

How it relates to published work, and what a frozen model cannot do:

- **PTRM** (arXiv 2605.19943) adds Gaussian noise to the state of a frozen Tiny Recursive Model at each step of the deep
  recursion, runs K trajectories side by side, and selects by the model's Q head. This does the same for a causal
  language model, whose text is sampled token by token; most have no Q head, so the mean log-probability, a vote or a
  verifier selects.
- **GRAM** (arXiv 2605.19376) learns μ and σ of its transition by variational training. A frozen model has neither. The
  noise here has the shape of GRAM's, at one σ that the caller gives; it is not GRAM.
- Nothing is learned: a frozen model cannot find out where noise helps, and noise does not restore solutions that
  training removed. It is no guidance: it favours no direction. It makes trajectories differ; any gain comes from the
  selection.
- A transformer that does not recur has no high-level state to perturb, and is refused.

In HRM-Text, noise after the last cycle affects only the logits of that one position. Earlier noise passes through the
remaining cycles, and reaches later positions through their attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from proxytune import ops
from proxytune.errors import InputError
from proxytune.generation.call import Call
from proxytune.generation.fused import FusedDecoding
from proxytune.generation.modes import refuse_adapter_names
from proxytune.generation.processor_rules import bind_to_prompts
from proxytune.generation.prompt_rows import rows_of_prompts
from proxytune.methods.recursion.adapters import LatentRecursion, recursion_of
from proxytune.methods.recursion.checks import refuse_call, refuse_settings
from proxytune.methods.recursion.meter import Meter
from proxytune.methods.recursion.output import RecursionOutput, Trajectories, measured
from proxytune.methods.recursion.selection import Select, check_select, select_one
from proxytune.methods.recursion.transition import Transition
from proxytune.models.members.cache_name import cache_of
from proxytune.ops.noise import Noise
from proxytune.validation import named_settings

__all__ = ["RecursionDecoding", "RecursionOutput", "Trajectories"]

When = Literal["cycle", "once"] | tuple[int, ...]


@named_settings
@dataclass(frozen=True, eq=False, kw_only=True)
class RecursionDecoding:
    """Sample noisy trajectories of a model that recurs, and select one: `custom_generate=RecursionDecoding(sigma=0.1)`.

    Every prompt is decoded N times in one batch, by `FusedDecoding`, with keyed Gaussian noise at the high-level state
    after a cycle: `h' = u + σ · rms(u) · n`. Prompt positions get noise too, so the prompt is forwarded N times. In
    greedy decoding nothing else is random; in sampling tokens are drawn with keyed noise as well. With σ = 0 the model
    is exactly what it was.

    The noise depends on (seed, row, trajectory, position, cycle) only, not on padding, the cache or the batch. So
    `RecursionDecoding(..., stream_ids=[3], trajectories=[5])` reproduces trajectory 5 of row 3, and a larger N leaves
    the first trajectories as they are. With `num_return_sequences` (sampling only) each sequence of a prompt is a row
    of its own, and the best of N trajectories.

    Halting is by row and position: a state that changes little from one cycle to the next is kept, without further
    noise. A model with a fixed number of cycles computes the rest all the same, so halting saves no time; it reports
    how many cycles a text needed. Noise counts as change: with σ at every cycle, a threshold below about 1.4 σ halts
    nothing.

    Forward passes run eagerly, also where transformers would compile them. Pass a streamer here, and stop strings as a
    `StopStringCriteria`: transformers hands neither to a callable, nor an assistant. A composed model is refused:
    decode with the member that recurs. Nothing else (another thread, say) may run the model meanwhile.

    Attributes:
        sigma: σ ≥ 0, relative to the rms of the state.
        when: After which cycles to add noise: `"cycle"` for each, `"once"` for the first, or their numbers from 0.
        trajectories: N, or the numbers of the trajectories to decode.
        select: `"logprob"` for the highest mean log-probability, `"vote"` for the most frequent answer, `"value"` for
            the model's value head, a verifier from generated ids to a score, or None for all trajectories. Ties go to
            the higher mean log-probability.
        answer: For `"vote"`: generated ids to a hashable answer (an int, a str, a tuple; no tensor), or None for no
            answer, which scores −inf; default: the ids themselves. If no trajectory of a prompt has an answer, the
            highest mean log-probability is selected.
        halt: The relative change of a state, > 0, below which a position halts; None for never.
        seed: The key of all noise; None draws one per call from torch's default generator.
        stream_ids: `[B]`, which stream of the seed each row has [0, 1, 2, …].
        impl: "triton", "torch" or "auto", for drawing tokens.
        streamer: A transformers streamer, with one trajectory only.

    Raises:
        InputError: If a setting is out of range.
        UnsupportedModeError: For a streamer with several trajectories.
    """

    sigma: float
    when: When = "cycle"
    trajectories: int | Sequence[int] = 8
    select: Select = "logprob"
    answer: Callable[[list[int]], Hashable | None] | None = None
    halt: float | None = None
    seed: int | None = None
    stream_ids: Sequence[int] | torch.Tensor | None = None
    impl: ops.Impl = "auto"
    streamer: BaseStreamer | None = None

    def __post_init__(self) -> None:
        check_select(self.select)
        if self.answer is not None and not (self.select == "vote" and callable(self.answer)):
            raise InputError.of(
                "answer",
                expected="a callable, with select='vote'",
                got=f"{self.answer!r} with select={self.select!r}",
                remedy="Pass select='vote', or leave it out.",
            )
        refuse_settings(self)
        FusedDecoding(seed=self.seed, impl=self.impl)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the trajectories, each a noise stream of its own."""
        wanted = self.trajectories
        return tuple(wanted) if isinstance(wanted, Sequence) else tuple(range(wanted))

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
    ) -> RecursionOutput | torch.Tensor:
        """Decode and select; `generate()` calls this with what it has prepared.

        Args:
            model: A model that recurs.
            input_ids: `[B, T]`, int64, expanded by `num_return_sequences`.
            logits_processor: The processors.
            stopping_criteria: The criteria.
            generation_config: The settings.
            synced_gpus: As in `FusedDecoding`.
            streamer: Gets each step's token, with one trajectory only.
            tokenizer: Unused: the stop strings' criterion has it already.
            assistant_model: Refused.
            **model_kwargs: Inputs of the forward passes; a cache among them must be empty.

        Returns:
            With `return_dict_in_generate` a `RecursionOutput`, else its sequences.

        Raises:
            UnsupportedModelError: If no recursion is known for the model.
            UnsupportedModeError: For a mode, output, cache or compiled model that this loop does not support.
            InputError: If a setting does not fit the model or the batch.
            NumericalError: If an unfinished row has no distribution.
        """
        name, numbers = type(self).__name__, self.numbers
        processors = bind_to_prompts(name, logits_processor, rows_move=False)
        call = Call.begin(
            name,
            model,
            input_ids,
            processors,
            stopping_criteria,
            generation_config,
            model_kwargs,
            seed=self.seed,
            stream_ids=self.stream_ids,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
        )
        recursion = recursion_of(model)
        refuse_call(name, model, generation_config, streamer, model_kwargs, trajectories=len(numbers))
        refuse_adapter_names(name, model, model_kwargs)
        head = recursion.value_head(model)
        if self.select == "value" and head is None:
            raise InputError.of(
                "select",
                expected="another selection than 'value': the model has no value head",
                got=f"'value' for {type(model).__name__}",
                remedy="Pass a verifier, 'vote' or 'logprob'.",
            )
        prompts, width = input_ids.shape[0], len(numbers)
        keys = self._keys(call)
        transition = self._transition(model, recursion, keys)
        meter = Meter(prompts * width, transition, input_ids.device, keep_states=head is not None)
        loop = FusedDecoding(
            seed=int(keys.seed[0]), stream_ids=keys.row, branch_ids=keys.branch, impl=self.impl, streamer=self.streamer
        )
        config = copy.copy(generation_config)
        config.disable_compile, config.return_dict_in_generate = True, False
        texts, model_kwargs = _expanded(model, input_ids, model_kwargs, width)
        with ExitStack() as stack:
            stack.enter_context(rows_of_prompts([p for p in range(prompts) for _ in numbers], prompts))
            stack.enter_context(meter.watching(model))
            stack.enter_context(recursion.perturbed(model, transition))
            texts = loop(
                model,
                texts,
                logits_processor=processors,
                stopping_criteria=meter.around(stopping_criteria),
                generation_config=config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        length = input_ids.shape[1]
        found = measured(texts, meter, head, prompts, length=length, pad=generation_config._pad_token_tensor)
        out = self._selected(found, length)
        assert out.sequences is not None
        return out if generation_config.return_dict_in_generate else out.sequences

    def _keys(self, call: Call) -> Noise:
        """Noise keys of all trajectories, prompt after prompt, on the CPU."""
        streams, numbers = call.keys.row, torch.tensor(self.numbers)
        row, branch = streams.repeat_interleave(len(numbers)), numbers.repeat(len(streams))
        return Noise.of(len(row), seed=call.seed, row=row, branch=branch)

    def _transition(self, model: Any, recursion: LatentRecursion, keys: Noise) -> Transition:
        cycles = recursion.cycles(model)
        at = {"cycle": tuple(range(cycles)), "once": (0,)}.get(self.when) if isinstance(self.when, str) else self.when
        assert at is not None
        if max(at) >= cycles:
            raise InputError.of(
                "when",
                expected=f"cycles from 0 to {cycles - 1}: {type(model).__name__} has {cycles} here",
                got=repr(self.when),
                remedy="Pass 'cycle' for all of them.",
            )
        if self.halt is not None and cycles < 3:
            raise InputError.of(
                "halt",
                expected="a model with 3 cycles or more: the first change is that of the second cycle",
                got=f"{type(model).__name__} with {cycles}",
                remedy="Leave it out.",
            )
        size = recursion.state_size(model)
        return Transition(keys, sigma=self.sigma, at=at, cycles=cycles, size=size, halt=self.halt)

    def _selected(self, found: Trajectories, length: int) -> RecursionOutput:
        prompts, width, _ = found.sequences.shape
        if self.select is None:
            return RecursionOutput(sequences=found.sequences.flatten(0, 1), trajectories=found)
        texts, lengths = found.sequences[..., length:].tolist(), found.lengths.tolist()
        means = found.mean_logprobs.tolist()
        values = [None] * prompts if found.values is None else found.values.tolist()
        chosen, scores = [], []
        for p in range(prompts):
            ids = [text[:n] for text, n in zip(texts[p], lengths[p], strict=True)]
            best, compared = select_one(self.select, ids, means[p], values=values[p], answer=self.answer)
            chosen.append(best)
            scores.append(compared)
        picked = torch.tensor(chosen, device=found.sequences.device)
        longest = length + max(lengths[p][best] for p, best in enumerate(chosen))
        return RecursionOutput(
            sequences=found.sequences[torch.arange(prompts, device=picked.device), picked, :longest],
            chosen=picked,
            scores=torch.tensor(scores, dtype=torch.float64).view(prompts, width),
            trajectories=found,
        )


def _expanded(
    model: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any], width: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """N rows per prompt, prompt after prompt; an empty cache is reset to take its batch size from the first pass."""
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[0] == 1:
        model_kwargs["position_ids"] = positions.expand(input_ids.shape[0], -1)
    for layer in getattr(cache_of(model_kwargs), "layers", ()):
        # transformers allocates it for B rows in advance if it prefills in chunks.
        if getattr(layer, "is_initialized", False):
            layer.is_initialized = False
    return model._expand_inputs_for_generation(
        expand_size=width, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
    )
