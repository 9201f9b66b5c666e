"""Members, and the one model they make."""

from importlib import import_module

# Importing transformers' Auto classes runs the hook in `proxytune/__init__.py`, which imports `models.model`. Here that
# happens while none of this package's modules is half imported. By name, so that none of transformers' is bound here.
import_module("transformers.models.auto.modeling_auto")
