"""A tree in text."""

from __future__ import annotations

import math

from proxytune.methods.trees.tree import Branch, ForkTree


def test_a_tree_in_text() -> None:
    root = Branch(0, tokens=[5, 6, 7], entropies=[1.0, 2.0, 3.0], finished=True)
    early = Branch(1, root, 1, math.log(0.5), tokens=[8], entropies=[2.0], finished=True)
    late = Branch(2, root, 2, math.log(0.25), tokens=[9, 9], entropies=[3.0, 0.0])
    nested = Branch(3, early, 2, math.log(0.25), tokens=[4], entropies=[0.5], finished=True)
    tree = ForkTree(0, [root, early, late, nested])
    assert tree.render() == (
        "0: 3 tokens, weight 0.500\n"
        "├─ 1 at token 1, H 2.00 nats: 1 tokens, weight 0.250\n"
        "│  └─ 3 at token 2, H 0.50 nats: 1 tokens, weight 0.125\n"
        "└─ 2 at token 2, H 3.00 nats: 2 tokens, cut, weight 0.125"
    )
    assert tree.render(lambda ids: "/".join(map(str, ids))).splitlines()[-1].endswith("weight 0.125  '9/9'")
    assert nested.along("tokens") == [5, 8, 4]
    assert (tree.tokens, len(tree), len(nested)) == (7, 4, 3)
