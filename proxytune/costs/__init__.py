"""What a token costs at least, before anything is measured."""

from proxytune._homes import lazy_submodules

__getattr__ = lazy_submodules(__name__)
