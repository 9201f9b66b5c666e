"""Latent steps: a mixture of embeddings, drawn around the emitted token, is fed back in the token's place.

`LatentMixture` is the law of the weights, `LatentGates` say where a step may be latent. `LatentDecoding` is the loop,
`LatentLogitsProcessor` the same for pipelines that pass no `custom_generate`. Sources: `mixture.py` names each law's.
"""

from proxytune.methods.latent.decoding import LatentDecoding
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import LatentMixture
from proxytune.methods.latent.processor import LatentLogitsProcessor

__all__ = ["LatentDecoding", "LatentGates", "LatentLogitsProcessor", "LatentMixture"]
