"""The reference for the gates of latent steps: one row at a time in plain Python.

It keeps lists and scans texts from the left, with no tensor in it. In generations it is driven with entropies that are
recomputed in float64 from the scores, and what the model was really fed, an embedding of the token or not, is read off
at the model's door.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from proxytune.methods.latent.gates import LatentGates

NAN = math.nan
PLAIN = LatentGates(cold_steps=None, loop_ngram=None)
"""Every gate wide open."""


@dataclass
class Row:
    """One text, and what its gates remember of it."""

    gates: LatentGates
    text: list[int]
    start: int = -1
    cold: int = 0
    run: int = 0
    stopped: bool = False
    latent: bool = True
    block: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = len(self.text) if self.start < 0 else self.start
        as_list = lambda ids: [ids] if isinstance(ids, int) else list(ids or ())  # noqa: E731
        self.begin, self.end = as_list(self.gates.begin_ids), as_list(self.gates.end_ids)
        self.listed = {*self.gates.discrete_ids, *self.begin, *self.end}

    def is_open(self) -> bool:
        """Reading from the left: what has happened last?"""
        if not self.end:
            return True
        open_ = not self.begin
        for n in range(1, len(self.text) + 1):
            read = self.text[:n]
            if self.begin and read[-len(self.begin) :] == self.begin:
                open_ = True
            if (self.begin or n > self.start) and read[-len(self.end) :] == self.end:
                open_ = False
        return open_

    def due(self) -> int:
        """The token that a cold stop writes next; −1 for none."""
        if self.gates.cold_steps is None or not self.end or not self.stopped or not self.is_open():
            return -1
        new = self.text[self.start :]
        for n in range(len(self.end) - 1, -1, -1):
            if new[len(new) - n :] == self.end[:n] and n <= len(new):
                return self.end[n]
        raise AssertionError

    def step(self, token: int, entropy: float, spread: float) -> bool:
        """Whether the token is fed back softly."""
        g = self.gates
        was_open = self.is_open()
        self.text.append(token)

        self.cold = self.cold + 1 if was_open and entropy < g.cold_entropy else 0
        if g.cold_steps is not None and self.cold >= g.cold_steps:
            self.stopped = True
        if self.end and not was_open:
            self.stopped = False

        if not was_open:
            self.block, self.latent = [], True
        elif not self.block:
            self.block, self.latent = ([] if math.isnan(spread) else [spread]), True
        else:
            if g.dwell is not None:
                least = g.dwell if isinstance(g.dwell, int) else g.dwell[0 if self.latent else 1]
                moved = spread < self.block[0] if self.latent else spread > self.block[0]
                if moved and len(self.block) >= least:
                    self.block, self.latent = [], not self.latent
            self.block.append(spread)

        soft = was_open and not self.stopped and self.latent
        soft = soft and spread >= g.min_entropy and token not in self.listed
        if g.max_run is not None and self.run >= g.max_run:
            soft = False
        if g.loop_ngram is not None:
            new, n = self.text[self.start :], g.loop_ngram
            seen = [tuple(new[i : i + n]) for i in range(len(new) - n + 1)]
            if seen and seen.count(seen[-1]) >= g.loop_repeats:
                soft = False
        self.run = self.run + 1 if soft else 0
        return soft


OPEN, CLOSE = [200], [210]
OPEN3, CLOSE3 = [200, 201, 202], [210, 211, 212]


@contextmanager
def watched(model: Any) -> Iterator[list[torch.Tensor]]:
    """What a plain model is fed in each step after the prompt."""
    fed: list[torch.Tensor] = []

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None and kwargs["inputs_embeds"].shape[1] == 1:
            fed.append(kwargs["inputs_embeds"][:, 0].clone())

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


def measured(scores: torch.Tensor, token: int, count: int = 10) -> tuple[float, float]:
    """H in nats and Ĥ of the likeliest, the token among them; in float64, of one row."""
    z = scores.double().numpy()
    with np.errstate(all="ignore"):
        p = np.exp(z - z.max())
        p = p / p.sum()
        entropy = -sum(x * math.log(x) for x in p if x > 0) if np.isfinite(p).all() else NAN
        top = list(np.argsort(-p, kind="stable")[:count])
        if token not in top:
            top[-1] = token
        q = p[top] / p[top].sum()
        spread = -sum(x * math.log(x) for x in q if x > 0) / math.log(count) if np.isfinite(q).all() else NAN
    return float(entropy), float(spread)
