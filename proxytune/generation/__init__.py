"""What every loop shares around transformers' `generate()`, and constraints that hold in all of them."""

from typing import TYPE_CHECKING, Any

from proxytune._homes import lazy_submodules
from proxytune.generation.constraints import ConstraintLogitsProcessor

if TYPE_CHECKING:
    from proxytune.generation.prompt_view_pipeline import PromptViewPipeline as PromptViewPipeline

__all__ = ["ConstraintLogitsProcessor"]

_submodule = lazy_submodules(__name__)


def __getattr__(name: str) -> Any:
    if name == "PromptViewPipeline":  # transformers' pipelines take long to import
        from proxytune.generation.prompt_view_pipeline import PromptViewPipeline

        return PromptViewPipeline
    return _submodule(name)
