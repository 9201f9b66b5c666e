"""Latent steps: a mixture of embeddings, drawn around the emitted token, is fed back in the token's place.

`LatentMixture` is the distribution of its weights, `LatentGates` decide where a step may be latent. `LatentDecoding` is
the loop, `LatentLogitsProcessor` the same for pipelines without `custom_generate`. Sources: see `mixture.py`.
"""

from proxytune.methods.latent.decoding import LatentDecoding
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import LatentMixture
from proxytune.methods.latent.processor import LatentLogitsProcessor

__all__ = ["LatentDecoding", "LatentGates", "LatentLogitsProcessor", "LatentMixture"]
