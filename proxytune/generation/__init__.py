"""What every loop shares around transformers' `generate()`, and constraints that hold in all of them."""

from proxytune._homes import lazy_submodules
from proxytune.generation.constraints import ConstraintLogitsProcessor

__all__ = ["ConstraintLogitsProcessor"]

__getattr__ = lazy_submodules(__name__)
