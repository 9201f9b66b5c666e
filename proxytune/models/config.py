"""The composed model's config: like the config of one model that has the layers of all its members."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from proxytune.errors import RecipeError
from proxytune.models.load_arguments import refuse_dtype
from proxytune.models.members.composite_cache import cached_layers
from proxytune.recipe import RECIPE_FILE, Recipe, read_json

__all__ = ["CARRIED", "ProxyTunedConfig"]

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


CARRIED = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""What `config.json` says of the composition: the width and special ids of the base, and the shortest context."""


class ProxyTunedConfig(PreTrainedConfig):
    """The config of a `ProxyTunedModel`.

    On disk it points at the recipe beside it (`proxytune_config.json`), and has what harnesses ask a config for without
    opening the model (`CARRIED`). After `bind` it also has what `generate()` reads from a config; its number of layers
    is the sum over the members.

    Attributes:
        recipe: Members, formula and α; None if some member exists only in memory.
    """

    model_type = "proxytune"
    has_no_defaults_at_init = True

    def __init__(self, recipe: Recipe | None = None, **kwargs: Any) -> None:
        """Make an unbound config; `**kwargs` are attributes of `PreTrainedConfig`.

        Raises:
            InputError: If `dtype` is the name of none.
        """
        refuse_dtype(kwargs)  # transformers' Auto classes pass it here first
        super().__init__(**kwargs)
        self.__dict__["recipe"] = recipe
        self.__dict__["_member_configs"] = []
        self.__dict__["_spans"] = []

    def bind(self, member_configs: Sequence[PreTrainedConfig]) -> ProxyTunedConfig:
        """Copy what `generate()` reads from the members' configs (the base's first), and return self."""
        texts = [c.get_text_config(decoder=True) for c in member_configs]
        self.__dict__["_member_configs"] = texts
        for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            if hasattr(texts[0], name):
                setattr(self, name, getattr(texts[0], name))
        contexts = [n for c in texts if (n := getattr(c, "max_position_embeddings", None)) is not None]
        if contexts:
            self.max_position_embeddings = min(contexts)
        spans, start = [], 0
        for config in texts:
            spans.append((start, start + cached_layers(config)))
            start = spans[-1][1]
        self.__dict__["_spans"] = spans  # asked in every step
        self.num_hidden_layers = start
        return self

    @property
    def member_configs(self) -> list[PreTrainedConfig]:
        """The members' text configs, the base's first; empty before `bind`."""
        configs: list[PreTrainedConfig] = self.__dict__.get("_member_configs", [])
        return configs

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Each member's first layer in the composite cache, and one past its last."""
        spans: list[tuple[int, int]] = self.__dict__.get("_spans", [])
        return spans

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `config.json` and the recipe beside it; RecipeError if the recipe is missing or invalid."""
        hub = {k: v for k, v in kwargs.items() if k in _HUB_ARGUMENTS}
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config["recipe"] = load_recipe(pretrained_model_name_or_path, **hub)
        return config, unused

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: everything but the recipe, which has its own file."""
        apart = ("recipe", "_member_configs", "_spans")
        held: dict[str, Any] = {k: self.__dict__.pop(k) for k in apart if k in self.__dict__}
        try:
            return super().to_dict()
        finally:
            self.__dict__.update(held)


def load_recipe(source: str | Path, **hub: Any) -> Recipe:
    """Read a recipe from a folder, a JSON file or a hub id; RecipeError if it is missing or invalid."""
    if Path(source).exists():
        return Recipe.load(Path(source) / (hub.get("subfolder") or ""))
    try:
        file = cached_file(str(source), RECIPE_FILE, **hub)
    except OSError as error:
        raise RecipeError.of(
            "recipe",
            expected=f"a folder or hub id with a {RECIPE_FILE}",
            got=repr(str(source)),
            remedy=f"transformers says: {str(error).strip().splitlines()[0]}",
        ) from error
    return Recipe.from_json(read_json(Path(str(file))))
