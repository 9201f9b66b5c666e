"""The members' forward passes of one step, each on its part of the composite cache.

On a GPU the base is launched first and the companions beside it (`proxytune.models.members.cuda_streams`), so their
host work happens while the device is busy with the base. Members on different devices overlap anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from transformers.cache_utils import Cache

from proxytune.models.members.composite_cache import view
from proxytune.models.members.cpu_threads import SideThread, may_split
from proxytune.models.members.cuda_streams import CompanionStreams, ForkJoin, tensors_of
from proxytune.models.members.member import Member

__all__ = ["LatentInputs", "run_members"]

LatentInputs = Sequence[Mapping[str, torch.Tensor] | None]
"""What each member takes in place of the ids; None for the ids."""


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
    sides: CompanionStreams | None = None,
    thread: SideThread | None = None,
) -> list[torch.Tensor]:
    """Run every member over the tokens that follow the composite cache.

    Args:
        members: The members, the base first.
        spans: Each member's first layer in the composite cache, and one past its last.
        input_ids: `[B, N]`, int64.
        cache: The composite cache, extended in place; None to run without.
        attention_mask: `[B, past + N]`, 1 for tokens and 0 for padding; None if there is no padding.
        position_ids: `[B, N]` or `[1, N]`; None to count.
        logits_to_keep: The number of last positions to keep (0: all), or a tensor of positions.
        latent: What each member takes in place of the ids.
        precomputed: Role → `[B, J, V_i]`, logits of the first J ≤ N tokens, which the member's part of the cache
            already holds. That member does not run.
        sides: Side streams for companions on a GPU; None to run the members in order.
        thread: Side thread for companions on a CPU; None likewise.

    Returns:
        Raw logits of each member, `[B, K, V_i]`, in its dtype and on its device.
    """
    running = [(m, span, fed) for m, span, fed in zip(members, spans, latent, strict=True) if m.role not in precomputed]
    works, parts = [], []
    for member, span, fed in running:
        part = None if cache is None else view(cache, *span)
        parts.append(part)
        works.append(
            partial(
                member.forward,
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=part,
                logits_to_keep=logits_to_keep,
                latent=fed,
            )
        )
    eager = all(member.step is None for member, _, _ in running)
    if thread is not None and eager and may_split([member.device for member, _, _ in running]):
        found = thread.run(works)
    else:
        # Offloaded layers come back on a stream for which only the device's default stream waits.
        found = []
        with ForkJoin(None if getattr(cache, "offloading", False) else sides) as fork:
            for companion in members[1:]:
                fork.open(companion.device)  # before the base is launched
            for i, ((member, _, fed), work, part) in enumerate(zip(running, works, parts, strict=True)):
                # Compiled steps share one pool of memory for their graphs, so they take turns.
                if i == 0 or member.step is not None:
                    found.append(work())
                else:
                    reads = chain((input_ids, attention_mask, position_ids), (fed or {}).values(), tensors_of(part))
                    found.append(fork.run(member.role, member.device, work, reads))
    said = dict(precomputed) | {member.role: logits for (member, _, _), logits in zip(running, found, strict=True)}
    return [said[member.role] for member in members]
