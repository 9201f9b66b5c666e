"""Noise at the high-level state of models that recur: several trajectories of one prompt, and a selection.

`RecursionDecoding` decodes. `LatentRecursion` says of a class of models where its state is; `register_recursion` makes
it known. A frozen model has no learned mean and variance of the transition, so this is not GRAM (arXiv 2605.19376).
"""

from proxytune.methods.recursion.adapters import LatentRecursion, register_recursion
from proxytune.methods.recursion.decoding import RecursionDecoding
from proxytune.methods.recursion.output import RecursionOutput

__all__ = ["LatentRecursion", "RecursionDecoding", "RecursionOutput", "register_recursion"]
