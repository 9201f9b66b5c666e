"""One decision on members' logits; the only place that picks Triton or torch.

============== ====================================================================================================
`step`         one decision: combine, measure, draw; takes `SamplingParams` and `Noise`, returns a `StepOutput`
`verify`       drafted tokens accepted or rejected so that nothing is lost; returns a `VerifyOutput`
`mix`          rows of an embedding, weighted: what a latent step feeds back
`combine`      the combined logits alone
============== ====================================================================================================
"""

from proxytune.ops.dispatch import Impl, choose, why_not_triton
from proxytune.ops.mix import mix
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import OUTPUTS, StepOutput, VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.step import combine, draw_logprobs, normalise_, step
from proxytune.ops.verify import verify

__all__ = [
    "OUTPUTS",
    "Impl",
    "Noise",
    "SamplingParams",
    "StepOutput",
    "VerifyOutput",
    "choose",
    "combine",
    "draw_logprobs",
    "mix",
    "normalise_",
    "step",
    "verify",
    "why_not_triton",
]
