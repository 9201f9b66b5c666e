"""Members, and the one model they make."""

# Importing transformers' Auto classes runs the hook in `proxytune/__init__.py`, which imports `models.model`. Here that
# happens while none of this package's modules is half imported.
import transformers.models.auto.modeling_auto  # noqa: F401
