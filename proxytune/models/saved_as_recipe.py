"""A composed model as a recipe: what it saves, and how it is opened again."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import GenerationConfig

from proxytune.errors import MemberNotFoundError, RecipeError
from proxytune.formulas.base import Formula
from proxytune.formulas.checks import check_formula
from proxytune.formulas.registry import FORMULAS, is_kept, recipe_of
from proxytune.models.config import CARRIED, ProxyTunedConfig, load_recipe
from proxytune.models.end_tokens import stop_composed
from proxytune.models.loading import open_members
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.models.references import adapters_of
from proxytune.models.roles import refuse_no_shift
from proxytune.models.saving import save_adapter
from proxytune.models.vision import reopened_as
from proxytune.recipe import LOAD_KEYS, RECIPE_FILE, Recipe
from proxytune.validation import shown

__all__ = ["SavedAsRecipe"]


class SavedAsRecipe:
    """The part of `ProxyTunedModel` that saves and opens it."""

    config: Any
    generation_config: GenerationConfig
    expert: nn.Module
    antiexpert: nn.Module
    formula: Formula
    alpha: float
    members: list[Member]
    name_or_path: str
    _adapters: dict[str, Any]

    @property
    def recipe(self) -> Recipe | None:
        """The current adapter.

        None if a member exists only in memory, got a PEFT adapter after it was composed, or was loaded with an argument
        that a recipe cannot keep (a config or a state dict, changed fields of the config).
        """
        recipe: Recipe | None = self.config.recipe
        if any(adapters_of(m.model) != self._adapters[m.role] for m in self.members) or self._not_kept():
            return None
        return None if recipe is None else replace(recipe, **recipe_of(self.formula))

    def _not_kept(self) -> str:
        """A load argument of a member that a recipe cannot keep, as `role: name=value`; empty if it can keep all."""
        recipe: Recipe | None = self.config.recipe
        members = {} if recipe is None else recipe.members
        found = {role: name for role, reference in members.items() if (name := reference.not_kept())}
        return next((f"{name}={shown(members[role].load[name], 80)} of the {role}" for role, name in found.items()), "")

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the adapter: the recipe, the files that open it, and the base's tokenizer; no weights.

        Args:
            save_directory: A folder. If saving fails, it is left as it was.
            **kwargs: Accepted for `push_to_hub()`, which calls this; there are no weights to shard.

        Raises:
            RecipeError: If `push_to_hub=True` is passed; if a member has no folder or hub id, was loaded with an
                argument that a recipe cannot keep, or expert and antiexpert have the same place; if the formula is not
                registered; if the folder is a member's, or cannot be written.
        """
        if kwargs.get("push_to_hub"):
            raise RecipeError.of(
                "save_pretrained",
                expected="a folder to save to",
                got="push_to_hub=True",
                remedy="Call model.push_to_hub(repo_id).",
            )
        recipe = self.recipe
        if found := self._not_kept():
            raise RecipeError.of(
                "save_pretrained",
                expected=f"members loaded with no other lasting arguments than {', '.join(LOAD_KEYS)}",
                got=found,
                remedy="A recipe cannot keep it. Save that member with its own save_pretrained, and wrap the folder.",
            )
        base = self.members[0].model
        if other := reopened_as(base):
            raise RecipeError.of(
                "save_pretrained",
                expected="a base that AutoModelForCausalLM opens as it is",
                got=f"a {type(innermost(base)).__name__}, which it "
                + (f"opens as a {other}, for text alone" if other != "nothing" else "does not open"),
                remedy="A recipe cannot keep it: load the base with AutoModelForImageTextToText, and wrap it.",
            )
        if recipe is None:
            raise RecipeError.of(
                "save_pretrained",
                expected="members that were loaded from a folder or the hub",
                got="a member that exists only in memory, or carries a PEFT adapter",
                remedy="Save that member with its own save_pretrained, and wrap the folder.",
            )
        if recipe.expert is not None and recipe.expert == recipe.antiexpert and self.expert is not self.antiexpert:
            raise RecipeError.of(
                "save_pretrained",
                expected="an expert and an antiexpert from different places",
                got=f"{getattr(recipe.expert, 'id', recipe.expert)!r} for both, though they are two models; one was "
                "probably tuned in memory",
                remedy="Save the tuned one with its own save_pretrained, and wrap the folder.",
            )
        if not is_kept(self.formula):
            unknown = recipe.formula not in FORMULAS
            known = "is not in proxytune.formulas.FORMULAS" if unknown else "has other weights at that α there"
            raise RecipeError.of(
                "save_pretrained",
                expected="a formula that its name, α and settings give back, which is what a recipe keeps of it",
                got=f"{self.formula!r}, which {known}",
                remedy=f"Register it first (FORMULAS[{recipe.formula!r}] = …), under a name of its own.",
            )
        carried = {name: getattr(self.config, name) for name in CARRIED if hasattr(self.config, name)}
        if self.generation_config is not None:
            carried["eos_token_id"] = self.generation_config.eos_token_id
        if self.config.is_encoder_decoder:
            carried["is_encoder_decoder"] = True
        save_adapter(save_directory, recipe, self.generation_config, carried)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Open a saved adapter and load its members.

        Args:
            pretrained_model_name_or_path: A folder or hub id with a `proxytune_config.json`.
            *args: None are taken.
            **kwargs: Passed to every member's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, …), but
                for these. `members` is role → arguments for that member alone. `trust_remote_code=True` trusts the
                recipe's repository: its own file, and members on the hub for which it names `trust_remote_code` and
                a commit as revision. `trust_members=True` trusts all members. `end_tokens` says whose end tokens stop
                a text, as in `wrap` [what the recipe says]. `self_test=False` skips the members' self-test.

        Returns:
            The composed model.

        Raises:
            RecipeError: If the recipe is missing or invalid.
            MemberError: If a member cannot be opened, would run code that is not trusted, or does not fit.

        Warns:
            SteeringWarning: As `wrap`; of end tokens only if the recipe does not say whose are meant.
        """
        config, end_tokens = kwargs.pop("config", None), kwargs.pop("end_tokens", None)
        self_test = kwargs.pop("self_test", True)
        hub = {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
        for_all = {k: kwargs[k] for k in ("cache_dir", "force_download", "local_files_only", "token") if k in kwargs}
        trust_recipe, trust_members = (kwargs.pop(key, False) for key in ("trust_remote_code", "trust_members"))
        if trust_members:
            kwargs["trust_remote_code"] = True
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)  # of no use here: weights of another shape are refused
        # transformers' Auto classes add these for the class they call, not for the members.
        for key in ("_from_auto", "_commit_hash", "adapter_kwargs", "adapter_name", "name_or_path", "weights_only"):
            kwargs.pop(key, None)
        for key in ("attn_implementation", "experts_implementation"):  # the Auto classes move these to the config
            if (value := getattr(config, f"_{key}", None)) is not None:
                kwargs.setdefault(key, value)
        recipe = getattr(config, "recipe", None) or load_recipe(pretrained_model_name_or_path, **hub, **for_all)
        formula = check_formula(recipe.made_formula())
        if recipe.members.keys() >= {"expert", "antiexpert"}:
            refuse_no_shift(recipe.expert, recipe.antiexpert, formula, members=kwargs.get("members"))
        try:
            members, references, tokenizers = open_members(
                {role: ref.trusted(bool(trust_recipe)) for role, ref in recipe.members.items()},
                encoder_decoders=True,
                **kwargs,
            )
        except MemberNotFoundError as error:
            place = Path(pretrained_model_name_or_path) / (hub.get("subfolder") or "")
            file = place / RECIPE_FILE if not place.is_file() else place
            raise MemberNotFoundError(
                f"{error} It is named in the recipe {file}: if the member was moved, write there where it is now; a "
                f"relative folder is looked for beside that file, in {file.parent.resolve()}."
            ) from error
        known = {role: reference for role, reference in references.items() if reference is not None}
        views = {**{r: v for r, v in getattr(formula, "views", {}).items() if r not in recipe.everyone}, **recipe.views}
        if end_tokens is not None:
            recipe = replace(recipe, end_tokens=None)
        make: Any = cls
        opened = ProxyTunedConfig(recipe=recipe.at(known))
        model: Self = make(opened, members, formula, views=views, self_test=self_test)
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        own = model.generation_config.eos_token_id  # the base's
        decided = False  # whether the generation config beside the recipe says where to stop
        source = Path(pretrained_model_name_or_path)
        with contextlib.suppress(OSError):  # a recipe written by hand has no such file; the base's settings stay
            model.generation_config = GenerationConfig.from_pretrained(
                source.parent if source.is_file() else pretrained_model_name_or_path, **hub, **for_all
            )
            decided = recipe.end_tokens is not None
        if decided:
            model.config.eos_token_id = model.generation_config.eos_token_id
        else:
            if end_tokens is not None:  # the file may hold those of another choice
                model.generation_config.eos_token_id = model.config.eos_token_id = own
            stop_composed(model, end_tokens or recipe.end_tokens, tokenizers)
        if with_info:  # for callers of transformers' signature: what is missing was an error above
            nothing = {name: set[str]() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
            return model, nothing  # type: ignore[return-value]
        return model
