"""Drafted tokens accepted or rejected, so that nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float

import torch

from proxytune.errors import UnsupportedModeError
from proxytune.ops.checks import refuse_drafts, refuse_members
from proxytune.ops.dispatch import Impl, choose, kernels, packed
from proxytune.ops.noise import Noise
from proxytune.ops.outputs import VerifyOutput
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import MemberRows
from proxytune.ops.torch_impl.verify import judge

__all__ = ["verify"]


def verify(
    members: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor = (1.0,),
    *,
    drafted: torch.Tensor,
    draft: torch.Tensor | None = None,
    sampling: SamplingParams,
    noise: Noise,
    impl: Impl = "auto",
) -> VerifyOutput:
    """Accept or reject drafted tokens so that what comes out is distributed as draws of `step` are.

    A draft x drawn from q is accepted with probability min(1, p(x) / q(x)), with p what `step` would draw from there;
    at the first that is not, a token is drawn from the residual max(0, p − q), normalised; after the last one, from p
    (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). K = 0 is a draw.

    The drafts may be drawn with the same keys: `step([rows], sampling=…, noise=noise.at(position))`. The decision and
    the residual's draw take other words of the noise. A draw where no draft stood is `step`'s with these keys, bit for
    bit. Whether a position has a draft may depend on the text before it and on q, and on nothing of the draft itself:
    drafts that are left out because of what was drawn make the rest another distribution.

    Where p is q to rounding and a draft is rejected all the same, the token is drawn from p. So it is where the draft's
    row has no distribution (NaN, +inf, all −inf): the draft is ignored then, as one that is not there.

    Not for use inside torch.compile: call it beside what is compiled.

    Args:
        members: As in `step`, `[B · (K + 1), V_i]`: row b · (K + 1) + j follows text b with its first j drafts.
        weights: One finite weight per member, or a float32 tensor `[B · (K + 1), M]`.
        drafted: `[B, K]`, int64, on the logits' device; −1 for no draft, from there on in that row. A token past V has
            probability 0 and is rejected.
        draft: `[B · K, V_q]`, float32, float16 or bfloat16: the logits that the drafts were drawn from, with the same
            settings. None where they were not drawn: they are accepted with probability p(x), which is right for any
            drafts that do not depend on the noise's decisions.
        sampling: The settings of B rows, each for all positions of its text.
        noise: The keys of B rows, at the position of `drafted[:, 0]`; those that follow take the positions after it.
        impl: As in `step`.

    Returns:
        The tokens, and how many drafts were accepted.

    Raises:
        InputError: If shapes, dtypes, devices or strides do not fit, or k is larger than V or V_q. Nothing has been
            launched then.
        UnsupportedModeError: If torch.compile is about to take this into a graph.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModeError.of(
            "verify", expected="a call outside of a graph", got="torch.compile", remedy="Compile what is around it."
        )
    refuse_members(members, weights)
    refuse_drafts(members[0], drafted, draft, sampling, noise)
    weights = weights if isinstance(weights, torch.Tensor) else tuple(c_float(w).value for w in weights)
    draft = draft if drafted.shape[1] else None
    if choose(impl, members[0].device) == "triton":
        weights = weights.contiguous() if isinstance(weights, torch.Tensor) else weights
        given = drafted.contiguous()
        return VerifyOutput(*kernels().verify(members, weights, given, draft, packed(sampling), packed(noise)))
    proposal = None if draft is None else MemberRows([draft], (1.0,))
    return VerifyOutput(*judge(MemberRows(members, weights), proposal, drafted, sampling, noise))
