"""The members' forward passes of one step, each on its part of the composite cache.

Members that are one model take one pass together where they can (`proxytune.models.members.shared_pass`).

On a GPU the base is launched first and the companions beside it (`proxytune.models.members.cuda_streams`), so their
host work happens while the device is busy with the base. Members on different devices overlap anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["LatentInputs", "Text", "Work", "run_members", "run_works"]

LatentInputs = Sequence[Mapping[str, Any] | None]
"""What each member takes in place of the ids; None for the ids."""


class Text(NamedTuple):
    """Tokens of one pass, `[B, N]`, with the mask and positions that `Member.forward` takes."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Work:
    """The pass of one member, or of several that are one model.

    Attributes:
        role: Its name among the streams of a device.
        device: Where it runs.
        call: Runs it; each member's raw logits.
        reads: The tensors that it reads.
        compiled: Whether it replays a graph.
    """

    role: str
    device: torch.device
    call: Callable[[], list[torch.Tensor]]
    reads: Iterable[torch.Tensor | None]
    compiled: bool = False


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
    works = [
        Work(
            group[0].member.role,
            group[0].member.device,
            partial(run_group, group, logits_to_keep),
            chain.from_iterable(map(_reads, group)),
            compiled=any(one.member.step is not None for one in group),
        )
        for group in running
    ]
    # Offloaded layers are loaded on a stream that only the device's default stream waits for.
    sides = None if getattr(cache, "offloading", False) else sides
    computed = run_works(works, [companion.device for companion in members[1:]], sides, thread)
    by_role = dict(precomputed)
    for group, logits in zip(running, computed, strict=True):
        by_role |= {one.member.role: z for one, z in zip(group, logits, strict=True)}
    return [by_role.get(member.role) for member in members]


def run_works(
    works: Sequence[Work],
    devices: Sequence[torch.device],
    sides: CompanionStreams | None,
    thread: SideThread | None,
) -> list[list[torch.Tensor]]:
    """Run passes, the base's first, and the others beside it where that is possible.

    `devices` are the companions'; `sides` and `thread` as in `run_members`.
    """
    eager = not any(work.compiled for work in works)
    if thread is not None and eager and may_split([work.device for work in works]):
        return thread.run([work.call for work in works])
    computed = []
    with ForkJoin(sides) as fork:
        for device in devices:
            fork.open(device)  # before the base is launched
        for i, work in enumerate(works):
            # Compiled steps share one memory pool for their graphs, so they take turns.
            if i == 0 or work.compiled:
                computed.append(work.call())
            else:
                computed.append(fork.run(work.role, work.device, work.call, work.reads))
    return computed


def _reads(one: MemberPass) -> Iterator[torch.Tensor | None]:
    """The tensors that a pass reads."""
    yield from (one.input_ids, one.attention_mask, one.position_ids)
    yield from (one.latent or {}).values()
    yield from tensors_of(one.cache)
