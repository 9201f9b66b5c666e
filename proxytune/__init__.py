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
    from proxytune.formulas.proxy_tuning import ProxyTuning
    from proxytune.generation.fused import FusedDecoding
    from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor
    from proxytune.methods.forks.threshold import ForkThreshold
    from proxytune.methods.latent.decoding import StochasticLatentSampler
    from proxytune.methods.latent.gates import Gates
    from proxytune.methods.latent.mixture import Mixture
    from proxytune.methods.latent.processor import StochasticLatentLogitsProcessor
    from proxytune.methods.recursion.adapters import LatentRecursion, register_recursion
    from proxytune.methods.recursion.decoding import StochasticRecursion
    from proxytune.methods.speculation.decoding import SpeculativeDecoding
    from proxytune.methods.speculation.lookup_drafts import Bigrams, PromptLookup
    from proxytune.methods.speculation.model_drafts import DraftModel
    from proxytune.methods.steering.processor import ProxyTuningLogitsProcessor
    from proxytune.methods.trees.fork_decoding import ForkDecoding
    from proxytune.methods.trees.sibling_decoding import SiblingDecoding
    from proxytune.models.model import ProxyTunedConfig, ProxyTunedModel
    from proxytune.models.wrap import wrap
    from proxytune.ops import step, verify
    from proxytune.ops.noise import Noise
    from proxytune.ops.outputs import Verdict
    from proxytune.ops.sampling_params import Sampling
    from proxytune.recipe import Recipe

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
    "Bigrams": "proxytune.methods.speculation.lookup_drafts",
    "DraftModel": "proxytune.methods.speculation.model_drafts",
    "ForkDecoding": "proxytune.methods.trees.fork_decoding",
    "ForkSamplingLogitsProcessor": "proxytune.methods.forks.processor",
    "ForkThreshold": "proxytune.methods.forks.threshold",
    "FusedDecoding": "proxytune.generation.fused",
    "Gates": "proxytune.methods.latent.gates",
    "LatentRecursion": "proxytune.methods.recursion.adapters",
    "Mixture": "proxytune.methods.latent.mixture",
    "Noise": "proxytune.ops.noise",
    "PromptLookup": "proxytune.methods.speculation.lookup_drafts",
    "ProxyTunedConfig": "proxytune.models.model",
    "ProxyTunedModel": "proxytune.models.model",
    "ProxyTuning": "proxytune.formulas.proxy_tuning",
    "ProxyTuningLogitsProcessor": "proxytune.methods.steering.processor",
    "Recipe": "proxytune.recipe",
    "Sampling": "proxytune.ops.sampling_params",
    "SiblingDecoding": "proxytune.methods.trees.sibling_decoding",
    "SpeculativeDecoding": "proxytune.methods.speculation.decoding",
    "StochasticLatentLogitsProcessor": "proxytune.methods.latent.processor",
    "StochasticLatentSampler": "proxytune.methods.latent.decoding",
    "StochasticRecursion": "proxytune.methods.recursion.decoding",
    "Verdict": "proxytune.ops.outputs",
    "register_recursion": "proxytune.methods.recursion.adapters",
    "step": "proxytune.ops",
    "verify": "proxytune.ops",
    "wrap": "proxytune.models.wrap",
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
    importlib.import_module("proxytune.models.model")
