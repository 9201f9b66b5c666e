"""A thinking budget: `ThinkingBudgetLogitsProcessor` ends a thinking span in time, or prolongs it.

Source: budget forcing, Muennighoff et al. 2025 (s1, arXiv 2501.19393).
"""

from proxytune.methods.thinking.processor import ThinkingBudgetLogitsProcessor

__all__ = ["ThinkingBudgetLogitsProcessor"]
