"""One package a method.

A method's loop is `decoding.py` (a folder with several names each: `fork_decoding.py`), its logits processor
`processor.py`, what it refuses `checks.py`, what it returns `output.py`. What loops share is in
`proxytune.generation`: `call`,
`sampler`, and `fused`, the plain loop.

To add one: its folder; its line in `proxytune/__init__.py` (table, imports, `_HOME`) and in the import contract of
`pyproject.toml`; its line in `tests/methods/test_contract.py`.
"""

from proxytune._homes import lazy_submodules

__getattr__ = lazy_submodules(__name__)
