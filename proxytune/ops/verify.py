"""Lossless verification of drafted tokens (speculative sampling)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxytune.errors import UnsupportedModeError
from proxytune.ops.checks import refuse_drafts, refuse_members
from proxytune.ops.combination import Weights, in_float32
from proxytune.ops.dispatch import Impl, choose, kernels, packed
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import MemberRows
from proxytune.ops.torch_impl.verify import judge

__all__ = ["verify"]


def verify(
    members: Sequence[torch.Tensor],
    weights: Weights = (1.0,),
    *,
    drafted: torch.Tensor,
    draft: torch.Tensor | None = None,
    sampling: SamplingParams,
    noise: Noise,
    impl: Impl = "auto",
) -> VerifyOutput:
    """Accept or reject drafted tokens so that the output is distributed as draws of `step`.

    A draft x drawn from q is accepted with probability min(1, p(x) / q(x)), where p is what `step` would draw from. At
    the first rejection a token is drawn from the normalised residual max(0, p − q); if none is rejected, the bonus
    token is drawn from p (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). K = 0 is a
    plain draw.

    Drafts may use the same keys: `step([rows], sampling=…, noise=noise.at(position))`. Acceptance and the residual's
    draw use other words of the noise. A token drawn where there was no draft equals `step`'s with these keys, bit for
    bit. Whether a position has a draft may depend on the text before it and on q, but not on the drafted token:
    dropping drafts by what was drawn changes the distribution.

    If a draft is rejected although p equals q to rounding, the token is drawn from p. The same holds if the draft's row
    has no distribution (NaN, +inf, all −inf): the draft is then treated as missing.

    Cannot be traced by torch.compile: call it outside the compiled function.

    Args:
        members: As in `step`, `[B · (K + 1), V_i]`: row b · (K + 1) + j holds the logits of text b after its first j
            drafts.
        weights: As in `step`; what is per row is of `B · (K + 1)` rows.
        drafted: `[B, K]`, int64, on the logits' device; −1 from the first missing draft on. A token ≥ V has probability
            0 and is rejected.
        draft: `[B · K, V_q]`, float32, float16 or bfloat16: the logits the drafts were drawn from, with the same
            `sampling`. None if they were not drawn: each is then accepted with probability p(x), which is right for any
            drafts that do not depend on the words of the noise used for acceptance.
        sampling: Sampling parameters of B rows, each for all positions of its text.
        noise: Noise keys of B rows, at the position of `drafted[:, 0]`; later drafts take the positions after it.
        impl: As in `step`.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, or k is larger than V or V_q. Nothing has been
            launched then.
        UnsupportedModeError: If torch.compile traces this call.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModeError.of(
            "verify",
            expected="a call outside torch.compile",
            got="a call that torch.compile traces",
            remedy="Call verify() outside the compiled function.",
        )
    refuse_members(members, weights)
    refuse_drafts(members[0], drafted, draft, sampling, noise)
    weights = in_float32(weights)
    draft = draft if drafted.shape[1] else None
    if choose(impl, members[0].device) == "triton":
        given = drafted.contiguous()
        return VerifyOutput(*kernels().verify(members, weights, given, draft, packed(sampling), packed(noise)))
    proposal = None if draft is None else MemberRows([draft], (1.0,))
    return VerifyOutput(*judge(MemberRows(members, weights), proposal, drafted, sampling, noise))
