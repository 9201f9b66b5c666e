"""proxytune steers a large causal language model at decoding time with two small ones; no weight is changed.

The table of contents. Names are imported on first use (PEP 562), so that `proxytune --help` never imports torch.

========================== ======================================================================================
`wrap`                     compose base, expert and antiexpert into one model for `generate()`
`ProxyTunedModel`          that model: a `PreTrainedModel` whose logits are the combined ones
`ProxyTuningLogitsProcessor` the same as a logits processor, for a pipeline of your own
`FusedDecoding`            a loop for `generate(custom_generate=…)`: one step on the members' logits per token
`SpeculativeDecoding`      a loop in which a draft runs ahead, and nothing is lost: the expert, a `DraftModel`,
                           `PromptLookup`, `Bigrams`
`ForkThreshold`            the entropy above which a token is a fork: fixed, calibrated or streaming
`ForkSamplingLogitsProcessor` two temperatures (or a soft form): calm on most tokens, lively at forks
`ForkDecoding`             a loop that grows a tree: branches part at forks, with exact weights and a hard budget
`SiblingDecoding`          samples of a prompt that repel each other at forks, with exact weights and a hard budget
`StochasticRecursion`      noisy trajectories of a model that recurs, one of them selected (`register_recursion`)
`StochasticLatentSampler`  a loop that feeds back a sampled `Mixture` of embeddings in each token's place, where `Gates`
                           let it
`StochasticLatentLogitsProcessor` the same as a logits processor to attach
`step`                     one decision on members' logits: combine, measure, draw; with `Sampling` and `Noise`
`verify`                   drafted tokens accepted or rejected so that their law is that of `step`'s draws (`Verdict`)
`ProxyTuning`              the formula `base + alpha * (expert - antiexpert)`
`Recipe`                   the adapter as a small JSON file
`errors`                   what can go wrong, drawn as a tree
========================== ======================================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from proxytune._version import __version__

if TYPE_CHECKING:
    from proxytune.decoding.drafts import DraftModel
    from proxytune.decoding.forks import ForkDecoding
    from proxytune.decoding.fused import FusedDecoding
    from proxytune.decoding.latent import StochasticLatentSampler
    from proxytune.decoding.lookups import Bigrams, PromptLookup
    from proxytune.decoding.recursion import LatentRecursion, register_recursion
    from proxytune.decoding.siblings import SiblingDecoding
    from proxytune.decoding.speculative import SpeculativeDecoding
    from proxytune.entropy import ForkThreshold
    from proxytune.formula import ProxyTuning
    from proxytune.gating import Gates
    from proxytune.mixtures import Mixture
    from proxytune.model import ProxyTunedConfig, ProxyTunedModel
    from proxytune.noise import Noise
    from proxytune.ops import step, verify
    from proxytune.processors.forks import ForkSamplingLogitsProcessor
    from proxytune.processors.latent import StochasticLatentLogitsProcessor
    from proxytune.processors.proxy_tuning import ProxyTuningLogitsProcessor
    from proxytune.recipe import Recipe
    from proxytune.sampling import Sampling
    from proxytune.step_outputs import Verdict
    from proxytune.trajectories import StochasticRecursion
    from proxytune.wrapping import wrap

__all__ = [
    "Bigrams",
    "DraftModel",
    "ForkDecoding",
    "ForkSamplingLogitsProcessor",
    "ForkThreshold",
    "FusedDecoding",
    "Gates",
    "LatentRecursion",
    "Mixture",
    "Noise",
    "PromptLookup",
    "ProxyTunedConfig",
    "ProxyTunedModel",
    "ProxyTuning",
    "ProxyTuningLogitsProcessor",
    "Recipe",
    "Sampling",
    "SiblingDecoding",
    "SpeculativeDecoding",
    "StochasticLatentLogitsProcessor",
    "StochasticLatentSampler",
    "StochasticRecursion",
    "Verdict",
    "__version__",
    "register_recursion",
    "step",
    "verify",
    "wrap",
]

_HOME = {
    "Bigrams": "proxytune.decoding.lookups",
    "DraftModel": "proxytune.decoding.drafts",
    "ForkDecoding": "proxytune.decoding.forks",
    "ForkSamplingLogitsProcessor": "proxytune.processors.forks",
    "ForkThreshold": "proxytune.entropy",
    "FusedDecoding": "proxytune.decoding.fused",
    "Gates": "proxytune.gating",
    "LatentRecursion": "proxytune.decoding.recursion",
    "Mixture": "proxytune.mixtures",
    "Noise": "proxytune.noise",
    "PromptLookup": "proxytune.decoding.lookups",
    "ProxyTunedConfig": "proxytune.model",
    "ProxyTunedModel": "proxytune.model",
    "ProxyTuning": "proxytune.formula",
    "ProxyTuningLogitsProcessor": "proxytune.processors.proxy_tuning",
    "Recipe": "proxytune.recipe",
    "Sampling": "proxytune.sampling",
    "SiblingDecoding": "proxytune.decoding.siblings",
    "SpeculativeDecoding": "proxytune.decoding.speculative",
    "StochasticLatentLogitsProcessor": "proxytune.processors.latent",
    "StochasticLatentSampler": "proxytune.decoding.latent",
    "StochasticRecursion": "proxytune.trajectories",
    "Verdict": "proxytune.step_outputs",
    "register_recursion": "proxytune.decoding.recursion",
    "step": "proxytune.ops",
    "verify": "proxytune.ops",
    "wrap": "proxytune.wrapping",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'proxytune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(_module: Any) -> None:
    # `import proxytune` must be enough for AutoModelForCausalLM to open a saved recipe, in either order of imports,
    # and must not itself import transformers: the command line's --help would take seconds.
    importlib.import_module("proxytune.model")
