"""The texts of a recorded `generate()`: cut out of what it returned, and read again where the log has another text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation import GenerationMode

from proxytune.errors import UnsupportedModeError
from proxytune.generation.call_log import Arrays, CallLog
from proxytune.generation.call_watch import Seen
from proxytune.generation.sampler import MembersAndWeights
from proxytune.models.ensemble import Ensemble
from proxytune.models.own_prompts import ids_and_mask, roles_with_prompts
from proxytune.models.scored_texts import Prompts
from proxytune.models.scoring import parts_of
from proxytune.trace import SIGNALS, UNKNOWN
from proxytune.validation import Ids

__all__ = ["about", "cut", "fits", "ids_of", "origins_of", "read_into", "reread"]

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def ids_of(named: Mapping[str, Any]) -> Any:
    """The prompt among the arguments of `generate()`."""
    return named.get("input_ids") if named.get("inputs") is None else named["inputs"]


def origins_of(sequences: torch.Tensor, named: Mapping[str, Any], log: CallLog) -> list[int]:
    """The row of the prompts that each returned text goes on from."""
    if log.origins is not None:
        return log.origins
    each = max(1, len(sequences) // len(ids_of(named)))
    return [row // each for row in range(len(sequences))]


def cut(
    sequences: torch.Tensor, named: Mapping[str, Any], seen: Seen, origins: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """The new tokens and the prompt of each row that `generate()` returned, padding left out."""
    ids = ids_of(named)
    mask = named.get("attention_mask") if seen.mask is None else seen.mask
    width, rows = ids.shape[1], sequences.tolist()
    prompts = [row[:width] for row in rows]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
        # Wider where another member's prompt is longer, and the base's was padded for the call.
        flags = mask[:, -width:].bool().tolist()
        kept = [flags[origin * len(flags) // len(ids)] for origin in origins]
        prompts = [[t for t, on in zip(row, of, strict=True) if on] for row, of in zip(prompts, kept, strict=True)]
    ends, pad = (getattr(seen.config, name, None) for name in ("_eos_token_tensor", "_pad_token_tensor"))
    stops = set() if ends is None else set(ends.flatten().tolist())
    return [_upto(row[width:], stops, None if pad is None else int(pad)) for row in rows], prompts


def _upto(new: list[int], stops: set[int], pad: int | None) -> list[int]:
    """New tokens up to the end token, or to the padding after another end."""
    end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
    if end is not None:
        return new[:end]
    while pad is not None and pad not in stops and new and new[-1] == pad:
        new = new[:-1]
    return new


def fits(log: CallLog, rows: list[Arrays], new: torch.Tensor, seen: Seen, assistant: Any) -> bool:
    """Whether the rows recorded are the new tokens returned, `[B, N]`; a row that has ended may be shorter."""
    # Elsewhere the tokens may agree by chance: beams go on with another row's text, and drafts are thrown away.
    one_by_one = seen.config is not None and seen.config.get_generation_mode(assistant) in _ONE_BY_ONE
    if len(rows) != len(new) or not (log.by_loop or (one_by_one and log.covers(new.shape[1]))):
        return False
    return all(
        0 < len(one["tokens"]) <= len(text) and one["tokens"].tolist() == text[: len(one["tokens"])]
        for one, text in zip(rows, new.tolist(), strict=True)
    )


def reread(
    log: CallLog, new: list[list[int]], prompts: list[list[int]], named: Mapping[str, Any], origins: Sequence[int]
) -> list[Arrays]:
    """Read the texts again, all members, in as few passes as memory allows; the arrays of each."""
    if named.get("pixel_values") is not None:
        raise UnsupportedModeError.of(
            "a recording",
            expected="greedy decoding or sampling: texts of beams, trees and assisted decoding are read again",
            got="a prompt with images, which is not read again",
            remedy="Generate greedily or by sampling.",
        )
    ensemble = Ensemble.of(log.model)
    again = CallLog(log.model, log.top, log.roles)
    whole_texts = [i for i, text in enumerate(new) if text]
    if not whole_texts:
        return [_nothing(log)] * len(new)
    roles = roles_with_prompts(ensemble.members) if ensemble.composed else []
    given: Any = [prompts[i] for i in whole_texts]
    if roles:
        given = {"base": given}
        for role in roles:
            ids, mask = ids_and_mask(named["prompts"][role], f"prompts[{role!r}]", log.model)
            rows = [origins[i] if len(ids) > 1 else 0 for i in whole_texts]  # one prompt serves all
            given[role] = [ids[row][mask[row].bool()].tolist() for row in rows]
    read_into(again, log.model, [new[i] for i in whole_texts], given)
    found = iter(again.rows())
    return [next(found) if text else _nothing(log) for text in new]


def read_into(log: CallLog, model: Any, texts: Sequence[Ids | torch.Tensor], prompts: Prompts | None) -> None:
    """Add the decisions that texts would have been, read after their prompts by all members."""
    weighing = Ensemble.of(model).weighing
    for part in parts_of(model, texts, prompts=prompts):
        drawn_from: MembersAndWeights = ([x for x in part.members if x is not None], (1.0,))
        opened = None
        if weighing is not None:
            drawn_from = weighing(part.members, part.steps)
            if weighing.gate is not None:
                assert part.members[0] is not None
                opened = weighing.open(part.members[0])
        log.add(
            drawn_from, part.members, part.targets, part.steps,
            usable=part.usable, row=part.texts, alive=part.scored, gate=opened,
        )  # fmt: skip


def _nothing(log: CallLog) -> Arrays:
    """The arrays of an empty text."""
    shape = (0, len(log.roles) + 1, log.top)
    empty: Arrays = {name: np.zeros(0, np.float32) for name in ("logprobs", "entropy", "kl", "shift")}
    empty |= {"tokens": np.zeros(0, np.int32), "base_rank": np.zeros(0, np.int32)}
    empty |= {name: np.full(0, UNKNOWN, np.int8) for name in SIGNALS}
    return empty | {"top_ids": np.zeros(shape, np.int32), "top_logprobs": np.zeros(shape, np.float32)}


def about(ensemble: Ensemble, named: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What a trace says of its run; `config` is that of a `generate()`, None for texts that were read."""
    loop = named.get("custom_generate")
    found: dict[str, Any] = {
        "model": getattr(ensemble.model.config, "_name_or_path", "") or type(ensemble.model).__name__
    }
    if config is not None:  # greedy decoding is that of temperature 0
        found["loop"] = "generate" if loop is None else type(loop).__name__
        found["temperature"] = float(config.temperature or 1.0) if config.do_sample else 0.0
    if ensemble.composed:
        found["members"] = {
            role: getattr(m.config, "_name_or_path", "") or type(m).__name__ for role, m in ensemble.models
        }
        found["formula"] = str(ensemble.model.formula)
    return found
