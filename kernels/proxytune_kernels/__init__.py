"""Triton kernels of proxytune: a leaf package that imports torch and triton, and nothing of proxytune.

The folder above is not a package on purpose: it would shadow the `kernels` package that transformers imports.

`step` runs K1 (`measure.steer_tiles`: one pass over the members' rows) and K2 (`decide.resolve`: from its sums to
statistics and draws), then `wide.resolve_wide` if a row is truncated; K1 alone if only the combined logits are wanted.
`verify` runs K1 over the members' and the drafts' rows, `distribution.laws_of` and `wide.resolve_wide` for the
distribution of each row, then `verify.residue` for the residual's mass per tile and `verify.settle` for the tokens.
`mix` is one launch of `mix.mix_rows`. `again` repeats a `step` with other logits (`prepared`).

K2 and `laws_of` go back only to the tiles or groups that matter. Truncation stores up to 1,024 candidates
(`candidates`). A row with more, as with top-p without top-k on a flat row, is left to `wide.resolve_wide`, which sorts
it (`runs`).

Arguments that many kernels share:

- `logits`: (members, strides, widths, weights, offsets, floors): M pointers to rows of logits, the base first; their
  row strides in elements; their numbers of columns (past the base's, the result is −inf); the weights, a pointer to
  float32 `[B, M]` with `PER_ROW`, else a tuple of M numbers; what is subtracted from each member's logits, a pointer to
  float32 `[B, M]`, or None; the least logit that is allowed, a pointer to float32 `[B]`, or None. With floors, members,
  strides and widths have one more: the member whose logit that is.
- `temperature`, `fork_temperature`, `fork_threshold` (nats), `top_p`, `log_min_p`: float32 `[B]`; `top_k`: int32 `[B]`.
  Off: top_k = 0, top_p = 1, log_min_p = −inf.
- `seed`, `stream`, `position`, `branch`: int64 `[B]`, the noise keys of `proxytune.ops.noise` (`stream` is its `row`).
  `noise`: those of one row, (seed int64, position, stream and branch uint32).
- `part`: float32 `[B, FIELDS, tiles]`, a row's sums per tile, see `measure.FIELDS`; `groups`: float32 `[B, n_groups]`,
  the maxima of groups of columns.
- `work`: pointers to a row's workspaces, int32: the numbers of live groups behind LISTED counts, and the columns of the
  stored candidates.
- `left`: float32 `[rows, LEFT]`, the rows that `wide.resolve_wide` has to truncate, see `runs.leave`; `store`: int64,
  `runs.WORDS` per run of columns, the sorted rows; `of_runs`: the pointers of `runs.runs_of`, `runs` their number.
- `top`: the row's largest logit; `total`: Σ exp((z − top)/T); `relative`: per tile, its maximum minus `top`.
- `TILE`, `GROUP`: columns per tile and group; `PER_READ` and, without masks, `AT_ONCE`: groups read at once;
  `…_PADDED`: rounded up to a power of two.
"""

from __future__ import annotations

from proxytune_kernels.launch import GROUP, TILE, again, mix, nucleus, step, verify

__all__ = ["GROUP", "TILE", "again", "mix", "nucleus", "step", "verify"]
