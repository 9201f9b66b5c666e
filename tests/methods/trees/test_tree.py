"""A tree in text."""

from __future__ import annotations

import math

from proxytune.methods.trees.tree import Branch, ForkTree


def grown() -> ForkTree:
    root = Branch(0, tokens=[5, 6, 7], entropies=[1.0, 2.0, 3.0], finished=True)
    early = Branch(1, root, 1, math.log(0.5), tokens=[8], entropies=[2.0], finished=True)
    late = Branch(2, root, 2, math.log(0.25), tokens=[9, 9], entropies=[3.0, 0.0])
    nested = Branch(3, early, 2, math.log(0.25), tokens=[4], entropies=[0.5], finished=True)
    return ForkTree(0, [root, early, late, nested], planned=4)


def test_a_tree_in_text() -> None:
    tree = grown()
    nested = tree.branches[-1]
    assert tree.render() == (
        "0: 3 tokens, weight 0.500\n"
        "├─ 1 at token 1, H 2.00 nats: 1 tokens, weight 0.250\n"
        "│  └─ 3 at token 2, H 0.50 nats: 1 tokens, weight 0.125\n"
        "└─ 2 at token 2, H 3.00 nats: 2 tokens, cut, weight 0.125"
    )
    assert tree.render(lambda ids: "/".join(map(str, ids))).splitlines()[-1].endswith("weight 0.125  '9/9'")
    assert nested.along("tokens") == [5, 8, 4]
    assert (tree.tokens, len(tree), len(nested)) == (7, 4, 3)


def test_trees_and_branches_say_what_they_are() -> None:
    tree = grown()
    assert repr(tree) == "ForkTree(prompt 0, 4 of 4 leaves, 7 tokens)"
    assert [repr(tree.branches[0]), repr(tree.branches[2])] == [
        "Branch(0, 3 own tokens)",
        "Branch(2 of 0 from token 2, 2 own tokens, cut)",
    ]


def test_a_tree_as_nested_data() -> None:
    told = grown().nested(lambda ids: "/".join(map(str, ids)))
    assert (told["text"], told["weight"], told["entropy"]) == ("5", 1.0, 1.0)
    rest, early = told["children"]
    assert (rest["text"], rest["weight"], rest["entropy"]) == ("6", 0.625, 2.0)
    assert rest["children"] == [
        {"text": "7", "tokens": 1, "entropy": 3.0, "weight": 0.5, "leaf": 0, "finished": True},
        {"text": "9/9", "tokens": 2, "entropy": 3.0, "weight": 0.125, "leaf": 2, "finished": False},
    ]
    assert (early["text"], early["weight"]) == ("8", 0.375)
    assert [(leaf["leaf"], leaf["tokens"]) for leaf in early["children"]] == [(1, 0), (3, 1)]
