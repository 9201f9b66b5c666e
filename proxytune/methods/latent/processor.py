"""Latent steps as a logits processor, for pipelines that accept only processors.

The processor sees the scores, and `attach` lets it reach the model's inputs. Its place in the list does not matter if
it knows the warpers after it, which change what a token is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from proxytune.errors import InputError, UnsupportedModeError, UnsupportedModelError
from proxytune.generation.batch import lengths_of
from proxytune.generation.method_hooks import Attachable, MethodHook, batching_refused, hooks_on, target_of
from proxytune.generation.modes import refuse_adapter_names, refuse_modes
from proxytune.generation.processor_rules import refuse_processors
from proxytune.generation.seeds import StreamIds
from proxytune.methods.latent.capture import EarlyCapture, with_capture
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.input_hook import ARGUMENT, put_hook
from proxytune.methods.latent.mixture import Kind, LatentMixture
from proxytune.methods.latent.steps import check_latent_settings, embeddings_of, latent_steps_of
from proxytune.models.vision import refuse_images
from proxytune.ops import Impl
from proxytune.validation import refuse_seed

__all__ = ["LatentLogitsProcessor"]

_NAME = "LatentLogitsProcessor"


class LatentLogitsProcessor(Attachable, LogitsProcessor):
    """`LatentDecoding` for any `generate()`, pipeline or trainer around a model.

    Both ways of using it need `processor.attach(model)`; `detach()`, or the end of `with processor.attach(model):`,
    undoes it:

    - attached alone, every `generate()` of the model takes latent steps, and the processor runs after the warpers;
    - attached and passed in `logits_processor=[…]`, it runs before generate()'s warpers. They have to be passed here
      too (`warpers`), and a call in which others follow it is refused. The result is the same.

    With the same seed the steps are those of `LatentDecoding`. Assisted decoding, paged caches, `generate_batch` and
    models that draft for others are refused.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        mixture: LatentMixture | Kind = "gumbel",
        gates: LatentGates | None = None,
        *,
        warpers: Sequence[LogitsProcessor] = (),
        seed: int | None = None,
        stream_ids: StreamIds = None,
        impl: Impl = "auto",
    ) -> None:
        """Keep the settings.

        Args:
            mixture: The distribution of the weights, or its kind for the defaults.
            gates: Where steps are latent [everywhere but at ids that end, begin or pad the text].
            warpers: The processors after this one in the list, in their order, as generate() makes them: e.g.
                `[TemperatureLogitsWarper(0.8), TopKLogitsWarper(50)]`. Not needed if it is only attached.
            seed: The key of all weights; None draws one per call from torch's default generator.
            stream_ids: `[B]`: which stream of the seed each row draws from [0, 1, 2, …].
            impl: "triton", "torch" or "auto".

        Raises:
            InputError: If a setting is out of range.
        """
        self.mixture, self.gates = check_latent_settings(mixture, LatentGates() if gates is None else gates, impl)
        refuse_seed(seed, _NAME)
        self.warpers = list(warpers)
        self.seed, self.stream_ids = seed, stream_ids
        self.impl: Impl = impl

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> NoReturn:
        """Always raise UnsupportedModeError: in a `generate()` of the attached model another processor runs instead."""
        raise UnsupportedModeError.of(
            _NAME,
            expected="a generate() of the model that it is attached to",
            got="a call by another model or loop" if self._hooks else "a call in which it is not attached",
            remedy="Call processor.attach(model) before model.generate(...).",
        )

    def attach(self, model: PreTrainedModel) -> Self:
        """Let every `generate()` of a model take latent steps.

        Args:
            model: The composed model, or a plain causal LM.

        Returns:
            Itself, so that `with processor.attach(model):` detaches at the end.

        Raises:
            InputError: If the processor is attached already.
            UnsupportedModelError: If the model's embedding cannot be replaced by a mixture.
            UnsupportedModeError: If something else takes latent steps on the model, or it is an encoder-decoder.
        """
        self._refuse_attached()
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError.of(
                _NAME,
                expected="a model that prepares its own inputs",
                got="a PEFT model with a learned prompt or prefix, which prepares them instead",
                remedy="Pass a LatentDecoding to generate(custom_generate=…).",
            )
        target = target_of(model)
        refuse_modes(_NAME, target, target.generation_config, None, beams=True)
        put = [hook.replacement for hook in hooks_on(target, "_get_logits_processor")]
        if any(getattr(p, "changes_logits", False) and not isinstance(p, _Processors) for p in put):
            raise UnsupportedModeError.of(
                "attach",
                expected="a model to which nothing is attached",
                got="a model with another processor; the companions of a ProxyTuningLogitsProcessor would read the ids",
                remedy="Detach it. To steer and take latent steps, compose the models with proxytune.wrap.",
            )
        embeddings_of(target)
        inputs = put_hook(target)
        self._hooks = (
            inputs,
            MethodHook(target, "_get_logits_processor", _Processors(self, target, inputs)),
            *batching_refused(target),
        )
        return self


class _Processors:
    """Replaces a model's `_get_logits_processor`."""

    changes_logits = True

    def __init__(self, processor: LatentLogitsProcessor, model: Any, hook: MethodHook) -> None:
        self.processor, self.model, self.hook = processor, model, hook

    def __call__(
        self,
        original: Callable[..., LogitsProcessorList],
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """The processors of one `generate()`, with one that passes the scores to its latent steps."""
        processors = original(generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs)
        own = self.processor
        if model_kwargs is None or not self.hook.is_on_top:
            raise UnsupportedModeError.of(
                _NAME,
                expected="a generate() that prepares the model's inputs through the hook of attach()",
                got="no arguments for the model" if model_kwargs is None else "another method in its place",
                remedy="Attach the processor last, or pass a LatentDecoding to generate(custom_generate=…).",
            )
        if generation_config.is_assistant:
            raise UnsupportedModeError.of(
                _NAME,
                expected="a model that generates for itself",
                got="a model that drafts for another",
                remedy="Call detach() first.",
            )
        refuse_modes(_NAME, self.model, generation_config, None, beams=True)
        refuse_adapter_names(_NAME, self.model, model_kwargs)
        refuse_images(_NAME, model_kwargs)
        refuse_processors(processors)
        steps = latent_steps_of(
            self.model,
            own.mixture,
            own.gates,
            generation_config,
            seed=own.seed,
            lengths=_lengths(generation_config, input_ids_seq_length or 0, model_kwargs),
            most_new=generation_config.max_length - (input_ids_seq_length or 0),
            rows=own.stream_ids,
            impl=own.impl,
        )
        # generate() passes these on to every step.
        model_kwargs[ARGUMENT] = steps
        places = [i for i, p in enumerate(processors) if isinstance(p, LatentLogitsProcessor)]
        if not places:
            return with_capture(processors, steps)
        at = places[0]
        if len(places) > 1 or processors[at] is not own:
            raise InputError.of(
                "logits_processor",
                expected="only the attached processor, once",
                got=f"{len(places)} of this kind",
                remedy="Pass the attached one alone, or none.",
            )
        after = processors[at + 1 :]
        if [_settings(p) for p in after] != [_settings(p) for p in own.warpers]:
            raise InputError.of(
                "warpers",
                expected=f"those that come after it in the list: [{', '.join(map(_shown, after))}]",
                got=f"[{', '.join(map(_shown, own.warpers))}]",
                remedy="Pass them to the processor, or leave it out of logits_processor: attached, it comes last.",
            )
        return LogitsProcessorList([*processors[:at], EarlyCapture(steps, own.warpers), *after])


def _lengths(generation_config: GenerationConfig, width: int, model_kwargs: Mapping[str, Any]) -> torch.Tensor:
    """One length per row if some are padded; else one for all, `[1]`."""
    mask = model_kwargs.get("attention_mask")
    return lengths_of(1, width, torch.device("cpu") if mask is None else mask.device, generation_config, model_kwargs)


def _settings(processor: LogitsProcessor) -> tuple[type, dict[str, str]]:
    # As strings, since some are tensors. 1 equals 1.0, and the tensors' device does not matter.
    return type(processor), {
        k: repr(x.tolist() if isinstance(x, torch.Tensor) else float(x) if isinstance(x, int) else x)
        for k, x in vars(processor).items()
        if k != "device"
    }


def _shown(processor: LogitsProcessor) -> str:
    return f"{type(processor).__name__}({', '.join(f'{k}={x}' for k, x in _settings(processor)[1].items())})"
