"""A decision to be taken, described once for the oracle and for the implementations, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support import oracle

from proxytune.ops import OUTPUTS, Combination, StepOutput
from proxytune.ops.noise import Noise
from proxytune.ops.sampling_params import SamplingParams
from proxytune.ops.torch_impl.rows import MemberRows

Run = Callable[..., StepOutput]
"""`ops.step` with one implementation."""

ALL = OUTPUTS
UNDRAWN = ("tokens", "logprobs", "lse", "entropy", "varentropy", "argmax", "kl", "confidence", "scores")
"""What can be asked for without settings."""

MIXED = (torch.bfloat16, torch.float32, torch.float16)


class RowsElsewhere(MemberRows):
    """Rows that are taken to be on a GPU: the way of torch that waits for nothing, on the CPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.device = SimpleNamespace(type="elsewhere")  # type: ignore[assignment]


@dataclass(frozen=True)
class Case:
    """One call of `step`.

    Attributes:
        members: The base first, on the CPU or elsewhere.
        weights: Numbers, or `[B, M]`, or a Combination.
        settings: Keywords of `SamplingParams.of`; None for the argmax.
        keys: Keywords of `Noise.of`.
        draws: N.
    """

    members: Sequence[torch.Tensor]
    weights: Sequence[float] | torch.Tensor | Combination = (1.0,)
    settings: dict[str, Any] | None = None
    keys: dict[str, Any] | None = None
    draws: int = 1

    @property
    def rows(self) -> int:
        return self.members[0].shape[0]

    @property
    def width(self) -> int:
        return self.members[0].shape[1]

    def step(self, run: Run, want: Sequence[str] | None = None) -> StepOutput:
        device = self.members[0].device
        want = (ALL if self.settings is not None else UNDRAWN) if want is None else want
        if self.settings is None:
            return run(self.members, self.weights, want=want)
        sampling = SamplingParams.of(self.rows, device=device, **self.settings)
        noise = Noise.of(self.rows, device=device, **(self.keys or {}))
        return run(self.members, self.weights, sampling=sampling, noise=noise, draws=self.draws, want=want)

    def truth(self) -> oracle.Truth:
        rows = self.rows
        settings = keys = None
        if self.settings is not None:
            s = dict(self.settings)
            fork = s.get("fork_threshold") is not None
            settings = oracle.Settings(
                temperature=_column(s.get("temperature"), 1.0, rows),
                top_k=_column(s.get("top_k"), 0, rows),
                top_p=_column(s.get("top_p"), 1.0, rows),
                min_p=_column(s.get("min_p"), 0.0, rows),
                fork_threshold=_column(s.get("fork_threshold"), 0.0, rows) if fork else None,
                fork_temperature=_column(s.get("fork_temperature"), 1.0, rows) if fork else None,
            )
            k = dict(self.keys or {})
            whole = {
                name: _whole(k.get(name), np.arange(rows) if name == "row" else 0, rows)
                for name in ("seed", "row", "position", "branch")
            }
            keys = oracle.Keys(**whole)
        members = [x.float().cpu().numpy() for x in self.members]
        return oracle.decide(members, in_numpy(self.weights, rows), settings, keys, self.draws)

    def only(self, rows: Sequence[int]) -> Case:
        """The same decision for some of the rows, each with the keys that it had."""
        pick = torch.tensor(rows)

        def part(value: Any, default: Any = None) -> Any:
            if value is None:
                value = default
            return value[pick.to(value.device)] if isinstance(value, torch.Tensor) else value

        keys = {"row": torch.arange(self.rows)} | (self.keys or {})
        return replace(
            self,
            members=[part(x) for x in self.members],
            weights=self.weights.pick(pick.to(self.members[0].device))
            if isinstance(self.weights, Combination)
            else part(self.weights),
            settings=None if self.settings is None else {k: part(x) for k, x in self.settings.items()},
            keys={k: part(x) for k, x in keys.items()},
        )


def in_numpy(weights: Sequence[float] | torch.Tensor | Combination, rows: int) -> oracle.Sum:
    """The same for the oracle."""
    c = weights if isinstance(weights, Combination) else Combination(weights)
    w = c.weights
    numbers = w.cpu().numpy() if isinstance(w, torch.Tensor) else np.tile(np.array(w, np.float32), (rows, 1))
    return oracle.Sum(
        numbers,
        np.zeros(numbers.shape, np.float32) if c.offsets is None else c.offsets.cpu().numpy(),
        np.full(rows, -np.inf, np.float32) if c.floors is None else c.floors.cpu().numpy(),
        c.floored_by,
    )


def _column(value: Any, default: float, rows: int) -> np.ndarray[Any, Any]:
    value = default if value is None else value
    value = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    return np.broadcast_to(np.asarray(value).astype(np.float32).astype(np.float64), (rows,))


def _whole(value: Any, default: Any, rows: int) -> np.ndarray[Any, Any]:
    value = default if value is None else value
    value = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    return np.broadcast_to(np.asarray(value, dtype=np.int64), (rows,))


def bits(x: torch.Tensor) -> torch.Tensor:
    """Something that `torch.equal` compares bit by bit; all NaN are one."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int32)


def same(a: StepOutput, b: StepOutput, want: Sequence[str] = ALL, rows: Sequence[int] | None = None) -> None:
    """Assert that two steps are equal bit for bit, in the rows given of `a`."""
    for name in want:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is None:
            continue
        x = x if rows is None else x[torch.tensor(rows, device=x.device)]
        assert x.dtype == y.dtype, name
        assert torch.equal(bits(x), bits(y)), f"{name}: {x} and {y}"


@dataclass
class Tally:
    """How many draws were compared, and how many of them were too close to call."""

    draws: int = 0
    unsure: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.draws + other.draws, self.unsure + other.unsure)

    def assert_rare(self) -> None:
        """Too close to call may be one draw in a hundred; and one in small batches of draws."""
        assert self.draws > 0
        assert self.unsure <= max(1, 0.01 * self.draws), self


DTYPES = {
    "tokens": torch.int64, "argmax": torch.int64, "kept": torch.int64, "fork": torch.bool,
}  # fmt: skip


def check(case: Case, run: Run, want: Sequence[str] | None = None) -> Tally:
    """Run a case and compare every output with the oracle's.

    Args:
        case: What to decide.
        run: The implementation.
        want: The outputs to ask for; None for all.

    Returns:
        How many draws were compared.
    """
    got, truth = case.step(run, want), case.truth()
    return compare(case, got, truth, want)


def compare(case: Case, got: StepOutput, truth: oracle.Truth, want: Sequence[str] | None = None) -> Tally:
    """Compare what a step found with the truth."""
    want = (ALL if case.settings is not None else UNDRAWN) if want is None else want
    rows, n = case.rows, case.draws
    shapes = {"scores": (rows, case.width)} | dict.fromkeys(("tokens", "logprobs", "draw_logprobs", "keys"), (rows, n))
    out: dict[str, Any] = {}
    for name in ALL:
        x = getattr(got, name)
        assert (x is not None) == (name in want), name
        if x is not None:
            assert x.shape == shapes.get(name, (rows,)), name
            assert x.dtype == DTYPES.get(name, torch.float32), name
            assert x.device == case.members[0].device, name
            out[name] = x.cpu().numpy()
    good = ~(truth.bad | truth.dead)

    # Rows without a distribution: everything as the contract says, bit for bit.
    for name, x in out.items():
        if name == "scores":
            continue
        expected = truth.values[name][~good]
        np.testing.assert_array_equal(x[~good], expected, err_msg=name)

    if "scores" in out:
        # The combination is a handful of float32 operations in a fixed order. Only the kinds of bad values may differ.
        clean = np.isfinite(truth.combined) | np.isneginf(truth.combined)
        np.testing.assert_array_equal(out["scores"][clean], truth.combined[clean], err_msg="scores")
        assert not (out["scores"][~clean] < np.inf).any()
    for name in ("argmax", "fork", "kept"):
        if name not in out:
            continue
        if name == "kept":
            assert (out[name][good] >= truth.least.sum(1)[good]).all(), (out[name], truth.least.sum(1))
            assert (out[name][good] <= truth.most.sum(1)[good]).all(), (out[name], truth.most.sum(1))
        else:
            np.testing.assert_array_equal(out[name][good], truth.values[name][good], err_msg=name)
    if "temperature" in out:
        np.testing.assert_array_equal(out["temperature"][good], truth.values["temperature"][good].astype(np.float32))
    for name in ("lse", "entropy", "varentropy", "kl", "confidence"):
        if name in out:
            _close(name, out[name][good], truth.values[name][good], truth.slack[name][good])
    for name in ("entropy", "varentropy", "kl"):
        if name in out:
            assert (out[name][good] >= 0).all(), name
    if "tokens" not in out:
        return Tally()
    tally = Tally(int(good.sum()) * n, int((~truth.sure[good]).sum()))
    for b in np.flatnonzero(good):
        _compare_draws(case, b, out, truth)
    return tally


def _compare_draws(case: Case, b: int, out: dict[str, Any], truth: oracle.Truth) -> None:
    ids = out["tokens"][b]
    found = ids >= 0
    ours = ids[found]
    assert len(set(ours)) == len(ours), "drawn twice"
    assert (~found[found.argmin() :]).all() or found.all(), "a gap among the draws"
    low, high = (min(case.draws, int(x[b].sum())) for x in (truth.least, truth.most))
    if case.settings is None:
        low = high = 1
    assert low <= len(ours) <= high
    if case.settings is not None:
        assert truth.most[b, ours].all(), "a token outside the support"
    sure = truth.sure[b]
    np.testing.assert_array_equal(ids[sure], truth.values["tokens"][b][sure], err_msg=f"tokens of row {b}")
    for name, of_all in (("logprobs", truth.logp), ("draw_logprobs", truth.draw_logp), ("keys", truth.keys)):
        if name not in out:
            continue
        x = out[name][b]
        assert np.isneginf(x[~found]).all(), name
        _close(name, x[found], of_all[b, ours], truth.slack[name][b, ours])
        if name == "keys":
            assert (np.diff(x[found]) <= 0).all(), "keys do not descend"
        if name == "draw_logprobs":
            assert (x[found] <= truth.slack[name][b, ours]).all()


def _close(name: str, x: Any, expected: Any, slack: Any) -> None:
    assert np.isfinite(expected).all(), f"{name}: the case itself is at fault"
    assert np.isfinite(x).all(), f"{name}: {x}"
    off = abs(x.astype(np.float64) - expected)
    worst = int(np.argmax(off - slack)) if len(off) else 0
    assert (off <= slack).all(), f"{name}: {x[worst]}, expected {expected[worst]} ± {slack[worst]:.2g}"


def random_keys(generator: np.random.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Keys from the whole range of each."""
    whole = {"seed": (-(2**63), 2**63), "row": (0, 2**32), "position": (0, 2**32), "branch": (0, 2**30)}
    return {k: torch.from_numpy(generator.integers(a, b, rows, dtype=np.int64)) for k, (a, b) in whole.items()}


def logits(rows: int, *widths: int, seed: int = 0, scale: float = 3.0, dtypes: Sequence[torch.dtype] = ()) -> list[Any]:
    """Random members, narrow enough that many tokens have a say; dtypes in turn."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtypes or (torch.float32,)
    return [
        (torch.randn(rows, w, generator=generator) * scale).to(dtypes[i % len(dtypes)]) for i, w in enumerate(widths)
    ]


def settings_for(rows: int, width: int, *, forks: bool = False) -> dict[str, Any]:
    """Per-row settings in turn: plain, top-k, top-p, min-p, all of them, plain and hotter."""
    turn = torch.arange(rows) % 6
    k = torch.where((turn == 1) | (turn == 4), min(width, 40), 0)
    p = torch.where(turn == 2, 0.9, torch.where(turn == 4, 0.7, 1.0))
    m = torch.where(turn == 3, 0.05, torch.where(turn == 4, 0.02, 0.0))
    out: dict[str, Any] = {"temperature": 0.6 + 0.3 * turn, "top_k": k, "top_p": p, "min_p": m}
    if forks:  # some rows of random logits are above, some below
        out |= {"fork_threshold": 1.5 + 0.5 * (torch.arange(rows) % 5), "fork_temperature": 1.7 - 0.2 * (turn % 3)}
    return out


def random_case(g: np.random.Generator, widest: int, device: str = "cpu", rows: int | None = None) -> Case:
    """Anything that is allowed: members, dtypes, widths, strides, masks, weights, settings, keys, draws."""
    rows = int(g.integers(1, 6)) if rows is None else rows
    width = int(np.exp(g.uniform(0, np.log(widest)))) if g.random() < 0.7 else widest
    scale = float(np.exp(g.uniform(np.log(0.01), np.log(30))))
    members = []
    for i in range(int(g.integers(1, 9))):
        columns = width if i == 0 else max(1, width + int(g.integers(-min(width, 300), 300)) * int(g.random() < 0.5))
        x = torch.from_numpy(g.standard_normal((rows, columns)).astype(np.float32) * scale)
        if g.random() < 0.3:  # coarse, for ties
            x = (x * 2).round() / 2
        if g.random() < 0.4:
            x = x.masked_fill(torch.from_numpy(g.random((rows, columns)) < g.choice([0.1, 0.9])), -torch.inf)
            x[:, int(g.integers(columns))] = 0.0
        x = x.to(MIXED[int(g.integers(3))]).to(device)
        members.append(poisoned(x, pad=int(g.integers(0, 9)), start=int(g.integers(0, 9))) if g.random() < 0.5 else x)
    weights: Any = (1.0, *(float(w) for w in g.choice([-1.0, -0.5, 0.0, 0.3, 1.0, 1.5], len(members) - 1)))
    if g.random() < 0.5:
        weights = torch.from_numpy(g.choice([-1.0, 0.0, 0.5, 1.0, 1.25], (rows, len(members))).astype(np.float32))
        weights[:, 0] = torch.from_numpy(g.choice([1.0, 0.5, -1.0], rows, p=[0.6, 0.3, 0.1]).astype(np.float32))
        weights = weights.to(device)
    if g.random() < 0.5:
        weights = random_combination(g, members, weights)
    on = [g.random(rows) < 0.5 for _ in range(3)]
    s: dict[str, Any] = {
        "temperature": np.exp(g.uniform(np.log(0.1), np.log(5), rows)),
        "top_k": np.where(on[0], g.integers(1, width + 1, rows), 0),
        "top_p": np.where(on[1], g.uniform(0.01, 1.0, rows), 1.0),
        "min_p": np.where(on[2], np.exp(g.uniform(-12, 0, rows)), 0.0),
    }
    settings = {k: torch.from_numpy(x if k == "top_k" else x.astype(np.float32)) for k, x in s.items()}
    return Case(members, weights, settings, random_keys(g, rows), int(g.integers(1, min(8, width) + 1)))


def random_combination(
    g: np.random.Generator, members: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor
) -> Combination:
    """The weights with offsets, with floors at logits that occur, or with both; some rows have no floor."""
    rows, device = members[0].shape[0], members[0].device
    kind, by = int(g.integers(3)), int(g.integers(len(members)))
    offsets = torch.from_numpy(g.normal(0, 5, (rows, len(members))).astype(np.float32)).to(device)
    at = torch.from_numpy(g.integers(0, members[by].shape[1], (rows, 1))).to(device)
    floors = members[by].gather(1, at)[:, 0].float()
    floors[torch.from_numpy(g.random(rows) < 0.2).to(device)] = -torch.inf
    return Combination(weights, offsets if kind != 1 else None, floors if kind else None, by)


def poisoned(x: torch.Tensor, *, pad: int = 3, start: int = 0) -> torch.Tensor:
    """The same values as a view into larger storage that is NaN everywhere else."""
    rows, width = x.shape
    storage = x.new_full((rows + 2, start + width + pad), torch.nan)
    view = storage[1:-1, start : start + width]
    view.copy_(x)
    return view
