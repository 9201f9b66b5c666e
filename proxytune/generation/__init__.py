"""What every loop shares around transformers' `generate()`."""

from proxytune._homes import lazy_submodules

__getattr__ = lazy_submodules(__name__)
