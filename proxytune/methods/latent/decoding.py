"""Latent steps in `generate()`: tokens are sampled as usual, but a mixture of embeddings is fed back in their place.

The loops are transformers' own, or `FusedDecoding`. Added are a processor after all others, which sees the distribution
that a token is drawn from, and a hook on the inputs of the next forward pass.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from proxytune.errors import UnsupportedModeError
from proxytune.generation.call import Call
from proxytune.generation.call_log import log_on
from proxytune.generation.fused import FusedDecoding
from proxytune.generation.modes import refuse_adapter_names
from proxytune.generation.processor_rules import refuse_processors
from proxytune.generation.seeds import StreamIds
from proxytune.methods.latent.capture import with_capture
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.input_hook import ARGUMENT, latent_inputs_installed
from proxytune.methods.latent.mixture import Kind, LatentMixture
from proxytune.methods.latent.steps import LatentSteps, check_latent_settings, latent_steps_of
from proxytune.models.members.cache_name import cache_of
from proxytune.ops import Impl
from proxytune.validation import named_settings, refuse_seed

__all__ = ["LatentDecoding", "LatentOutput"]

_NAME = "LatentDecoding"


@dataclass
class LatentOutput(GenerateDecoderOnlyOutput):
    """The output of transformers' loop, and which steps were latent; N new tokens.

    Attributes:
        soft: `[B, N]`, bool: whether a mixture took the token's place; where it was not finite, the token's embedding
            was fed back after all. A row's last token is not fed back.
        entropy: `[B, N]`, float32, nats: of the distribution that the token was drawn from; NaN after a row's end.
    """

    soft: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@named_settings
@dataclass(frozen=True, eq=False)
class LatentDecoding:
    """A loop for `model.generate(..., custom_generate=LatentDecoding("gumbel"))`, for composed and plain models.

    Each token is drawn as usual; then weights over the likeliest tokens are drawn, given that token, and the mixture of
    their embeddings is what the model reads next (each member of a composed model the mixture of its own). No score is
    changed, so constraints, penalties and beams stay valid; the distribution of the *next* token changes. (One gate
    does change scores: a cold stop forces the end of a thinking span, where it is not masked.) `"onehot"` turns it off,
    with exactly the tokens of plain decoding.

    Weights depend on (seed, row, position) alone. But a mixture keeps the rounding of its scores, which a discrete
    token absorbs: in low precision, a text may change with the batch.

    Greedy decoding, sampling and beams work, with any cache or none, any padding, compiled forwards and streamers. Only
    one `generate()` with latent steps may run on a model at a time. Assisted decoding and encoder-decoders are refused.

    On a plain model transformers hands a callable neither `streamer=` nor `assistant_model=` of `generate()`: pass the
    streamer here (one passed to `generate()` gets the prompt alone); an assistant is ignored. `generate_batch` and
    `cache_implementation="paged"` never call it; only a warning of transformers says so. A composed model passes both
    on and refuses what is unsupported; an attached `LatentLogitsProcessor` refuses assistants and paged caches.

    Attributes:
        mixture: The distribution of the weights, or its kind for the defaults.
        gates: Where steps are latent [everywhere but at ids that end, begin or pad the text].
        seed: The key of all weights; None draws one per call from torch's default generator.
        stream_ids: `[B]`, int64, or a list: which stream of the seed each row draws from [0, 1, 2, …].
        loop: How tokens are drawn: None for transformers' own loops; a `FusedDecoding`, for greedy decoding and
            sampling, if a row's tokens too should depend on (seed, row, position) alone.
        streamer: A streamer for plain models; it gets the prompt too.
        impl: "triton", "torch" or "auto".

    Raises:
        InputError: If a setting is out of range.
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
            synced_gpus: Whether to continue until the other processes have finished; None to find out.
            streamer: Gets each step's tokens `[B]`.
            tokenizer: Unused: the stop strings' criterion has it already.
            assistant_model: Refused.
            **model_kwargs: Inputs of the forward passes, the cache among them.

        Returns:
            The output of transformers' loop; without beams and with `return_dict_in_generate` a `LatentOutput`.

        Raises:
            UnsupportedModeError: For encoder-decoders, assisted decoding, paged caches, companions that read ids, and
                with a cache for texts that may cross the switch of a long-rope member.
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
        refuse_adapter_names(_NAME, model, model_kwargs)
        refuse_processors(call.processors)
        assert isinstance(self.mixture, LatentMixture)
        steps = latent_steps_of(
            model,
            self.mixture,
            self.gates,
            generation_config,
            seed=self.seed,
            lengths=call.lengths,
            most_new=call.most_new,
            rows=call.keys.row,
            impl=self.impl,
        )
        ended = _Ended(stopping_criteria)
        shared: dict[str, Any] = {
            "logits_processor": with_capture(call.processors, steps),
            "stopping_criteria": ended,
            "generation_config": generation_config,
            "synced_gpus": call.synced,
            **model_kwargs,
            ARGUMENT: steps,
        }
        call.start_stream()
        if (log := log_on(model)) is not None:
            log.unreadable = "latent steps, whose mixtures no ids can say"
        with latent_inputs_installed(model):
            if beams > 1:
                return model._beam_search(input_ids, **shared)
            if self.loop is not None:
                out = self.loop(model, input_ids, streamer=call.streamer, **shared)
            else:
                out = model._sample(input_ids, streamer=call.streamer, **shared)
        if log is not None:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            log.mark(latent=_soft(steps, ended.steps, sequences.shape[1] - input_ids.shape[1]))
        return out if isinstance(out, torch.Tensor) else _output(out, steps, ended.steps, input_ids.shape[1])

    def _refuse_paged(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        cache = cache_of(model_kwargs)
        if generation_config.cache_implementation == "paged" or "Paged" in type(cache).__name__:
            raise UnsupportedModeError.of(
                _NAME,
                expected="a dynamic or static cache, or none",
                got="a paged cache, whose batches run without latent steps",
                remedy="Leave cache_implementation out.",
            )


class _Ended(StoppingCriteriaList):
    """Criteria that keep their result of each step."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._criteria = criteria  # maybe of a class of its own, too
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self._criteria(input_ids, scores, **kwargs)
        self.steps.append(done)
        return done


def _soft(steps: LatentSteps, ended: list[torch.Tensor], count: int) -> torch.Tensor:
    """`[B, N]`, bool: in the place of which of the N new tokens a mixture was fed back."""
    done = torch.stack(ended[:count], 1)  # on a GPU transformers' loop may run one step too many
    fed = [soft.to(done.device) for soft in steps.soft[: count - 1]]
    through = done.long().cumsum(1) > 0  # from a row's last token on
    return torch.stack([*fed, torch.zeros_like(done[:, 0])], 1) & ~through


def _output(out: Any, steps: LatentSteps, ended: list[torch.Tensor], start: int) -> LatentOutput:
    count = out.sequences.shape[1] - start
    device = out.sequences.device
    entropy, done = (torch.stack([x.to(device) for x in each[:count]], 1) for each in (steps.entropy, ended))  # [B, N]
    over = torch.cumsum(done.long().cumsum(1).clamp(max=1), 1) > 1  # after a row's last token
    soft = _soft(steps, ended, count).to(device)
    return LatentOutput(**out, soft=soft, entropy=entropy.masked_fill(over, torch.nan))
