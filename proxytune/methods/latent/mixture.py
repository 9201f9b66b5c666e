"""What is fed back instead of a token: weights over the likeliest tokens, drawn given the emitted token.

The emitted token is drawn as usual and the weights *after* it, conditionally on it: no token is forced, and the next
token's distribution changes through the model alone. y is the emitted token's one-hot, p the distribution it was drawn
from, renormalised over the candidates, and Ĥ = H(p) / ln k with k candidates:

- `onehot`: y, which is discrete decoding, exactly
- `mean`: p (Soft Thinking, arXiv 2505.15778)
- `moi`: (Ĥp + (1 + β − Ĥ) y) / (1 + β) (Mixture of Inputs, 2505.14827)
- `gumbel`: softmax(g / τ), with the token's g ~ Gumbel(0) and the others' Gumbel(log p) truncated at it (2508.03440;
  the conditional form is ours; over the draw of y it is the Gumbel-softmax of p)
- `dirichlet`: Dir(αp + y) (same; over the draw of y it is Dir(αp))
- `multiplex`: (y + Σ_{j<K} one-hot of i_j) / K, with i_j ~ p (2601.08808)
- `gaussian`: y, with noise of σ · rms(x) on the embedding x (2605.08221)

Noise is keyed by (seed, row, position, token): neither the order of the candidates nor the batch changes a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from proxytune.errors import InputError
from proxytune.ops.noise import LATENT, SLOTS, Noise, slotted
from proxytune.ops.philox import exponential, normal, unit
from proxytune.validation import choice, finite, named_settings, whole

__all__ = ["Candidates", "Kind", "LatentMixture"]

Kind = Literal["onehot", "mean", "moi", "gumbel", "dirichlet", "multiplex", "gaussian"]

_OWN: dict[str, dict[str, float]] = {
    "moi": {"beta": 1.0},
    "gumbel": {"tau": 0.25},
    "dirichlet": {"alpha": 1.0},
    "multiplex": {"samples": 3},
    "gaussian": {"sigma": 0.1},
}
"""Kind → its settings and their defaults; every kind has `sigma`, 0 if not listed."""
_ATTEMPTS = 8  # each succeeds with probability ≥ .95; all fail once in 10¹⁰ draws
_MOST_SAMPLES = SLOTS // 2
_LEAVE = "Leave it out for the default."


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens that may be mixed, of each row.

    Attributes:
        ids: `[B, K]`, int64, all different where they have a probability.
        logprobs: `[B, K]`, float32, nats, normalised over the candidates; −inf for none.
        own: `[B, K]`, bool: which of them is the emitted token, one in each row.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    own: torch.Tensor

    @property
    def spread(self) -> torch.Tensor:
        """Ĥ = H(p) / ln k, `[B]`, float32, between 0 and 1; 0 with one candidate, NaN in a row without distribution."""
        count = self.ids.shape[1]
        if count == 1:
            return self.logprobs[:, 0] * 0.0
        p = self.logprobs.exp()
        entropy = -torch.where(p > 0, p * self.logprobs, p).sum(1)  # a NaN stays one
        return (entropy / math.log(count)).clamp(0.0, 1.0)


@named_settings
@dataclass(frozen=True, kw_only=True)
class LatentMixture:
    """The distribution of the weights.

    Attributes:
        kind: Which distribution: "onehot", "mean", "moi", "gumbel", "dirichlet", "multiplex" or "gaussian".
        candidates: k, how many of the likeliest tokens to mix; the emitted one is always among them [10].
        tau: The temperature τ > 0 of `gumbel` [.25].
        alpha: The concentration α > 0 of `dirichlet` [1].
        beta: The weight β ≥ 0 of the emitted token in `moi` [1].
        samples: How many tokens K `multiplex` averages, the emitted one included [3].
        sigma: Gaussian noise on the mixture, relative to its root mean square [.1 for `gaussian`, else 0].

    Raises:
        InputError: If the kind is unknown, or a setting is out of range or not one of that kind.
    """

    kind: Kind = "gumbel"
    candidates: int = 10
    tau: float | None = None
    alpha: float | None = None
    beta: float | None = None
    samples: int | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        choice("kind", self.kind, get_args(Kind))
        defaults = {"sigma": 0.0} | _OWN.get(self.kind, {})
        for name in ("tau", "alpha", "beta", "samples", "sigma"):
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                of = next(kind for kind, settings in _OWN.items() if name in settings)
                raise InputError.of(
                    name,
                    expected=f"only settings of {self.kind!r} ({', '.join(sorted(defaults))})",
                    got=f"{name}={given!r}, a setting of {of!r}",
                    remedy=f"Leave it out, or pass kind={of!r}.",
                )
        for name in ("tau", "alpha"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, finite(name, value, above=0.0, remedy=_LEAVE))
        for name in ("beta", "sigma"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, finite(name, value, least=0.0, remedy=_LEAVE))
        candidates = whole("candidates", self.candidates, "of tokens", least=1, remedy=_LEAVE)
        object.__setattr__(self, "candidates", candidates)
        if self.samples is not None:
            samples = whole("samples", self.samples, "of tokens", least=1, most=_MOST_SAMPLES, remedy=_LEAVE)
            object.__setattr__(self, "samples", samples)

    @property
    def is_random(self) -> bool:
        """Whether the mixture depends on more than the emitted token and its distribution."""
        return self.kind in ("gumbel", "dirichlet", "multiplex") or bool(self.sigma)

    def weights(self, candidates: Candidates, noise: Noise) -> torch.Tensor:
        """Draw the weights.

        Args:
            candidates: The candidates, the emitted token among them.
            noise: The keys, at the position of the emitted token.

        Returns:
            `[B, K]`, float32, ≥ 0, summing to 1. The emitted token's one-hot in a row without distribution.
        """
        y = candidates.own.float()  # [B, K]
        drawn: torch.Tensor
        match self.kind:
            case "onehot" | "gaussian":
                return y
            case "mean":
                drawn = candidates.logprobs.exp()
            case "moi":
                assert self.beta is not None
                h = candidates.spread[:, None]
                drawn = (h * candidates.logprobs.exp() + (1.0 + self.beta - h) * y) / (1.0 + self.beta)
            case "gumbel":
                drawn = _gumbel(candidates, noise, self.tau)
            case "dirichlet":
                drawn = _dirichlet(candidates, noise, self.alpha)
            case "multiplex":
                drawn = _multiplex(candidates, noise, self.samples)
        drawn = drawn / drawn.sum(1, keepdim=True)
        return torch.where(drawn.isfinite().all(1, keepdim=True), drawn, y)


def _gumbel(candidates: Candidates, noise: Noise, tau: Any) -> torch.Tensor:
    """`softmax(g / τ)`, g the Gumbel variates of log p given that the emitted token's is the largest.

    The largest of Gumbel(log p_i) variates is Gumbel(log Σp) = Gumbel(0), whichever token it falls on (Maddison et al.
    2014, "A* sampling"); given it, the others are independent and truncated at it.
    """
    variates = noise.gumbel(slotted(0, candidates.ids), LATENT)  # [B, K]
    # The emitted token's own variate.
    largest = torch.where(candidates.own, variates, 0.0).sum(1, keepdim=True)
    truncated = -torch.logaddexp(-largest, -(candidates.logprobs + variates))
    keys = torch.where(candidates.own, largest, truncated)
    keys = torch.where(candidates.own | (candidates.logprobs > -torch.inf), keys, -torch.inf)
    return ((keys - largest) / tau).softmax(1)


def _dirichlet(candidates: Candidates, noise: Noise, alpha: Any) -> torch.Tensor:
    """`Dir(αp + y)` from Gamma variates, in logarithms, as those of small shapes underflow float32."""
    shape = alpha * candidates.logprobs.exp() + candidates.own
    log_gamma = _log_gamma(shape, candidates.ids, noise)
    return torch.where(shape > 0, log_gamma, -torch.inf).softmax(1)


def _log_gamma(shape: torch.Tensor, ids: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Logarithms of Gamma variates, `[B, K]`.

    By Marsaglia & Tsang (2000), "A simple method for generating gamma variables", with a fixed number of attempts;
    shapes below 1 by Gamma(a) = Gamma(a + 1) · U^(1/a).
    """
    rows, count = ids.shape
    attempts = torch.arange(_ATTEMPTS, device=ids.device)
    index = slotted(attempts, ids[..., None]).flatten(1)  # [B, K · attempts]
    first, second, third, fourth = (w.view(rows, count, _ATTEMPTS) for w in noise.words(index, LATENT))
    small = shape < 1
    d = (torch.where(small, shape + 1.0, shape) - 1.0 / 3.0)[..., None]  # [B, K, 1]
    x = normal(first, second)
    v = (1.0 + x / (9.0 * d).sqrt()).pow(3)
    log_v = v.clamp(min=torch.finfo(torch.float32).tiny).log()
    accepted = (v > 0) & (unit(third).log() < 0.5 * x.square() + d * (1.0 - v + log_v))
    chosen = accepted.int().argmax(-1, keepdim=True)  # the first
    log_gamma = d.log() + torch.where(accepted.any(-1, keepdim=True), log_v.gather(-1, chosen), 0.0)
    return log_gamma[..., 0] - torch.where(small, exponential(fourth[..., 0]) / shape, 0.0)


def _multiplex(candidates: Candidates, noise: Noise, samples: Any) -> torch.Tensor:
    """The mean of the emitted token's one-hot and of K − 1 further draws from p, by the Gumbel-max trick."""
    rows, count = candidates.ids.shape
    total = candidates.own.float()
    if samples == 1:
        return total
    slots = torch.arange(samples - 1, device=total.device)[:, None]
    index = slotted(slots, candidates.ids[:, None]).flatten(1)  # [B, (K − 1) · count]
    keys = noise.gumbel(index, LATENT).view(rows, samples - 1, count) + candidates.logprobs[:, None]
    further = torch.nn.functional.one_hot(keys.argmax(-1), count).sum(1)
    # The argmax of a NaN row means nothing: mark it as without weights.
    return total + torch.where(candidates.logprobs.isnan().any(1, keepdim=True), torch.nan, further.float())
