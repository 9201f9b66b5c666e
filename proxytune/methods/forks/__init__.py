"""Entropy-aware sampling: a minority of tokens are high-entropy forks, where reasoning is decided.

`ForkThreshold` is the entropy (nats) above which a token is a fork: fixed, calibrated or streaming.
`ForkSamplingLogitsProcessor` explores at forks and samples calmly elsewhere. Source: Wang et al. 2025, "Beyond the
80/20 rule" (arXiv 2506.01939).
"""

from proxytune.methods.forks.processor import ForkSamplingLogitsProcessor
from proxytune.methods.forks.threshold import ForkThreshold

__all__ = ["ForkSamplingLogitsProcessor", "ForkThreshold"]
