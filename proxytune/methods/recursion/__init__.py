"""Keyed noise at the high-level state of recurrent-depth models: several trajectories per prompt, and a selection.

`RecursionDecoding` decodes. A `LatentRecursion` tells where a class of models keeps its state; `register_recursion`
registers it. A frozen model has no learned mean and variance of the transition, so this is not GRAM (arXiv 2605.19376).
"""

from proxytune.methods.recursion.adapters import LatentRecursion, register_recursion
from proxytune.methods.recursion.decoding import RecursionDecoding
from proxytune.methods.recursion.output import RecursionOutput

__all__ = ["LatentRecursion", "RecursionDecoding", "RecursionOutput", "register_recursion"]
