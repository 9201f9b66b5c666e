"""The methods that `bench_latent.py` compares: their settings, and how answers are drawn with each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lab.puzzles.puzzle import Instance, Puzzle
from lab.puzzles.vocabulary import EOS, PAD, THINK_BEGIN, THINK_END
from transformers import DynamicCache

from _latent.measures import Answered, stack_passes
from proxytune import ForkDecoding, ForkSamplingLogitsProcessor, SiblingDecoding
from proxytune.errors import CalibrationWarning
from proxytune.methods.forks.threshold import ForkThreshold
from proxytune.methods.latent.decoding import LatentDecoding
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import LatentMixture
from proxytune.methods.recursion.decoding import RecursionDecoding
from proxytune.models.members.cache_name import CACHE, cache_of

TEMPERATURES = (0.05, *(n / 10 for n in range(1, 14)), 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""Beyond 1.3 too: a collapsed model's best may be there, and a method must not win only by being hotter."""
GREEDY = 0.0
RANDOM_KINDS = ("gumbel", "dirichlet", "multiplex", "gaussian")
MIXTURES: tuple[dict[str, Any], ...] = (
    {"kind": "moi", "beta": 0.25},
    {"kind": "moi", "beta": 1.0},
    {"kind": "gumbel", "tau": 0.25},
    {"kind": "gumbel", "tau": 0.5},
    {"kind": "gumbel", "tau": 1.0},
    {"kind": "dirichlet", "alpha": 1.0},
    {"kind": "dirichlet", "alpha": 4.0},
    {"kind": "multiplex", "samples": 3},
    {"kind": "mean"},
    {"kind": "gaussian", "sigma": 0.1},
    {"kind": "gaussian", "sigma": 0.3},
)
SIGMAS = (0.05, 0.1, 0.2, 0.4)
GATED = 0.2
"""θ of the entropy gate."""
SHARES = (0.2, 0.5)
"""Shares of a model's own tokens that count as forks; fork sampling uses the first."""
FAMILIES = ("temperature", "latent", "scratchpad", "gated", "fork sampling", "tree", "siblings", "recursion")


@dataclass(frozen=True)
class Setting:
    """A method with its settings; temperature 0 is greedy decoding, `knobs` are the other settings by name."""

    family: str
    temperature: float
    knobs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, family: str, temperature: float, **knobs: Any) -> Setting:
        """A setting with its knobs as keywords."""
        return cls(family, temperature, tuple(sorted(knobs.items())))

    @property
    def label(self) -> str:
        """The settings in words, the same in every run."""
        heat = "greedy" if self.temperature == GREEDY else f"T {self.temperature:g}"
        named = (f"{name} {value:g}" if not isinstance(value, str) else value for name, value in self.knobs)
        return ", ".join([heat, *named])


@dataclass(frozen=True)
class Asked:
    """A model in float32, a puzzle, some of its instances, and the fork threshold of each of `SHARES`."""

    model: Any
    puzzle: Puzzle
    instances: Sequence[Instance]
    nats: tuple[float, ...]

    @property
    def recurs(self) -> bool:
        """Whether the model has cycles."""
        return stack_passes(self.model.config) > 1


def settings(asked: Asked, best: float) -> list[Setting]:
    """All settings besides the temperatures; `best` is the one with the best coverage@16 on validation."""
    scratchpad = asked.puzzle.name == "countdown"
    bases = tuple(dict.fromkeys((best, 1.0 if best != 1.0 else 0.6)))
    out = []
    for family in ("latent", "scratchpad") if scratchpad else ("latent",):
        # On Countdown, latent steps everywhere are an ablation, at one base temperature.
        full = scratchpad == (family == "scratchpad")
        out += [Setting.of(family, t, **mix) for t in (bases if full else (best,)) for mix in MIXTURES]
        if full:
            random = (mix for mix in MIXTURES if mix["kind"] in RANDOM_KINDS and mix.get("tau") != 0.5)
            out += [Setting.of(family, GREEDY, **mix) for mix in random if mix.get("alpha") != 4.0]
    gated = ({"kind": "moi", "beta": 1.0}, {"kind": "gumbel", "tau": 0.5})
    out += [Setting.of("gated", t, **mix) for t in bases for mix in gated]
    hot = tuple(dict.fromkeys((1.0, 1.5, best)))
    out += [Setting.of("fork sampling", t, fork=fork) for t in (0.1, 0.4, 0.7) for fork in hot]
    for leaves in (4, 16):
        out += [Setting.of("tree", t, leaves=leaves, share=share) for t in bases for share in SHARES]
        out.append(Setting.of("tree", best, leaves=leaves, where="start"))
        out += [
            Setting.of("siblings", best, leaves=leaves, repulsion=nats, share=share)
            for nats in (0.5, 2.0)
            for share in SHARES
        ]
    if asked.recurs:
        out += [
            Setting.of("recursion", t, sigma=sigma, when=when)
            for sigma in SIGMAS
            for when in ("cycle", "once")
            for t in (GREEDY, best)
        ]
    return out


def draw(asked: Asked, setting: Setting, samples: int, seed: int) -> list[Answered]:
    """Answers to every instance; a tree has its own number of leaves instead of `samples`."""
    knobs = dict(setting.knobs)
    if setting.family in ("tree", "siblings"):
        return _grown(asked, setting, knobs, seed)
    if setting.family == "recursion":
        return _recurred(asked, setting, knobs, samples, seed)
    temperature = setting.temperature
    attached = ExitStack()
    loop: Any = None  # transformers' own loop: at this size, keyed noise dominates a step of FusedDecoding
    if setting.family == "fork sampling":
        processor = ForkSamplingLogitsProcessor(
            asked.nats[0], fork_temperature=knobs["fork"], exec_temperature=temperature
        )
        attached.enter_context(processor.attach(asked.model))
        temperature = 1.0
    elif setting.family != "temperature":
        loop = LatentDecoding(LatentMixture(**knobs), _gates(setting.family, asked.puzzle.name), seed=seed)
    prompts = asked.puzzle.prompts(torch.tensor(asked.instances))
    with attached, torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cache = DynamicCache(config=asked.model.config)  # one pass over the prompt serves all its samples
        cache = cache_of(asked.model(input_ids=prompts[:, :-1], **{CACHE: cache}, use_cache=True))
        cache.batch_repeat_interleave(samples)
        ids = prompts.repeat_interleave(samples, 0)
        out = _generate(asked, ids, temperature, loop, **{CACHE: cache})
        selects = asked.recurs and setting.family == "temperature"
        means = _mean_logprobs(asked.model, out, prompts.shape[1]) if selects else None
    new = out[:, prompts.shape[1] :].view(len(asked.instances), samples, -1)
    found = []
    for number, (instance, some) in enumerate(zip(asked.instances, new, strict=True)):
        texts = [_trimmed(ids) for ids in some.tolist()]
        own = None if means is None else means[number * samples : (number + 1) * samples]
        found.append(_answered(asked, instance, texts, fed=sum(map(len, texts)) - samples, logprobs=own))
    return found


def _mean_logprobs(model: Any, ids: torch.Tensor, start: int) -> list[float]:
    """Mean log-probability of each row's new tokens, end of text included, at temperature 1, in nats."""
    logprobs = model(input_ids=ids[:, :-1], use_cache=False).logits[:, start - 1 :].double().log_softmax(-1)
    own = logprobs.gather(2, ids[:, start:, None])[:, :, 0]  # [R, N]
    ended = ids[:, start:] == EOS
    before = ended.long().cumsum(1) - ended.long() == 0
    means: list[float] = ((own * before).sum(1) / before.sum(1)).tolist()
    return means


def thresholds(asked: Asked, *, samples: int, seed: int) -> tuple[float, ...]:
    """The entropies above which each of `SHARES` of the model's own tokens lie, at temperature 1, in nats."""
    loop = SiblingDecoding(siblings=samples, repulsion=0.0, seed=seed)
    prompts = asked.puzzle.prompts(torch.tensor(asked.instances))
    with torch.inference_mode():
        trees = _generate(asked, prompts, 1.0, loop, return_dict_in_generate=True).trees
    found = [h for tree in trees for branch in tree for h in branch.entropies]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # with ties, as close to the share as possible
        return tuple(ForkThreshold.calibrated(found, share).nats for share in SHARES)


def _gates(family: str, puzzle: str) -> LatentGates:
    span: dict[str, Any] = {}
    if puzzle == "countdown" and family != "latent":
        span = {"begin_ids": [THINK_BEGIN], "end_ids": [THINK_END]}
    return LatentGates(**span, min_entropy=GATED if family == "gated" else 0.0)


def _generate(asked: Asked, ids: torch.Tensor, temperature: float, loop: Any, **how: Any) -> Any:
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature != GREEDY else {}
    return asked.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=temperature != GREEDY,
        **sampling,
        max_new_tokens=asked.puzzle.answer_length,
        eos_token_id=EOS,
        pad_token_id=PAD,
        custom_generate=loop,
        **how,
    )


def _grown(asked: Asked, setting: Setting, knobs: dict[str, Any], seed: int) -> list[Answered]:
    nats = asked.nats[SHARES.index(knobs.get("share", SHARES[0]))]
    loop: Any
    if setting.family == "tree":
        where = knobs.get("where", "forks")
        loop = ForkDecoding(threshold=nats, branches=knobs["leaves"], where=where, seed=seed)
    else:
        loop = SiblingDecoding(threshold=nats, siblings=knobs["leaves"], repulsion=knobs["repulsion"], seed=seed)
    prompts = asked.puzzle.prompts(torch.tensor(asked.instances))
    with torch.inference_mode():
        trees = _generate(asked, prompts, setting.temperature, loop, return_dict_in_generate=True).trees
    out = []
    for instance, tree in zip(asked.instances, trees, strict=True):
        texts = [list(branch.along("tokens")) for branch in tree]
        # Shared tokens are fed back once; the last of each leaf is not fed back.
        out.append(_answered(asked, instance, texts, fed=tree.tokens - len(tree), tree=True))
    return out


def _recurred(asked: Asked, setting: Setting, knobs: dict[str, Any], samples: int, seed: int) -> list[Answered]:
    """Trajectories of a recurrent model, with their log-probabilities."""
    loop = RecursionDecoding(**knobs, trajectories=samples, select=None, seed=seed)
    prompts = asked.puzzle.prompts(torch.tensor(asked.instances))
    with torch.inference_mode():
        found = _generate(asked, prompts, setting.temperature, loop, return_dict_in_generate=True).trajectories
    out = []
    for instance, rows, logprobs in zip(
        asked.instances, found.sequences[..., prompts.shape[1] :], found.mean_logprobs, strict=True
    ):
        texts = [_trimmed(ids) for ids in rows.tolist()]
        # The last token is not fed back, but each trajectory forwards the prompt again: the two cancel.
        out.append(_answered(asked, instance, texts, fed=sum(map(len, texts)), logprobs=logprobs.tolist()))
    return out


def _answered(
    asked: Asked,
    instance: Instance,
    texts: list[list[int]],
    *,
    fed: int,
    tree: bool = False,
    logprobs: list[float] | None = None,
) -> Answered:
    return Answered(
        found=[asked.puzzle.read(instance, ids) for ids in texts],
        passes=fed * stack_passes(asked.model.config),
        solutions=len(asked.puzzle.solutions(instance)),
        tree=tree,
        texts=texts if logprobs else [],
        answers=[_answer(ids) for ids in texts] if logprobs else [],
        logprobs=logprobs or [],
    )


def _answer(ids: list[int]) -> tuple[int, ...]:
    """What a vote counts: the ids after the scratchpad if there is one, right or not."""
    return tuple(ids[ids.index(THINK_END) + 1 :] if THINK_END in ids else ids)


def _trimmed(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids
