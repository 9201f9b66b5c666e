"""One decision on the members' logits, by Triton or torch.

`step` combines, measures and draws; `verify` accepts or rejects drafted tokens losslessly; `mix` sums embedding rows
for a latent step; `combine` gives the combined logits alone.
"""

from proxytune.ops.combination import Combination
from proxytune.ops.dispatch import Impl, choose, why_not_triton
from proxytune.ops.mix import mix
from proxytune.ops.noise import Noise
from proxytune.ops.offsets_and_floors import floor_of_nucleus, floor_of_top, log_normalisers
from proxytune.ops.outputs import OUTPUTS, StepOutput, VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.step import combine, draw_logprobs, normalise_, step
from proxytune.ops.verify import verify

__all__ = [
    "OUTPUTS",
    "Combination",
    "Impl",
    "Noise",
    "SamplingParams",
    "StepOutput",
    "VerifyOutput",
    "choose",
    "combine",
    "draw_logprobs",
    "floor_of_nucleus",
    "floor_of_top",
    "log_normalisers",
    "mix",
    "normalise_",
    "step",
    "verify",
    "why_not_triton",
]
