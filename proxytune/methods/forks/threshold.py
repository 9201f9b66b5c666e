"""The entropy, in nats, above which a token is a fork (arXiv 2506.01939): a quantile of a model's own token entropies.

The paper's 0.672 nats are the 80th percentile of one 8B model, and mean nothing for another.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from proxytune.errors import CalibrationWarning, DriftWarning, InputError
from proxytune.methods.forks.drift import Watch
from proxytune.methods.forks.quantile_sketch import Sketch
from proxytune.recipe import ForkCalibration, Measure
from proxytune.stats.quantile import as_values, share_threshold
from proxytune.validation import finite, proper_share, shown

__all__ = ["ForkThreshold"]


class ForkThreshold:
    """The entropy h above which a token is a fork, and a count of forks.

    Three kinds: `ForkThreshold(0.4)`, a fixed number; `ForkThreshold.calibrated(entropies)` or `.of(calibration)`, the
    quantile of a calibration run; `ForkThreshold.streaming()`, the quantile of all tokens so far. `is_fork` decides,
    `observe` counts; a step decides for all rows before it counts any, so the order of the rows does not matter.

    With a target share it monitors drift: after every `window` tokens their share of forks is compared with a band, and
    the first time it lies outside, a `DriftWarning` is given. The band is

        share ± (margin + 4 · √(inflation · share (1 − share) / window)),

    where `inflation` allows for dependent tokens. With the defaults (4096 tokens, 2 points, 4) it is ±7 points around a
    fifth.

    Counts stay on the device of the entropies; the host reads them once per window, and on request. A threshold belongs
    to one model at one α, and may serve many generations, one at a time: counts and a stream's quantile persist until
    `reset()`.

    Attributes:
        share: The target share of forks; None for a fixed number without a band.
        measure: The distribution whose entropy is meant ("raw", "scaled", "truncated"); None if it is not known.
        alpha: The α it was calibrated at; None if it is not known.
    """

    def __init__(
        self,
        nats: float,
        *,
        share: float | None = None,
        measure: Measure | None = None,
        alpha: float | None = None,
        **watch: Any,
    ) -> None:
        """Create a fixed threshold.

        Args:
            nats: The threshold h; finite. Below 0, every token is a fork.
            share: The expected share of forks, in (0, 1); None to monitor nothing.
            measure: The distribution whose entropy is meant; None for any.
            alpha: The α it belongs to.
            **watch: `window`, in tokens [4096], `margin` [0.02] and `inflation` [4.0] of the band.

        Raises:
            InputError: If a value is out of range.
        """
        self.share = None if share is None else proper_share(share)
        self.measure, self.alpha = measure, alpha
        remedy = "`proxytune calibrate` finds one for a model; Recipe.load(folder) reads one that it wrote."
        self._nats: torch.Tensor | float = finite("threshold", nats, "of nats", remedy=remedy)
        self._watch = Watch(self.share, **watch)
        self._sketch: Sketch | None = None
        self._warned = False

    @classmethod
    def calibrated(cls, entropies: Any, share: float = 0.2, **settings: Any) -> ForkThreshold:
        """The quantile of a calibration run.

        Args:
            entropies: The run's token entropies, nats, any shape: a tensor, an array or a sequence.
            share: The target share of forks.
            **settings: As for `ForkThreshold`.

        Returns:
            A threshold with `share` of these tokens above it, or as nearly as their ties allow.

        Raises:
            InputError: If the share is not in (0, 1), there are fewer than ten tokens on one side of the quantile, or a
                value is no entropy.

        Warns:
            CalibrationWarning: If ties (often at 0) keep the share more than 2 points away from its target.
        """
        values = as_values(entropies)
        needed = math.ceil(10 / min(proper_share(share), 1 - share))
        if len(values) < needed:
            raise InputError.of(
                "entropies",
                expected=f"at least {needed} tokens for a share of {share:g}, ten on either side of the quantile",
                got=f"{len(values)}",
                remedy="Calibrate on more text.",
            )
        nats, realised = share_threshold(values, share)
        if abs(realised - share) > 0.02:
            warnings.warn(
                f"{realised:.1%} of the calibration tokens are forks, not {share:.1%}: many have the same "
                f"entropy, so no threshold comes nearer than {nats:.4g} nats. Take another share, or other text.",
                CalibrationWarning,
                stacklevel=2,
            )
        return cls(nats, share=share, **settings)

    @classmethod
    def of(cls, calibration: ForkCalibration, **watch: Any) -> ForkThreshold:
        """The threshold stored in a recipe, with its share, measure and α.

        Args:
            calibration: The result of the calibration run.
            **watch: `window`, `margin` and `inflation`, as for `ForkThreshold`.

        Raises:
            InputError: If a setting is out of range, or there is no calibration.
        """
        c: Any = calibration
        if not isinstance(c, ForkCalibration):
            raise InputError.of(
                "calibration",
                expected="the fork_threshold of a calibrated recipe",
                got="None: this recipe is not calibrated" if c is None else shown(c, 80),
                remedy="`proxytune calibrate` finds a threshold and writes it into the recipe.",
            )
        return cls(c.nats, share=c.share, measure=c.measure, alpha=c.alpha, **watch)

    @classmethod
    def streaming(
        cls, share: float = 0.2, *, warm_up: int = 256, initial: float | None = None, **settings: Any
    ) -> ForkThreshold:
        """The quantile of all tokens observed so far, for a model without a calibration run.

        It comes from a histogram of logarithmic bins, 0.2 % wide, so its memory is bounded, and the order of the tokens
        does not matter. If more than a few points of all tokens lie within 0.2 % of one entropy, the share is off by up
        to that much.

        Args:
            share: The target share of forks.
            warm_up: How many tokens to see before the quantile counts. They enter the histogram, but not the realised
                share. The first tokens of a text differ from the rest, so a few steps of a batch are not enough.
            initial: The threshold until then, nats; None for no forks until then.
            **settings: As for `ForkThreshold`.

        Raises:
            InputError: If a value is out of range.
        """
        start = math.inf if initial is None else finite("initial", initial)
        threshold = cls(0.0, share=proper_share(share), **settings)
        threshold._sketch = Sketch(share, warm_up, start)
        threshold._nats = start
        return threshold

    @property
    def is_streaming(self) -> bool:
        """Whether the threshold moves with what is observed."""
        return self._sketch is not None

    @property
    def nats(self) -> float:
        """The current threshold h, nats; +inf while a stream warms up. Waits for the device if it is streaming."""
        return float(self._nats)

    @property
    def band(self) -> tuple[float, float] | None:
        """The accepted range of the share of forks in a window; None without a target share."""
        return self._watch.band

    @property
    def tokens(self) -> int:
        """How many tokens were counted, without a warm-up. Waits for the device."""
        return self._watch.counts()[1]

    @property
    def realised_share(self) -> float:
        """The share of forks among the counted tokens; NaN before the first. Waits for the device."""
        forks, tokens = self._watch.counts()
        return forks / tokens if tokens else math.nan

    def is_fork(self, entropies: torch.Tensor) -> torch.Tensor:
        """Which tokens are forks, `[...]`, bool: H > h, in nats. NaN is not a fork."""
        if isinstance(self._nats, torch.Tensor):
            self._nats = self._nats.to(entropies.device)
        return entropies > self._nats

    def observe(self, entropies: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Count the tokens of a step, after their forks were decided.

        Args:
            entropies: `[...]`, nats. NaN is not counted.
            counted: `[...]`, bool: which tokens count; None for all.

        Warns:
            DriftWarning: Once, if the share of forks in a window leaves its band.
        """
        counted = ~entropies.isnan() if counted is None else counted & ~entropies.isnan()
        forks, watched = self.is_fork(entropies), counted
        if self._sketch is not None:
            watched = counted & self._sketch.warm.to(counted.device)
            self._nats = self._sketch.add(entropies, counted)
        outside = self._watch.add(forks, watched)
        if outside is not None and not self._warned:
            self._warned = True
            assert self.share is not None
            assert self.band is not None
            warnings.warn(
                f"{outside[0]:.1%} of the last {outside[1]} tokens were forks; {self.share:.1%} were expected (band "
                f"{self.band[0]:.1%} to {self.band[1]:.1%}): the threshold, {self.nats:.4g} nats, does not fit this "
                "model, temperature or kind of text. Calibrate again (`proxytune calibrate`), or use a streaming one.",
                DriftWarning,
                stacklevel=2,
            )

    def reset(self) -> None:
        """Forget what was observed: the counts, a stream's quantile, and that a warning was given."""
        self._watch.clear()
        self._warned = False
        if self._sketch is not None:
            self._sketch.clear()
            self._nats = self._sketch.initial
