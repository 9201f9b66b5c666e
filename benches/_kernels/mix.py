"""`proxytune.ops.mix` in `bench_kernels.py`: mixtures of embeddings, as a latent step feeds them back.

The composition to compare with selects the rows, sums them by einsum in float32, and rounds. It has no fallback for
mixtures that are not finite, no rows that are left alone, and its weights of 0 do not mask a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from proxytune.ops import Impl
from proxytune.ops.mix import mix

OURS, EAGER = "proxytune", "eager"
VOCABULARY = 128_256
BYTES = 2  # bfloat16
Given = list[torch.Tensor]


@dataclass(frozen=True)
class Mixture:
    """One shape of a mixture: B rows, width D, K candidates, N = `size` rows of the table."""

    rows: int
    width: int = 4096
    candidates: int = 10
    size: int = VOCABULARY

    @property
    def bytes(self) -> int:
        """Bytes of the candidates' rows and of the output."""
        return self.rows * (self.candidates + 1) * self.width * BYTES


MIXTURES = (Mixture(1), Mixture(8), Mixture(64))


class Clock(Protocol):
    """Runs and times on a GPU, e.g. `cuda.CudaBench`."""

    def bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        ...

    def replayed(self, calls: list[Callable[[], Any]], cold: bool) -> float:
        """Microseconds per call."""
        ...


def given(mixture: Mixture, device: str, seed: int = 0) -> Given:
    """Table, ids, weights and tokens; the ids are spread over the whole table."""
    random = torch.Generator(device).manual_seed(seed)
    table = torch.randn(mixture.size, mixture.width, generator=random, device=device, dtype=torch.bfloat16)
    return [table, *_asked(mixture, device, random)]


def _asked(mixture: Mixture, device: str, random: torch.Generator) -> Given:
    shape = (mixture.rows, mixture.candidates)
    ids = torch.randint(mixture.size, shape, generator=random, device=device)
    weights = torch.randn(shape, generator=random, device=device).softmax(1)
    return [ids, weights, ids[:, 0].contiguous()]


def ours(impl: Impl) -> Callable[[Given], torch.Tensor]:
    """The mixture by `proxytune.ops.mix.mix`."""

    def run(x: Given) -> torch.Tensor:
        table, ids, weights, tokens = x
        return mix(table, ids, weights, tokens=tokens, soft=None, impl=impl)

    return run


def eager(x: Given) -> torch.Tensor:
    """The mixture as a composition of torch functions."""
    table, ids, weights, _ = x
    rows = table.index_select(0, ids.flatten()).view(*ids.shape, -1)
    return torch.einsum("bk,bkd->bd", weights, rows.float()).to(table.dtype)


def measure_gpu(clock: Clock, mixtures: tuple[Mixture, ...] = MIXTURES, device: str = "cuda") -> list[dict[str, Any]]:
    """Check against torch, then time, L2-cold and warm; returns the JSON values.

    Raises:
        SystemExit: If a mixture differs from torch's in any bit.
    """
    bandwidth = clock.bandwidth()
    records = []
    for mixture in mixtures:
        x = given(mixture, device)
        if not torch.equal(ours("auto")(x), ours("torch")(x)):
            raise SystemExit(f"mix, B={mixture.rows}, D={mixture.width}: other bits than torch's")
        random = torch.Generator(device).manual_seed(1)
        apart = [[x[0], *_asked(mixture, device, random)] for _ in range(16)]  # other rows of the table each
        times = {}
        for name, call in ((OURS, ours("auto")), (EAGER, eager)):
            cold: list[Callable[[], Any]] = [lambda a=a, call=call: call(a) for a in apart]  # type: ignore[misc]
            warm: list[Callable[[], Any]] = [lambda x=x, call=call: call(x)] * len(apart)  # type: ignore[misc]
            times[name] = {
                "cold": round(clock.replayed(cold, cold=True), 3),
                "warm": round(clock.replayed(warm, cold=False), 3),
            }
        floor = mixture.bytes / bandwidth * 1e6
        records.append(
            {
                **shape(mixture),
                "floor_us": round(floor, 3),
                "times": times,
                "times_ours": {t: round(times[EAGER][t] / times[OURS][t], 3) for t in ("cold", "warm")},
            }
        )
    return records


def shape(mixture: Mixture) -> dict[str, Any]:
    """The mixture's sizes, for the JSON."""
    return {"rows": mixture.rows, "width": mixture.width, "candidates": mixture.candidates, "bytes": mixture.bytes}
