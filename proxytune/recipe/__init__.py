"""The adapter as a small JSON file: which models, which formula, which α. It never holds weights.

```json
{
  "format_version": 2,
  "base": {"id": "org/large", "revision": null},
  "expert": {"id": "org/small-tuned", "revision": "v2"},
  "antiexpert": {"id": "org/small", "revision": null},
  "formula": "proxy-tuning",
  "alpha": 0.5
}
```

`proxytune calibrate` adds a `fork_threshold` (`ForkCalibration`):
`{"share": 0.2, "nats": 0.41, "tokens": 20000, "temperature": 1.0, "measure": "raw", "alpha": 0.5}`. Where expert
and base end their texts with different tokens, `end_tokens` says whose stop the composition: "union", "base" or
"expert".

`formula` is a name out of `proxytune.formulas.FORMULAS`, with its further `settings`, or a sum that is written down.
Members of other names stand in `members`; one that is another's model once more is a view of it (`View`):

```json
{
  "format_version": 2,
  "base": {"id": "org/large", "revision": null},
  "formula": "1.5*base - 0.5*no_context",
  "alpha": 1.0,
  "members": {"no_context": {"of": "base", "prompt": {"without": ["<context>", "</context>"]}}},
  "settings": {"gate": {"entropy": 0.1}}
}
```

`proxytune tune --write` adds `evidence`: under `tune`, for each number that was tuned, the file (name and SHA-256), the
items, the curve and the chosen value; under `test`, the files that nothing may be tuned on.

A strength that changes while a text is written is a text, such as `"linear(1, 0, 64)"`. Recipes of version 1, which
know proxy-tuning's three roles alone, are read as well.

An `id` is a hub id or a folder. A relative folder is first looked for next to the recipe, so that a folder with a
recipe and its models can be moved; `save_pretrained` writes folders in or beside the recipe's as relative ones. Unknown
keys are refused, so that a misspelt one is not ignored.

A member that carries an adapter names its folder or hub id as `adapter`. A member may have a `load`: the arguments of
`from_pretrained` that decide which model it is (`LOAD_KEYS`), e.g.
`{"id": "models", "revision": null, "load": {"gguf_file": "large.Q4_K_M.gguf"}}`. Its `trust_remote_code` says that the
member has code of its own; that code runs only as `ProxyTunedModel.from_pretrained` tells.
"""

from proxytune.recipe.adapter import FORMAT_VERSION, RECIPE_FILE, EndTokens, Recipe, read_json
from proxytune.recipe.fork_calibration import MEASURES, ForkCalibration, Measure
from proxytune.recipe.member_ref import LOAD_KEYS, ROLES, MemberRef
from proxytune.recipe.writing import write_fork_threshold, write_tuned

__all__ = [
    "FORMAT_VERSION",
    "LOAD_KEYS",
    "MEASURES",
    "RECIPE_FILE",
    "ROLES",
    "EndTokens",
    "ForkCalibration",
    "Measure",
    "MemberRef",
    "Recipe",
    "read_json",
    "write_fork_threshold",
    "write_tuned",
]
