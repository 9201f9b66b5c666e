"""Fork sampling as a logits processor: a higher temperature where the model is undecided, a lower one elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self, get_args

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.call_log import log_now
from proxytune.generation.method_hooks import Attachable, MethodHook, batching_refused, hooks_on, target_of
from proxytune.methods.forks.call_tracker import CallTracker, ForkRecord
from proxytune.methods.forks.checks import (
    OFF,
    WARPERS,
    TemperatureRule,
    beams,
    listed,
    measuring_warpers,
    several,
    threshold_of,
)
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.ops.entropy import entropy
from proxytune.recipe import MEASURES, ForkCalibration, Measure, Recipe
from proxytune.validation import choice, finite

__all__ = ["FLOOR", "ForkSamplingLogitsProcessor", "TemperatureRule"]

FLOOR = 0.01
"""The lowest temperature of the EDT form, which goes to 0 with the entropy."""


class ForkSamplingLogitsProcessor(Attachable, LogitsProcessor):
    """Divides each row's scores by a temperature that depends on that row's entropy H.

    - `"two"`: `fork_temperature` where H > h, else `exec_temperature` (after arXiv 2506.01939)
    - `"dynamic"`: `exec + (fork − exec) · (H / ln n)^exponent`, with n tokens not masked ("dynamic temperature")
    - `"edt"`: `fork_temperature · 0.8^(theta / H)`, at least `FLOOR` (arXiv 2403.14541)

    Three ways to use it:

    - `generate(logits_processor=[processor])` of a `ProxyTunedModel`, or of a model with a `ProxyTuningLogitsProcessor`
      attached.
    - `processor.attach(model)` for every other model, then `generate(...)` or a pipeline as usual; `detach()` or the
      end of `with processor.attach(model):` undoes it. It runs last among the user's processors, or at its place in
      `logits_processor`, e.g. after a `ProxyTuningLogitsProcessor`.
    - In your own loop: `for_call(generation_config)` returns the processor of one call.

    With a steered model, H is that of the combined row. A user's processor is called after generate()'s penalties and
    masks (`repetition_penalty`, `bad_words_ids`, …) and before its warpers, so H is the entropy of

    - `measure="raw"`: the row it is given, at temperature 1, after penalties and before any truncation. Without
      penalties that is the raw combined distribution, as in a calibration.
    - `"scaled"`: that row at generate()'s own temperature, which has to be passed (`temperature`).
    - `"truncated"`: the row after generate()'s temperature, top-k, top-p and min-p, which have to be passed too. They
      are applied here for the measurement only; generate() applies them after this processor's temperature.

    **generate()'s temperature multiplies** with the one chosen here, and many models set one in their generation
    settings. So any other than 1 is an error, unless it is passed here too (`temperature=0.6`).

    **Greedy decoding**: a temperature keeps the order of the tokens, so the text does not change; entropies and forks
    are counted and recorded all the same. **Beam search** would add up log-probabilities of different temperatures: it
    is refused. **Assisted decoding** calls the processor for the draft as well, and repeats positions. With a fixed
    threshold the distribution is right, and the record is the verifying model's, possibly with the end of the last
    draft left over; from the first repeated position on nothing is counted, as counts would mix two models. With a
    streaming threshold it is an error. (A second `generate()` that starts inside the last one's text looks the same:
    call `reset()` before it.)

    A step shows neither the mode nor the later warpers, so the settings are compared before the first step, in each of
    the three ways above. In any other call, such as `logits_processor=[processor]` of a plain model that it is not
    attached to, the first step raises. `generate_batch` drops processors silently; attached, it is an error.

    One processor serves many generations, one at a time.

    Attributes:
        threshold: The threshold, with the counts; None for a soft form without one.
        measure: Of which distribution the entropy is taken.
        form: How the temperature depends on it.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        threshold: float | ForkThreshold | ForkCalibration | Recipe | None,
        *,
        fork_temperature: float = 1.0,
        exec_temperature: float = 0.6,
        measure: Measure = "raw",
        form: TemperatureRule = "two",
        exponent: float = 1.0,
        theta: float = 0.1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        record: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            threshold: Above which entropy a token is a fork: a number in nats, a `ForkThreshold`, or a recipe with one.
                None only with a soft form, which then counts no forks.
            fork_temperature: The temperature at forks, T_fork; of the soft forms the largest one (T_max, T₀).
            exec_temperature: The temperature elsewhere, T_exec; of the dynamic form the smallest one (T_min).
            measure: "raw", "scaled" or "truncated", see above.
            form: "two", "dynamic" or "edt".
            exponent: Of the dynamic form, > 0.
            theta: Of the EDT form, nats, > 0: the entropy at which the temperature is 0.8 T₀.
            temperature: The temperature that generate() applies itself.
            top_k: The top-k that generate() applies itself, for `measure="truncated"`.
            top_p: Its top-p, likewise.
            min_p: Its min-p, likewise.
            eos_token_id: The end-of-text tokens. A row is still processed after its end until the last row has ended;
                with these it is no longer counted then.
            record: Whether to keep each step's entropies, forks and temperatures, for `record`.

        Raises:
            InputError: If a value is out of range, settings contradict each other, or the threshold belongs to another
                measure or to another α than the recipe's current one.
        """
        self.measure = choice("measure", measure, MEASURES)
        self.form = choice("form", form, get_args(TemperatureRule))
        self.threshold = threshold_of(threshold, measure, form)
        self._hot = finite("fork_temperature", fork_temperature, above=0.0)
        self._cold = finite("exec_temperature", exec_temperature, above=0.0)
        self._exponent = finite("exponent", exponent, above=0.0)
        self._theta = finite("theta", theta, above=0.0)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._told = {name: OFF[name] if value is None else value for name, value in given.items()}
        self._warpers = measuring_warpers(self._told, measure)
        self._ends = listed(eos_token_id)
        self._following = CallTracker(keeps=record)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> NoReturn:
        """Always raise UnsupportedModeError: in a call with checked settings, the result of `for_call` runs instead."""
        raise UnsupportedModeError.of(
            "ForkSamplingLogitsProcessor",
            expected="to be attached to the model: a step alone shows neither temperature, top-k, top-p nor beams",
            got="a step of a plain model without attach(), or of your own loop",
            remedy="Call processor.attach(model) before model.generate(...); in your own loop, use "
            "processor.for_call(generation_config).",
        )

    def step(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Divide the scores of one step by their rows' temperatures.

        Args:
            input_ids: The whole prefix, `[B, T]`, int64.
            scores: `[B, V]`: logits, or log-probabilities from an earlier processor.

        Returns:
            `[B, V]`, float32; unchanged in rows at temperature 1, elsewhere shifted so that the largest is 0, which
            keeps different scores different. Rows without a distribution (NaN, +inf, all −inf) stay so.

        Raises:
            UnsupportedModeError: In assisted decoding with a streaming threshold.

        Warns:
            DriftWarning: As `ForkThreshold.observe`.
        """
        scores = scores.float()
        measured = scores
        for warper in self._warpers:
            measured = warper(input_ids, measured)
        h = entropy(measured)  # [B]
        live = self._following.follow(input_ids, self._ends)
        fork = torch.zeros_like(h, dtype=torch.bool) if self.threshold is None else self.threshold.is_fork(h)
        t = self._temperature(h, fork, measured)  # [B]
        self._following.note(h, fork, t, live)
        if self.threshold is not None and (log := log_now()) is not None:
            log.say(fork=fork)
        self._count(h, live)
        # A plain division could round two different scores to the same value, and so change the argmax.
        top = scores.amax(-1)
        pivot = torch.where((t == 1.0) | ~top.isfinite(), 0.0, top)
        return (scores - pivot[:, None]) / t[:, None]

    def record(self) -> ForkRecord:
        """The decisions of the last generation; needs `record=True`.

        Returns:
            Entropies, forks and temperatures, `[B, T]` each, T the number of tokens generated.

        Raises:
            InputError: If nothing was recorded, or two generations could not be told apart.
        """
        return self._following.record()

    def reset(self) -> None:
        """Treat the next call as the start of a generation. The threshold keeps its counts: see its own `reset`."""
        self._following.reset()

    def attach(self, model: PreTrainedModel) -> Self:
        """Run the processor, with its settings checked, in every `generate()` of a model.

        Args:
            model: The composed model, or a plain causal LM.

        Returns:
            Itself, so that `with processor.attach(model):` detaches at the end.

        Raises:
            InputError: If the processor is attached already, or the model has another one of this kind.
        """
        self._refuse_attached()
        target = target_of(model)
        name = "_get_logits_processor"
        if any(isinstance(hook.replacement, _ForkProcessors) for hook in hooks_on(target, name)):
            raise several("attach", 2)
        self._hooks = (
            MethodHook(target, name, _ForkProcessors(self)),
            *batching_refused(target),
        )
        return self

    def for_call(
        self, generation_config: GenerationConfig, processors: Sequence[LogitsProcessor] | None = None
    ) -> LogitsProcessor:
        """Check the settings of a call, and return the processor to run in it.

        Args:
            generation_config: The settings.
            processors: As in `check_settings`.

        Raises:
            InputError: As `check_settings`.
            UnsupportedModeError: As `check_settings`.
        """
        self.check_settings(generation_config, processors)
        return _ForkStep(self)

    def check_settings(
        self, generation_config: GenerationConfig, processors: Sequence[LogitsProcessor] | None = None
    ) -> None:
        """Compare the settings of a call with those passed here, and adopt its end-of-text tokens.

        Args:
            generation_config: The settings.
            processors: All processors of the call in their order, this one included; None if they are not known.

        Raises:
            InputError: If the settings differ, there are several processors of this kind, or a
                `ProxyTuningLogitsProcessor` comes after it.
            UnsupportedModeError: If the settings ask for beams.
        """
        if (generation_config.num_beams or 1) > 1:
            raise beams(f"num_beams={generation_config.num_beams}")
        if generation_config.do_sample:
            settings = {name: getattr(generation_config, name, None) for name in WARPERS}
            self._compare({name: OFF[name] if value is None else value for name, value in settings.items()})
        self._check_neighbours(processors or ())
        if not self._ends:
            self._ends = listed(generation_config.eos_token_id)

    # --- the step ------------------------------------------------------------------------------------------------

    def _temperature(self, h: torch.Tensor, fork: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        if self.form == "two":
            t = torch.where(fork, self._hot, self._cold)
        elif self.form == "dynamic":
            n = (measured > -torch.inf).sum(-1)
            # With a single candidate both the entropy and ln n are 0.
            relative = (h / n.clamp(min=2).log()).clamp(max=1.0)
            t = self._cold + (self._hot - self._cold) * relative**self._exponent
        else:
            t = (self._hot * 0.8 ** (self._theta / h)).clamp(min=FLOOR)
        return t.float().masked_fill(h.isnan(), 1.0)

    def _count(self, h: torch.Tensor, live: torch.Tensor | None) -> None:
        if self.threshold is None:
            return
        if not self._following.asked_again:
            self.threshold.observe(h, live)
        elif self.threshold.is_streaming:
            raise UnsupportedModeError.of(
                "streaming threshold",
                expected="a generation that visits each position once",
                got="a repeated position: assisted decoding, whose draft has other entropies, or a generate() that "
                "starts inside the text of the last one",
                remedy="Use a calibrated threshold with assisted decoding; else call the processor's reset() before.",
            )

    # --- wrong use -----------------------------------------------------------------------------------------------

    def _check_neighbours(self, processors: Sequence[LogitsProcessor]) -> None:
        own = next((i for i, p in enumerate(processors) if p is self), 0)
        if any(getattr(p, "shifts_logits", False) for p in processors[own + 1 :]):
            raise InputError.of(
                "logits_processor",
                expected="the ForkSamplingLogitsProcessor after the ProxyTuningLogitsProcessor",
                got="the reverse order: the entropy would be the base's, and the shift would escape the temperature",
                remedy="Change their order, or attach() the ProxyTuningLogitsProcessor.",
            )
        count = sum(isinstance(p, ForkSamplingLogitsProcessor) for p in processors)
        if count > 1:
            raise several("logits_processor", count)
        kinds = {kind: name for name, kind in WARPERS.items()}
        self._compare({kinds[type(p)]: getattr(p, kinds[type(p)]) for p in processors if type(p) in kinds})

    def _compare(self, settings: Mapping[str, float]) -> None:
        """Refuse settings of generate() other than those passed here; truncation matters only if it is measured."""
        for name, value in settings.items():
            if value == self._told[name] or (name != "temperature" and self.measure != "truncated"):
                continue
            matters = (
                "would be applied on top of fork_temperature and exec_temperature"
                if name == "temperature"
                else "changes the entropy"
            )
            raise InputError.of(
                f"generate()'s {name}",
                expected=f"{self._told[name]}, as passed to the processor",
                got=f"{value}, which {matters}",
                remedy=f"Pass {name}={OFF[name]} to generate(), or {name}={value} to the processor if it is meant.",
            )


class _ForkStep(LogitsProcessor):
    """A processor during one call, whose settings were checked."""

    supports_continuous_batching = False

    def __init__(self, processor: ForkSamplingLogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor.step(input_ids, scores)


class _ForkProcessors:
    """Replaces `_get_logits_processor` of a model that a processor is attached to."""

    def __init__(self, processor: ForkSamplingLogitsProcessor) -> None:
        self.processor = processor

    def __call__(
        self,
        original: Callable[..., LogitsProcessorList],
        generation_config: GenerationConfig,
        *args: Any,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """The processors of one `generate()`, this one included; a model drafting for another keeps its given ones."""
        own = self.processor
        given = list(logits_processor or ())
        if not generation_config.is_assistant and all(p is not own for p in given):
            given.append(own)
        processors = original(generation_config, *args, logits_processor=LogitsProcessorList(given), **kwargs)
        return LogitsProcessorList(own.for_call(generation_config, processors) if p is own else p for p in processors)
