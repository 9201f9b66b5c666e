"""Proxy-tuning as a logits processor, for pipelines that own their model.

Source: Liu et al. 2024 (arXiv 2401.08565).
"""

from proxytune.methods.steering.processor import ProxyTuningLogitsProcessor

__all__ = ["ProxyTuningLogitsProcessor"]
