"""The members' forward passes of one step, each on its part of the composite cache.

Members that are one model take one pass together where they can (`proxytune.models.members.shared_pass`).

On a GPU the base is launched first and the companions beside it (`proxytune.models.members.cuda_streams`), so their
host work happens while the device is busy with the base. Members on different devices overlap anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from proxytune.models.members.composite_cache import view
from proxytune.models.members.cpu_threads import SideThread, may_split
from proxytune.models.members.cuda_streams import CompanionStreams, ForkJoin, tensors_of
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.models.members.shared_pass import MemberPass, run_group

__all__ = ["LatentInputs", "Text", "run_members"]

LatentInputs = Sequence[Mapping[str, Any] | None]
"""What each member takes in place of the ids; None for the ids."""


class Text(NamedTuple):
    """Tokens of one pass, `[B, N]`, with the mask and positions that `Member.forward` takes."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


def run_members(
    members: Sequence[Member],
    spans: Sequence[tuple[int, int]],
    input_ids: torch.Tensor,
    *,
    cache: Cache | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    latent: LatentInputs,
    precomputed: Mapping[str, torch.Tensor],
    texts: Mapping[str, Text] | None = None,
    idle: Collection[str] = (),
    sides: CompanionStreams | None = None,
    thread: SideThread | None = None,
) -> list[torch.Tensor | None]:
    """Run every member over the tokens that follow the composite cache, with arguments as in `Member.forward`.

    `spans` is each member's first layer in the cache and one past its last. `precomputed` maps a role to `[B, J, V_i]`,
    logits of the first J ≤ N tokens, which that member's layers already hold; it does not run. `texts` maps a role to
    what that member reads, if it is not what the base reads; `idle` are the roles that do not run. `sides` are side
    streams for companions on a GPU and `thread` a side thread on a CPU; None runs the members in order.

    Returns:
        Raw logits of each member, `[B, K, V_i]`, in its dtype and on its device; None for one that is idle.
    """
    still = {*precomputed, *idle}
    of_base, own = Text(input_ids, attention_mask, position_ids), texts or {}
    groups: dict[int, list[MemberPass]] = {}  # by model
    for member, span, fed in zip(members, spans, latent, strict=True):
        if member.role not in still:
            part = None if cache is None else view(cache, *span)
            group = groups.setdefault(id(innermost(member.model)), [])
            group.append(MemberPass(member, part, *own.get(member.role, of_base), fed))
    running = list(groups.values())
    works = [partial(run_group, group, logits_to_keep) for group in running]
    eager = all(one.member.step is None for group in running for one in group)
    if thread is not None and eager and may_split([group[0].member.device for group in running]):
        computed = thread.run(works)
    else:
        # Offloaded layers are loaded on a stream that only the device's default stream waits for.
        computed = []
        with ForkJoin(None if getattr(cache, "offloading", False) else sides) as fork:
            for companion in members[1:]:
                fork.open(companion.device)  # before the base is launched
            for i, (group, work) in enumerate(zip(running, works, strict=True)):
                # Compiled steps share one memory pool for their graphs, so they take turns.
                if i == 0 or any(one.member.step is not None for one in group):
                    computed.append(work())
                else:
                    first = group[0].member
                    computed.append(fork.run(first.role, first.device, work, chain.from_iterable(map(_reads, group))))
    by_role = dict(precomputed)
    for group, logits in zip(running, computed, strict=True):
        by_role |= {one.member.role: z for one, z in zip(group, logits, strict=True)}
    return [by_role.get(member.role) for member in members]


def _reads(one: MemberPass) -> Iterator[torch.Tensor | None]:
    """The tensors that a pass reads."""
    yield from (one.input_ids, one.attention_mask, one.position_ids)
    yield from (one.latent or {}).values()
    yield from tensors_of(one.cache)
