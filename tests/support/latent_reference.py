"""The slow reference of latent steps: no cache, no batch, float64, one row and one position at a time.

`LatentReference` is a model for transformers' own loops. Its logits after a text are computed by walking through the
text's new tokens: at each, the distribution that the token was drawn from, the weights over the likeliest tokens given
that token (by the definitions, in plain Python and numpy, with the noise of the tests' own Philox), and the mixture of
each member's embeddings, which replaces the token in one forward pass over everything before. So a text's logits are a
function of the row and the text alone, whatever the loop does with its beams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from support import oracle
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

LATENT, SLOT = 3, 1 << 27
Array = np.ndarray[Any, np.dtype[Any]]
Warp = Callable[[Array], Array]
"""Logits `[V]` → those that a token is drawn from."""


def warp(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Warp:
    """What generate()'s warpers do, for rows without ties."""

    def run(z: Array) -> Array:
        z = z / temperature
        if top_k:
            z = np.where(z >= np.sort(z)[-top_k], z, -np.inf)
        if top_p < 1:
            order = np.argsort(-z)
            p = np.exp(z[order] - z.max())
            reached = np.cumsum(p / p.sum())
            z = z.copy()
            z[order[1:][reached[:-1] >= top_p]] = -np.inf
        return z

    return run


def weights(kind: str, p: Array, ids: Array, y: int, key: tuple[int, int, int], **settings: Any) -> Array:
    """The weights of the candidates `ids` with probabilities `p` (adding up to 1), given the token y; `[K]`."""
    seed, row, position = key

    def words(slot: int, index: Array) -> tuple[Array, ...]:
        return oracle.philox(seed, index + slot * SLOT, position, row, LATENT)

    own = (ids == y).astype(float)
    count = len(ids)
    with np.errstate(divide="ignore"):
        logp = np.log(p)
    if kind in ("onehot", "gaussian"):
        return own
    if kind == "mean":
        return p
    if kind == "moi":
        beta = settings.get("beta", 1.0)
        h = 0.0 if count == 1 else -np.sum(p[p > 0] * logp[p > 0]) / np.log(count)
        return (h * p + (1 + beta - h) * own) / (1 + beta)
    if kind == "gumbel":
        g = oracle.gumbel(words(0, ids)[0])
        top = float(g[ids == y][0])
        keys = np.array(
            [top if i == y else -np.logaddexp(-top, -(a + b)) for i, a, b in zip(ids, logp, g, strict=True)]
        )
        e = np.exp((keys - top) / settings.get("tau", 0.25))
        return e / e.sum()
    if kind == "multiplex":
        samples = settings.get("samples", 3)
        total = own.copy()
        for j in range(samples - 1):
            total[int(np.argmax(logp + oracle.gumbel(words(j, ids)[0])))] += 1
        return total / samples
    assert kind == "dirichlet"
    drawn = np.full(count, -np.inf)
    for n, (a, i) in enumerate(zip(settings.get("alpha", 1.0) * p + own, ids, strict=True)):
        if a > 0:
            drawn[n] = _log_gamma(a, [[float(w) for w in words(t, i)] for t in range(8)])
    e = np.exp(drawn - drawn.max())
    return e / e.sum()


def _log_gamma(shape: float, attempts: Sequence[Sequence[float]]) -> float:
    """Marsaglia & Tsang (2000), written from the paper; the words of each attempt make its variates."""
    u = [[(w + 0.5) / 2.0**32 for w in words] for words in attempts]
    boosted = shape + 1 if shape < 1 else shape
    d = boosted - 1 / 3
    found = np.log(d)
    for first, second, third, _ in u:
        x = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
        v = (1 + x / np.sqrt(9 * d)) ** 3
        if v > 0 and np.log(third) < 0.5 * x * x + d - d * v + d * np.log(v):
            found = np.log(d * v)
            break
    return float(found + np.log1p(-u[0][3]) / shape if shape < 1 else found)


def normal(width: int, key: tuple[int, int, int]) -> Array:
    """The Gaussian noise on an embedding's coordinates; `[D]`."""
    seed, row, position = key
    first, second, _, _ = oracle.philox(seed, np.arange(width) + 31 * SLOT, position, row, LATENT)
    return np.sqrt(2 * np.exp(-oracle.gumbel(first))) * np.cos(2 * np.pi * (second.astype(float) + 0.5) / 2.0**32)


class LatentReference(PreTrainedModel, GenerationMixin):
    """A model for transformers' loops whose every logit comes from a walk through the text, see above."""

    config_class = None
    _supports_sdpa = True  # not used: the members compute
    main_input_name = "input_ids"

    def __init__(
        self,
        members: list[PreTrainedModel],
        alpha: float = 0.0,
        *,
        prompt: int,
        kind: str,
        candidates: int = 10,
        seed: int = 0,
        warp: Warp | None = None,
        discrete: Sequence[int] = (),
        sigma: float = 0.0,
        nudged: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(members[0].config)
        self.__dict__["members"] = members
        self.generation_config = GenerationConfig.from_dict(members[0].generation_config.to_dict())
        self.register_parameter("here", torch.nn.Parameter(torch.zeros(1)))
        self.alpha, self.prompt, self.kind, self.count, self.seed = alpha, prompt, kind, candidates, seed
        self.warp, self.discrete, self.sigma = warp or (lambda z: z), set(discrete), sigma
        self.settings, self.nudged = settings, nudged
        self.__dict__["memo"] = {}

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    @torch.no_grad()
    def _embedded(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Each member's embeddings of some ids, `[N, D]`: what its module gives."""
        return [m.get_input_embeddings()(torch.tensor(list(ids))) for m in self.__dict__["members"]]

    @torch.no_grad()
    def _logits(self, inputs: list[torch.Tensor]) -> Array:
        base, *companions = (
            m(inputs_embeds=x[None], use_cache=False).logits[0, -1].double().numpy()
            for m, x in zip(self.__dict__["members"], inputs, strict=True)
        )
        out = base.copy()
        if companions:
            usable = min(m.get_input_embeddings().weight.shape[0] for m in self.__dict__["members"])
            shared = min(map(len, (base, *companions)))
            expert, antiexpert = (c[:shared] for c in companions)
            out[:shared] = base[:shared] + self.alpha * (expert - antiexpert)
            out[usable:] = -np.inf
        return out

    def walk(self, row: int, prompt: tuple[int, ...], new: tuple[int, ...]) -> tuple[list[torch.Tensor], Array]:
        """What is fed back of a text, `[T, D]` for each member, and the logits after it, `[V]`."""
        found: tuple[list[torch.Tensor], Array] | None = self.__dict__["memo"].get((row, prompt, new))
        if found is not None:
            return found
        if not new:
            fed = self._embedded(prompt)
        else:
            before, logits = self.walk(row, prompt, new[:-1])
            mixed = self._mixed(row, len(prompt) + len(new) - 1, logits, new[-1])
            fed = [torch.cat([x, y[None]]) for x, y in zip(before, mixed, strict=True)]
        self.__dict__["memo"][row, prompt, new] = (fed, self._logits(fed))
        return self.__dict__["memo"][row, prompt, new]

    def _mixed(self, row: int, position: int, logits: Array, y: int) -> list[torch.Tensor]:
        if y in self.discrete:
            return [x[0] for x in self._embedded([y])]
        z = self.warp(logits)
        ids = np.argsort(-z, kind="stable")[: self.count]
        if y not in ids:
            ids = np.append(ids[:-1], y)
        p = np.exp(z[ids] - z[ids].max())
        key = (self.seed, row, position)
        w = weights(self.kind, p / p.sum(), ids, y, key, **self.settings)
        if self.nudged:  # how much the model makes of weights that are off is the scale of a tolerance
            w = w * (1 + self.nudged * np.random.default_rng((row, position)).uniform(-1, 1, len(w)))
            w = w / w.sum()
        assert np.isfinite(w).all()
        assert abs(w.sum() - 1) < 1e-9
        ids, w = ids[w > 0], w[w > 0]  # what is masked may be beyond what a member can embed
        mixed = [(torch.tensor(w)[:, None] * e.double()).sum(0) for e in self._embedded(ids.tolist())]
        if self.sigma:
            mixed = [x + self.sigma * x.square().mean().sqrt() * torch.tensor(normal(len(x), key)) for x in mixed]
        return [x.to(e.dtype) for x, e in zip(mixed, self._embedded([y]), strict=True)]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        rows = []
        for row, ids in enumerate(input_ids):
            prompt = ids[: self.prompt]
            if attention_mask is not None:
                prompt = prompt[attention_mask[row, : self.prompt].bool()]
            rows.append(self.walk(row, tuple(prompt.tolist()), tuple(ids[self.prompt :].tolist()))[1])
        return CausalLMOutputWithPast(logits=torch.tensor(np.stack(rows))[:, None])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, use_cache=False, **kwargs)
