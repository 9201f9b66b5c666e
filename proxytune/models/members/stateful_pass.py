"""One pass of a model with recurrent layers: tokens to read again come first, and states are kept before it.

After a crop, the layers may be behind the text (`proxytune.models.members.rewind`). The missing tokens are read at the
front of the next pass, or in a pass of their own once that is cheaper: their cost in each round since has then come to
that of the pass, by the figures of `proxytune.costs.devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from proxytune.models.members.rewind import REACH, RewindableLayer

__all__ = ["StatefulPass", "kept_logits"]

Run = Callable[[dict[str, Any], Cache, int | torch.Tensor, Any], torch.Tensor]
"""From inputs, cache, logits to keep and latent inputs to logits `[B, K, V]`; a pass of the model."""


class StatefulPass:
    """A pass over the tokens that follow a cache with recurrent layers.

    Attributes:
        run: A pass of the model.
        cache: The model's cache, or its view of the composite one.
        layers: The cache's rewindable layers.
        one_by_one: Whether the model continues a cache rightly by single tokens only.
        seconds: From rows and positions to the seconds of a pass, roughly.
    """

    def __init__(
        self,
        run: Run,
        cache: Cache,
        layers: list[RewindableLayer],
        *,
        one_by_one: bool,
        seconds: Callable[[int, int], float],
    ) -> None:
        self.run, self.cache, self.layers = run, cache, layers
        self.one_by_one, self.seconds = one_by_one, seconds

    def __call__(self, given: dict[str, Any], logits_to_keep: int | torch.Tensor, latent: Any = None) -> torch.Tensor:
        """Read `given`, with `input_ids` `[B, N]`, a mask or None, and perhaps positions.

        Returns:
            Raw logits `[B, K, V]` of the new tokens that `logits_to_keep` names, see `Member.forward`.
        """
        lead, new = self.layers[0], given["input_ids"].shape[1]
        behind, told = lead.behind, given.get("position_ids")
        if lead.recording:
            lead.tape.append(lead.length, given["input_ids"], told)
        if not behind:
            lead.tape.spent = 0.0
        elif latent is not None or self._is_due(len(given["input_ids"]), behind, new):
            mask = given["attention_mask"]
            self.catch_up(None if mask is None else mask[:, :-new])
        else:
            again = self._missing()
            given = dict(given)
            for name in again.keys() & given.keys():
                given[name] = torch.cat([again[name], given[name].expand(len(again[name]), -1)], 1)
            if isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = torch.where(logits_to_keep < 0, logits_to_keep, logits_to_keep + behind)
            elif logits_to_keep == 0:
                logits_to_keep = new
        return self._read(given, logits_to_keep, latent)

    def catch_up(self, attention_mask: torch.Tensor | None) -> None:
        """Read the tokens that the states lack, in a pass of their own; mask `[B, length]` or None."""
        if self.layers[0].behind:
            self.layers[0].tape.spent = 0.0
            self._read({**self._missing(), "attention_mask": attention_mask}, 1, None)

    def _missing(self) -> dict[str, Any]:
        """The tokens to read again, `[B, behind]`, and their positions; takes all layers back to where they begin."""
        lead = self.layers[0]
        behind = lead.behind
        ids, positions = lead.tape.last(behind, before=lead.length)
        for layer in self.cache.layers:
            if isinstance(layer, RewindableLayer):
                layer.fall_back()
            else:
                layer.crop(-behind)
        return {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}

    def _is_due(self, rows: int, behind: int, new: int) -> bool:
        """Whether tokens that are read again are worth a pass of their own, which ends at a state to keep."""
        tape = self.layers[0].tape
        tape.spent += self.seconds(rows, behind + new) - self.seconds(rows, new)
        return tape.spent > self.seconds(rows, behind) or behind > REACH // 2

    def _read(self, given: dict[str, Any], logits_to_keep: int | torch.Tensor, latent: Any) -> torch.Tensor:
        new = given["input_ids"].shape[1]
        # Where a row's text begins in a later pass, some models take the padding before it for text.
        lead, mask = self.layers[0], given["attention_mask"]
        singly = self.one_by_one or not (lead.settled or mask is None)
        if not (singly and new > 1 and lead.read > 0):
            return self._pass(given, logits_to_keep, latent)
        parts = []
        for i in range(new):
            one = {n: x[:, i : i + 1] if n != "attention_mask" else x for n, x in given.items()}
            if mask is not None:
                one["attention_mask"] = mask[:, : mask.shape[1] - new + i + 1]
            fed = None if latent is None else {n: x[:, i : i + 1] for n, x in latent.items()}
            parts.append(self._pass(one, 1, fed))
        return kept_logits(torch.cat(parts, 1), logits_to_keep)

    def _pass(self, given: dict[str, Any], logits_to_keep: int | torch.Tensor, latent: Any) -> torch.Tensor:
        for layer in self.layers:
            layer.keep()
            layer.torn = True
        logits = self.run(given, self.cache, logits_to_keep, latent)
        for layer in self.layers:
            layer.read += given["input_ids"].shape[1]
            layer.torn = False
        self._forget_padding(given["attention_mask"])
        return logits

    def _forget_padding(self, mask: torch.Tensor | None) -> None:
        """Models ignore the mask `[B, read]` in passes over one token: undo what rows of padding alone have read.

        Waits for the device, until every row has read text.
        """
        if mask is None or self.layers[0].settled:
            return
        blank = mask.sum(1) == 0
        settled = not bool(blank.any())
        for layer in self.layers:
            layer.settled = settled
            if not settled:
                layer.forget_rows(blank)


def kept_logits(logits: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of logits `[B, N, V]` to keep: the last ones (0: all), or those that a tensor names."""
    if isinstance(logits_to_keep, torch.Tensor):
        return logits[:, logits_to_keep]
    return logits[:, -logits_to_keep:] if logits_to_keep else logits
