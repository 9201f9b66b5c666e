"""proxytune steers a large causal language model at decoding time with two small ones; no weight is changed.

The table of contents. Names and modules are imported on first use (PEP 562), so that `proxytune --help` never imports
torch.

- `wrap`: compose base, expert and antiexpert into one model for `generate()`
- `ProxyTunedModel`: that model: a `PreTrainedModel` whose logits are the combined ones
- `ProxyTunedConfig`: its configuration
- `Recipe`: the adapter as a small JSON file
- `FusedDecoding`: a loop for `generate(custom_generate=…)`: one step on the members' logits per token
- `SpeculativeDecoding`: a loop in which a draft runs ahead, and nothing is lost
- `ForkDecoding`: a loop that grows a tree: branches part at forks, with exact weights and a hard budget
- `SiblingDecoding`: samples of a prompt that repel each other at forks, with exact weights and a hard budget
- `LatentDecoding`: a loop that feeds back a sampled mixture of embeddings in each token's place
- `RecursionDecoding`: noisy trajectories of a model that recurs, one of them selected
- `ProxyTuningLogitsProcessor`: the shift as a logits processor, for a pipeline of your own
- `ForkSamplingLogitsProcessor`: two temperatures (or a soft form): calm on most tokens, lively at forks
- `LatentLogitsProcessor`: latent steps as a logits processor to attach
- `ThinkingBudgetLogitsProcessor`: a budget for thinking, enforced
- `record`: what every `generate()` of a model decides, as a trace
- `Recording`: the same for one call of `generate()`

Everything else has one home:

- `proxytune.ops`: one decision on the members' logits, by `proxytune.ops.step` and `proxytune.ops.verify` with
  `proxytune.ops.SamplingParams` and `proxytune.ops.Noise`
- `proxytune.formulas`: how the members' logits become one row
- `proxytune.methods.forks`: `proxytune.methods.forks.ForkThreshold`
- `proxytune.methods.speculation`: the drafts
- `proxytune.methods.latent`: `proxytune.methods.latent.LatentMixture` and `proxytune.methods.latent.LatentGates`
- `proxytune.methods.recursion`: `proxytune.methods.recursion.LatentRecursion`, and how a model becomes one
- `proxytune.voting`: from samples to an answer; `proxytune.search`: spending a budget; `proxytune.budget`: counting it
- `proxytune.stats`: estimators over samples; `proxytune.demo`: the bundled family; `proxytune.trace`: what was recorded
- `proxytune.diagnostics`: what a policy has lost, from traces
- `proxytune.errors`: the exceptions
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from proxytune._version import __version__

if TYPE_CHECKING:
    from proxytune.generation.fused import FusedDecoding as FusedDecoding
    from proxytune.generation.recording import Recording as Recording
    from proxytune.generation.recording import record as record
    from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor as ForkSamplingLogitsProcessor
    from proxytune.methods.latent.decoding import LatentDecoding as LatentDecoding
    from proxytune.methods.latent.processor import LatentLogitsProcessor as LatentLogitsProcessor
    from proxytune.methods.recursion.decoding import RecursionDecoding as RecursionDecoding
    from proxytune.methods.speculation.decoding import SpeculativeDecoding as SpeculativeDecoding
    from proxytune.methods.steering.processor import ProxyTuningLogitsProcessor as ProxyTuningLogitsProcessor
    from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor as ThinkingBudgetLogitsProcessor
    from proxytune.methods.trees.fork_decoding import ForkDecoding as ForkDecoding
    from proxytune.methods.trees.sibling_decoding import SiblingDecoding as SiblingDecoding
    from proxytune.models.config import ProxyTunedConfig as ProxyTunedConfig
    from proxytune.models.model import ProxyTunedModel as ProxyTunedModel
    from proxytune.models.wrap import wrap as wrap
    from proxytune.recipe import Recipe as Recipe

_HOME = {
    "wrap": "proxytune.models.wrap",
    "ProxyTunedModel": "proxytune.models.model",
    "ProxyTunedConfig": "proxytune.models.config",
    "Recipe": "proxytune.recipe",
    "FusedDecoding": "proxytune.generation.fused",
    "SpeculativeDecoding": "proxytune.methods.speculation.decoding",
    "ForkDecoding": "proxytune.methods.trees.fork_decoding",
    "SiblingDecoding": "proxytune.methods.trees.sibling_decoding",
    "LatentDecoding": "proxytune.methods.latent.decoding",
    "RecursionDecoding": "proxytune.methods.recursion.decoding",
    "ProxyTuningLogitsProcessor": "proxytune.methods.steering.processor",
    "ForkSamplingLogitsProcessor": "proxytune.methods.forks.processor",
    "LatentLogitsProcessor": "proxytune.methods.latent.processor",
    "ThinkingBudgetLogitsProcessor": "proxytune.methods.thinking.processor",
    "record": "proxytune.generation.recording",
    "Recording": "proxytune.generation.recording",
}

_MODULES = (
    *("budget", "costs", "demo", "diagnostics", "errors", "formulas", "generation", "methods", "models", "ops"),
    *("recipe", "search", "stats", "throughput", "trace", "voting"),
)

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"proxytune.{name}")
    from proxytune._homes import advice

    missing = f"module 'proxytune' has no attribute {name!r}"
    if (said := advice(name, [*_HOME, *_MODULES])) is None:
        raise AttributeError(missing)
    # Without `name`, Python adds no guess of its own.
    raise AttributeError(f"{missing}. {said}", obj=sys.modules["proxytune"])


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(_module: Any) -> None:
    # `import proxytune` must be enough for AutoModelForCausalLM to open a saved recipe, in either order of imports,
    # and must not itself import transformers: the command line's --help would take seconds.
    importlib.import_module("proxytune.models.model")
