"""One decision of a decoding loop: logits processors, then one `ops.step`.

Everything that a decision needs is on the device before the loop starts; a decision copies nothing there and reads
nothing back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache

from proxytune import ops
from proxytune.errors import NumericalError
from proxytune.generation.processor_plan import ProcessorPlan
from proxytune.generation.recorder import OutputRecorder
from proxytune.models.members.composite_cache import at_home
from proxytune.models.weighing import weights_on
from proxytune.ops.combination import Weights
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams

__all__ = ["DrawSettings", "MembersAndWeights", "Sampler", "combined", "failure", "row_on"]

MembersAndWeights = tuple[list[torch.Tensor], Weights]
"""Members' rows, `[B, V_i]` each, on one device, and their weights, as `ops.step` takes them."""

_TAKEN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class DrawSettings:
    """What all draws of a generation share.

    Attributes:
        plan: Which processors run, and which became settings.
        sampling: The settings; None for greedy decoding.
        noise: The noise keys at the next position; None with greedy decoding.
        width: The base's width V.
        usable: How many ids may be drawn. Processors see −inf for the others; the step does not see those columns.
        place: The device of the draws.
        impl: As in `ops.step`.
    """

    plan: ProcessorPlan
    sampling: SamplingParams | None
    noise: Noise | None
    width: int
    usable: int
    place: torch.device
    impl: ops.Impl

    def step(
        self, rows: list[torch.Tensor], weights: Weights, draws: int = 1, want: Collection[str] = ("tokens",)
    ) -> ops.StepOutput:
        """One `ops.step` on rows that end at `usable`, and on to the next position."""
        found = ops.step(
            rows, weights, sampling=self.sampling, noise=self.noise, draws=draws, want=want, impl=self.impl
        )
        if self.noise is not None:
            self.noise.position.add_(1)  # in place, so that a captured graph advances too
        return found


@dataclass(frozen=True, eq=False)
class Decision:
    """A draw at the end of a joint step's graph (`proxytune.models.members.joint_step.Tail`)."""

    settings: DrawSettings

    def __call__(self, logits: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """From raw logits `[B, 1, V_i]` and weights `[B, M]` to tokens `[B, 1]`, int64, −1 without a distribution."""
        s = self.settings
        rows = [row_on(s.place, z[:, -1]) for z in logits]
        rows[0] = rows[0][:, : s.usable]
        tokens = s.step(rows, weights).tokens
        assert tokens is not None
        return tokens

    def back(self) -> None:
        """Draw again at the same position."""
        if self.settings.noise is not None:
            self.settings.noise.position.sub_(1)


class Sampler:
    """From the members' rows to tokens: the processors that have to run, then one `ops.step`.

    Attributes:
        settings: What all steps share.
    """

    def __init__(self, settings: DrawSettings, cache: Cache | None = None) -> None:
        """Start at the noise's position, which every step advances in place: where the `cache` of graphs keeps it."""
        if settings.noise is not None and cache is not None:
            noise = settings.noise.at(at_home(cache, "noise", settings.noise.position))
            settings = replace(settings, noise=noise)
        self.settings = settings
        self._decision = Decision(settings)

    def __call__(
        self,
        members: Sequence[torch.Tensor],
        weights: Weights,
        input_ids: torch.Tensor,
        record: OutputRecorder | None = None,
        *,
        draws: int = 1,
        want: Collection[str] = ("tokens",),
        decided: torch.Tensor | None = None,
    ) -> tuple[ops.StepOutput, MembersAndWeights]:
        """Draw a token for each row, measure what `want` names, and go on to the next position.

        Args:
            members: Raw logits of the base and its companions, `[B, V_i]`; companions may be on other devices.
            weights: As in `ops.step`.
            input_ids: `[B, T]`, for the processors.
            record: Gets this step's scores and logits if they were requested; tokens do not depend on it.
            draws: How many tokens to draw without replacement.
            want: As in `ops.step`, measured on the distribution after the processors that had to run.
            decided: The tokens `[B, 1]` that `decision` drew in the graph of the pass; then none are drawn here.

        Returns:
            The step's output, with token −1 in a row without a distribution; and the rows it was drawn from. The rows
            may share the forward pass's memory: release them before the next pass.
        """
        s = self.settings
        rows = [row_on(s.place, x) for x in members]
        if rows[0].shape[1] > s.usable:
            rows[0] = rows[0][:, : s.usable]  # a view: higher ids are absent, not masked
        weights = weights_on(s.place, weights)
        logits = scores = rows[0]
        if s.plan.before or (record is not None and record.asked):
            logits = combined((rows, weights), s.width, s.impl).to(input_ids.device)  # [B, V]
            scores = s.plan.before(input_ids, logits)  # [B, V]
        if s.plan.before:
            rows, weights = [row_on(s.place, scores)], (1.0,)
        # The host has less to do; of what is found then, tokens alone are sure to be copied before anyone keeps them.
        quiet = tuple(want) == ("tokens",) and draws == 1 and not torch.compiler.is_compiling()
        if decided is not None:
            found = ops.StepOutput(tokens=decided)
        else:
            with torch.inference_mode() if quiet else nullcontext():
                found = s.step(rows, weights, draws=draws, want=want)
        if record is not None and record.scores is not None:
            record.scores += (s.plan.warpers(input_ids, scores),)
        if record is not None and record.logits is not None:
            record.logits += (logits,)
        return found, (rows, weights)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled; otherwise the argmax is taken."""
        return self.settings.sampling is not None

    @property
    def forks(self) -> bool:
        """Whether the temperature depends on a fork threshold."""
        sampling = self.settings.sampling
        return sampling is not None and sampling.fork_threshold is not None

    def decision(self, record: OutputRecorder) -> Decision | None:
        """What a graph of the pass can end in; None if processors or the record have to see scores in between."""
        return None if self.settings.plan.before or record.asked else self._decision

    def draw_logprobs(self, rows: MembersAndWeights, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ops.draw_logprobs`: log-probabilities of ids `[B, K]` (−1 for none) under the step's distribution."""
        assert self.settings.sampling is not None
        return ops.draw_logprobs(*rows, sampling=self.settings.sampling, ids=ids.to(self.settings.place))

    def failure(self, rows: MembersAndWeights, bad: torch.Tensor, step: int) -> NumericalError:
        """The error that says which row of `bad` (`[B]`, bool) had no distribution, and why. Waits for the device."""
        return failure(
            rows, int(bad.int().argmax()), len(bad), step, bool(self.settings.plan.before), self.settings.impl
        )


def row_on(place: torch.device, x: torch.Tensor) -> torch.Tensor:
    """Rows of logits `[N, V_i]` as a step takes them: device, float dtype, contiguous; copied only if needed."""
    # A non-blocking copy is safe only towards a GPU, see `proxytune.formulas.shift.shift`.
    x = x.to(place, x.dtype if x.dtype in _TAKEN else torch.float32, non_blocking=place.type != "cpu")
    return x if x.stride(1) == 1 else x.contiguous()


def combined(rows: MembersAndWeights, width: int, impl: ops.Impl) -> torch.Tensor:
    """Combined logits for processors, `[N, V]`, float32; −inf in columns that the base's rows lack."""
    scores = ops.step(*rows, want=("scores",), impl=impl).scores
    assert scores is not None
    missing = width - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores


def failure(
    rows: MembersAndWeights, row: int, batch: int, step: int, processed: bool, impl: ops.Impl
) -> NumericalError:
    """The error that says that a row had no distribution, and why. Waits for the device.

    `step` counts the tokens generated before; `processed` says whether logits processors had run.
    """
    lse = ops.step(*rows, want=("lse",), impl=impl).lse
    assert lse is not None
    masked = float(lse[row]) == -torch.inf
    who = "after the logits processors" if processed else "of the members"
    error = NumericalError.of(
        f"row {row} of {batch}, step {step} (new tokens counted from 0)",
        expected="logits of which a token can be drawn",
        got=f"−inf for every token, {who}" if masked else f"NaN or +inf among the logits {who}",
        remedy="See which constraints leave no token, or relax them."
        if masked
        else "Run the members in bfloat16 or float32 rather than float16, look at model.member_logits(...) on this "
        "row's prefix, or pass remove_invalid_values=True to go on with finite values in their place.",
    )
    assert isinstance(error, NumericalError)
    return error
