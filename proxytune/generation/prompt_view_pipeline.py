"""`PromptViewPipeline`: a text-generation pipeline that makes members' own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TextGenerationPipeline

from proxytune.formulas.prompt_view import PromptView
from proxytune.models.own_prompts import joined_prompts, prompt_views

__all__ = ["PromptViewPipeline"]


class PromptViewPipeline(TextGenerationPipeline):
    """`pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=PromptViewPipeline)`.

    As transformers' own, with chat messages or texts, one or many. Each member of the composed model with a prompt of
    its own reads what its `PromptView` makes of the base's: `View("base", prompt=PromptView(…))`, which the model's
    recipe holds as well. With a model that has no such member it is transformers' own pipeline.

    Raises:
        InputError: If a member reads a prompt of its own, and no `PromptView` says which; or a `PromptView` cannot be
            applied to an input.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_views: Mapping[str, PromptView] = prompt_views(self.model)

    def preprocess(self, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:
        """One input, as the base and as each member with a prompt of its own reads it."""
        inputs = super().preprocess(prompt_text, *args, **kwargs)
        own = {}
        for role, view in self.prompt_views.items():
            chosen = kwargs
            if isinstance(prompt_text, str):
                theirs: Any = view.of_text(prompt_text)
            else:
                theirs = type(prompt_text)(view.of_messages(prompt_text.messages))
                if view.template is not None:
                    encode = {**(kwargs.get("tokenizer_encode_kwargs") or {}), "chat_template": view.template}
                    chosen = {**kwargs, "tokenizer_encode_kwargs": encode}
            made = super().preprocess(theirs, *args, **chosen)
            own[role] = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        if own:
            inputs["own_prompts"] = own
        return inputs

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        own = model_inputs.pop("own_prompts", None)
        if own is not None:
            rows: Sequence[Mapping[str, Any]] = own if isinstance(own, list) else [own]
            made = {role: joined_prompts([row[role] for row in rows]) for role in self.prompt_views}
            generate_kwargs["prompts"] = made | dict(generate_kwargs.get("prompts") or {})
        return super()._forward(model_inputs, **generate_kwargs)
