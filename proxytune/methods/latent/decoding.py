"""Latent steps in `generate()`: tokens are drawn as ever, and a mixture of embeddings is fed back in their place.

The loops are transformers' own, or `FusedDecoding`; what is added to them is a processor behind all others, which sees
the distribution that a token is drawn from, and a hook on the inputs of the next forward pass.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from proxytune.errors import UnsupportedModeError
from proxytune.generation.batch import cache_of
from proxytune.generation.call import Call
from proxytune.generation.fused import FusedDecoding
from proxytune.generation.processor_rules import refuse_processors
from proxytune.generation.seeds import StreamIds
from proxytune.methods.latent.capture import with_capture
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.input_hook import ARGUMENT, latent_inputs_installed
from proxytune.methods.latent.mixture import Kind, LatentMixture
from proxytune.methods.latent.steps import LatentSteps, check_latent_settings, latent_steps_of
from proxytune.ops import Impl
from proxytune.validation import refuse_seed

__all__ = ["LatentDecoding", "LatentOutput"]

_NAME = "LatentDecoding"


@dataclass
class LatentOutput(GenerateDecoderOnlyOutput):
    """What transformers' loop returns, and which steps were latent; N new tokens.

    Attributes:
        soft: `[B, N]`, bool: whether a mixture took the token's place; where it was not finite, the token's embedding
            was fed back after all. A row's last token is not fed back.
        entropy: `[B, N]`, float32, nats: of the distribution that the token was drawn from; NaN after a row's end.
    """

    soft: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LatentDecoding:
    """A loop for `model.generate(..., custom_generate=LatentDecoding("gumbel"))`, composed and plain models.

    Each token is drawn as without it; then weights over the likeliest tokens are drawn, given that token, and the
    mixture of their embeddings is what the model reads next (each member of a composed model the mixture of its own).
    No score is changed, so constraints, penalties and beams stay valid; the law of the *next* token is. (One gate does
    write, the cold stop of a thinking span: where its end is not masked.) Off is `"onehot"`, which gives the very
    tokens of plain decoding.

    Weights depend on (seed, row, position) alone. But a mixture keeps the rounding of the scores that it is made of,
    which a discrete token absorbs: in low precision, a text may change with the batch around it.

    For greedy decoding, sampling and beams, with any cache or none, any padding, compiled forwards and streamers. One
    `generate()` with latent steps at a time on a model. Assisted decoding is refused, and so are encoder-decoders.

    On a plain model transformers hands a callable neither `streamer=` nor `assistant_model=` of `generate()`: give the
    streamer here (one given to `generate()` gets the prompt alone); an assistant is ignored, and the text is that
    without it. `generate_batch` and `cache_implementation="paged"` never call it: there transformers' warning that it
    switches is all there is. A composed model hands both over and refuses what cannot be, an attached
    `LatentLogitsProcessor` refuses assistants and paged caches.

    Attributes:
        mixture: The law of the weights, or its kind for the defaults.
        gates: Where steps are latent [everywhere but at ids that end, begin or pad the text].
        seed: The key of all weights; None for another one in each call, from torch's default generator.
        stream_ids: `[B]`, int64, or a list: which stream of the seed each row draws from [0, 1, 2, …].
        loop: How tokens are drawn: None for transformers' own loops; a `FusedDecoding`, for greedy decoding and
            sampling, if a row's tokens too are to depend on (seed, row, position) alone.
        streamer: A streamer for plain models; it gets the prompt too.
        impl: "triton", "torch" or "auto".

    Raises:
        InputError: If a setting is out of its range.
    """

    mixture: LatentMixture | Kind = field(default_factory=LatentMixture)
    gates: LatentGates = field(default_factory=LatentGates)
    _: KW_ONLY
    seed: int | None = None
    stream_ids: StreamIds = None
    loop: FusedDecoding | None = None
    streamer: BaseStreamer | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        mixture, _ = check_latent_settings(self.mixture, self.gates, self.impl)
        object.__setattr__(self, "mixture", mixture)
        refuse_seed(self.seed, _NAME)

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
    ) -> Any:
        """Decode; `generate()` calls this with what it has prepared.

        Args:
            model: The composed model, or a plain causal LM.
            input_ids: `[B, T]`, int64, expanded by `num_return_sequences` or the beams.
            logits_processor: The processors and warpers.
            stopping_criteria: The criteria.
            generation_config: The settings.
            synced_gpus: Whether to go on until the other processes have finished; None to find out.
            streamer: Gets each step's tokens `[B]`.
            tokenizer: The stop strings' criterion has taken it.
            assistant_model: Refused.
            **model_kwargs: What the forward passes need; the cache among them.

        Returns:
            What transformers' loop returns; without beams and with `return_dict_in_generate` a `LatentOutput`.

        Raises:
            UnsupportedModeError: For encoder-decoders, assisted decoding, paged caches and companions that read ids.
            UnsupportedModelError: If the model's embedding cannot be replaced by a mixture.
            InputError: If `stream_ids` does not fit the batch, or a gate names an id that the model cannot embed.
        """
        beams = int(generation_config.num_beams or 1)
        given = self.streamer if streamer is None else streamer
        if beams > 1 and given is not None:
            raise UnsupportedModeError.of(
                _NAME,
                expected="no streamer with beam search, whose texts change until the end",
                got=f"a {type(given).__name__}",
                remedy="Leave it out, or num_beams.",
            )
        call = Call.begin(
            _NAME,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            stream_ids=self.stream_ids,
            streamer=streamer,
            own_streamer=self.streamer,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            beams=self.loop is None,
        )
        self._refuse_paged(generation_config, model_kwargs)
        refuse_processors(logits_processor)
        assert isinstance(self.mixture, LatentMixture)
        feedback = latent_steps_of(
            model,
            self.mixture,
            self.gates,
            generation_config,
            seed=self.seed,
            lengths=call.lengths,
            rows=call.keys.row,
            impl=self.impl,
        )
        ended = _Ended(stopping_criteria)
        shared: dict[str, Any] = {
            "logits_processor": with_capture(logits_processor, feedback),
            "stopping_criteria": ended,
            "generation_config": generation_config,
            "synced_gpus": call.synced,
            **model_kwargs,
            ARGUMENT: feedback,
        }
        with latent_inputs_installed(model):
            if beams > 1:
                return model._beam_search(input_ids, **shared)
            if self.loop is not None:
                out = self.loop(model, input_ids, streamer=call.streamer, **shared)
            else:
                out = model._sample(input_ids, streamer=call.streamer, **shared)
        return out if isinstance(out, torch.Tensor) else _output(out, feedback, ended.steps, input_ids.shape[1])

    def _refuse_paged(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        cache = cache_of(model_kwargs)
        if generation_config.cache_implementation == "paged" or "Paged" in type(cache).__name__:
            raise UnsupportedModeError.of(
                _NAME,
                expected="a dynamic or static cache, or none",
                got="a paged one, whose batches run without latent steps",
                remedy="Leave cache_implementation out.",
            )


class _Ended(StoppingCriteriaList):
    """Criteria that keep what they said of each step."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self.steps.append(done)
        return done


def _output(out: Any, feedback: LatentSteps, ended: list[torch.Tensor], start: int) -> LatentOutput:
    new = out.sequences[:, start:]  # [B, N]
    count = new.shape[1]
    # On a GPU transformers' loop may be a step ahead when it stops.
    entropy, done = (
        torch.stack([x.to(new.device) for x in steps[:count]], 1) for steps in (feedback.entropy, ended)
    )  # [B, N]
    fed = [soft.to(new.device) for soft in feedback.soft[: count - 1]]
    soft = torch.stack([*fed, torch.zeros_like(done[:, 0])], 1)
    through = done.long().cumsum(1) > 0  # from a row's last token on
    over = through & (torch.cumsum(through.long(), 1) > 1)  # behind it
    return LatentOutput(**out, soft=soft & ~through, entropy=entropy.masked_fill(over, torch.nan))
