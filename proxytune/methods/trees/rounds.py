"""What is left of a budget, spent on further rounds.

A first round counts every text with the most tokens that it can have, since nothing is known of their lengths. Where
texts end earlier, it leaves tokens that branches could have used. A further round reads the prompt again and counts a
text with the mean length of those so far; a longer one goes on with what others hand back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from proxytune.errors import BudgetWarning, InputError
from proxytune.generation.seeds import seed_of, streams_of
from proxytune.methods.trees.loop import TreeLoop
from proxytune.methods.trees.output import warn_of_shortage
from proxytune.methods.trees.tree import ForkTree
from proxytune.models.own_prompts import picked_prompts

__all__ = ["grow_in_rounds"]


@torch.no_grad()
def grow_in_rounds(
    model: Any, loop: TreeLoop, input_ids: torch.Tensor, *, streams: int | None = None, **generate: Any
) -> list[ForkTree]:
    """Grow a tree for each prompt, and further ones while the budget has room for the leaves that are missing.

    A round's leaves count in proportion to their number. Their weighted votes and means are not unbiased, as those of
    one round are: how many rounds there are depends on how long the texts were. Short ones count too little, likely
    since they leave room for more leaves, among which each counts less. With six siblings of at most four tokens, a
    prompt of three and a budget of 16, a text of one token got a share of 0.216; its probability was 0.257 (6,000
    trees, against all texts enumerated). A budget with room for all leaves in the first round has no such bias. Texts
    that the budget cut count as the short texts that they then are. Branches of a round share its text; no round shares
    text with another. Greedy decoding has one round.

    Args:
        model: A composed model, or a plain causal LM.
        loop: A `ForkDecoding` or `SiblingDecoding` with `max_total_tokens`; without one there is one round.
        input_ids: `[B, T]`, int64, padded at the left.
        streams: How many noise streams the caller uses in all: round r of a prompt draws from its stream plus
            r · streams. By default the batch's.
        **generate: Further arguments of `generate()`, such as the attention mask and the settings of the draw.

    Returns:
        A tree per prompt, with all its leaves. `planned`, `len(tree)` and `cut` say how many there should have been,
        are, and were cut.

    Raises:
        InputError: If `generate` sets what the rounds set themselves.
        BudgetError: If the budget leaves no token to generate after a prompt.

    Warns:
        BudgetWarning: If the budget had no room for all leaves in the end.
    """
    own = sorted({"custom_generate", "num_return_sequences"} & generate.keys())
    if own:
        raise InputError.of(
            "generate()",
            expected="no argument that the rounds set themselves",
            got=", ".join(own),
            remedy="Leave it out; repeat a prompt's row for several trees of it.",
        )
    mask, prompts = generate.pop("attention_mask", None), generate.pop("prompts", None)
    generate["return_dict_in_generate"] = True
    ids = streams_of(loop.stream_ids, len(input_ids)).tolist()
    streams = len(ids) if streams is None else streams
    loop = replace(loop, seed=seed_of(loop.seed))

    def grow(how: TreeLoop, rows: Sequence[int], drawn_from: Sequence[int]) -> list[ForkTree]:
        chosen = torch.tensor(list(rows), device=input_ids.device)
        given = generate if mask is None else generate | {"attention_mask": mask.index_select(0, chosen)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)  # a round's; said of all of them at the end
            out = model.generate(
                input_ids.index_select(0, chosen),
                custom_generate=replace(how, stream_ids=list(drawn_from)),
                **picked_prompts(prompts, rows),
                **given,
            )
        trees: list[ForkTree] = out.trees
        return trees

    config = generate.get("generation_config") or model.generation_config
    samples = generate.get("do_sample", config.do_sample)  # another greedy round would only repeat the first
    trees = []
    for row, first in enumerate(grow(loop, range(len(ids)), ids)):
        rounds, spent = [first], first.tokens
        length = input_ids.shape[1] if mask is None else int(mask[row].sum())
        while loop.max_total_tokens is not None and first.no_room and samples:
            lengths = [len(leaf) for tree in rounds for leaf in tree]
            usual = math.ceil(sum(lengths) / len(lengths))
            missing = first.planned - len(lengths)
            if missing == 0 or loop.max_total_tokens - length - spent < usual:
                break
            more = replace(loop.asking_for(missing), max_total_tokens=loop.max_total_tokens - spent, reserve=usual)
            rounds += grow(more, [row], [ids[row] + len(rounds) * streams])
            spent += rounds[-1].tokens
        trees.append(_joined(rounds, row))
    warn_of_shortage(type(loop).__name__, loop.max_total_tokens, trees)
    return trees


def _joined(rounds: list[ForkTree], prompt: int) -> ForkTree:
    """One tree with all leaves, numbered through; a round's weights are scaled by its share of the leaves."""
    planned, no_room = rounds[0].planned, rounds[0].no_room
    if len(rounds) == 1:
        rounds[0].prompt = prompt
        return rounds[0]
    leaves = sum(map(len, rounds))
    out = ForkTree(prompt, planned=planned, no_room=no_room)
    for tree in rounds:
        share = math.log(len(tree) / leaves)
        for branch in tree:
            branch.number = len(out.branches)
            branch.log_weight += share
            out.branches.append(branch)
    return out
