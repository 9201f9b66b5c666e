"""Trees of one prompt: branches that part at forks, and siblings that repel each other, with exact weights.

`ForkDecoding` draws the children of a fork without replacement (Kool et al. 2019, arXiv 1903.06059), so estimates over
the leaves are unbiased. `SiblingDecoding` penalises what siblings chose, and weighs it back. A token budget is hard.
"""

from proxytune.methods.trees.fork_decoding import ForkDecoding
from proxytune.methods.trees.output import TreeOutput
from proxytune.methods.trees.sibling_decoding import SiblingDecoding
from proxytune.methods.trees.tree import Branch, ForkTree

__all__ = ["Branch", "ForkDecoding", "ForkTree", "SiblingDecoding", "TreeOutput"]
