"""Triton kernels of proxytune: a leaf package that imports torch and triton and nothing of proxytune.

The folder above is deliberately not a package: it would shadow the `kernels` package that transformers imports.

`step` runs K1 (`tiles.steer_tiles`: one pass over the members' rows) and K2 (`resolve.resolve`: from its sums to
statistics and draws); with the combined logits as the only output, K1 alone (K3).
`verify` runs K1 over the rows and over the drafts' rows, `laws.laws_of` for the law of each, and then decides on all
positions of a text at once: `verdicts.residue` for the residual's mass by tile, `verdicts.settle` for the tokens.
`mix` mixes rows of an embedding in one launch of `mix.mix_rows`.
"""

from __future__ import annotations

from proxytune_kernels.launch import GROUP, TILE, mix, step, verify

__all__ = ["GROUP", "TILE", "mix", "step", "verify"]
