"""`proxytune.wrap`: from three models, hub ids or folders to one model for `generate()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxytune.errors import InputError
from proxytune.formulas.base import Formula
from proxytune.formulas.checks import check_formula
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.end_tokens import stop_composed
from proxytune.models.loading import open_members
from proxytune.models.model import ProxyTunedModel
from proxytune.models.roles import refuse_no_shift
from proxytune.recipe import EndTokens, Recipe

__all__ = ["wrap"]


def wrap(
    base: Any,
    expert: Any = None,
    antiexpert: Any = None,
    *,
    alpha: float | None = None,
    formula: Formula | None = None,
    revisions: Mapping[str, str] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    check_vocabulary: bool = True,
    members: Mapping[str, Mapping[str, Any]] | None = None,
    end_tokens: EndTokens | None = None,
    self_test: bool = True,
    **from_pretrained: Any,
) -> ProxyTunedModel:
    """Compose a large frozen model with two small ones: `z_base + α (z_expert − z_antiexpert)` (arXiv 2401.08565).

    Args:
        base: The large model: a model object, a hub id or a folder. Its weights are not changed. A vision-language
            model, as an object, sees images that `generate()` is given; the companions read the text without the
            placeholder tokens that stand for them.
        expert: The small tuned model, likewise. Needed.
        antiexpert: The small model that the expert was tuned from, likewise. Needed.
        alpha: Strength α of the shift [1.0].
        formula: A formula instead of α (`proxytune.formulas.Formula`).
        revisions: Role → branch, tag or commit, for hub ids.
        tokenizers: Role → tokenizer, for members saved without one.
        check_vocabulary: Whether to check that all members use the same token ids.
        members: Role → arguments of `from_pretrained` for that member alone, before the common ones.
        end_tokens: Whose end tokens stop a text: "union" of base and expert, "base" or "expert" [union, with a warning
            where they differ]. Kept in the recipe; the ids are `generation_config.eos_token_id` of the result.
        self_test: Whether to test that each member is right by itself, in three passes of its first layers over six
            tokens, once per process: in one pass, over a cache, and left-padded. What it gets wrong is refused where it
            matters. Nothing of the member changes.
        **from_pretrained: Passed to `from_pretrained` of the members given by id or folder. `trust_remote_code=True`
            here trusts all of them.

    Returns:
        A model for `generate()`, in evaluation mode. Members given as objects are shared with it, not copied. Three
        encoder-decoders make an encoder-decoder, whose `generate()` takes the source.

    Raises:
        InputError: If α is not finite, the formula is none, a member is missing, an argument is unknown, or arguments
            contradict each other.
        MemberError: If a member cannot be opened, lacks weights, would run code that is not trusted, is not supported,
            is composed already, fails the self-test, or uses the same ids for other tokens; or if expert and antiexpert
            are the same.

    Warns:
        VocabularyWarning: If a tokenizer is missing, so the vocabularies could not be compared.
        SteeringWarning: If the expert ends its texts with tokens that the base does not end at; if expert and
            antiexpert have equal weights, look swapped, or are larger than the base; or if a weight is above 10.
    """
    if formula is None:
        formula = ProxyTuning(alpha=1.0 if alpha is None else alpha)
    elif alpha is not None:
        raise InputError.of(
            "wrap",
            expected="alpha or formula",
            got=f"both, alpha={alpha!r} and formula={formula!r}",
            remedy="Give α in the formula: ProxyTuning(alpha=0.5).",
        )
    check_formula(formula)
    refuse_no_shift(expert, antiexpert, formula, revisions=revisions, members=members)
    models, references, found = open_members(
        {"base": base, "expert": expert, "antiexpert": antiexpert},
        wrap,
        revisions=revisions,
        tokenizers=tokenizers,
        check_vocabulary=check_vocabulary,
        members=members,
        encoder_decoders=True,
        **from_pretrained,
    )
    known = {role: reference for role, reference in references.items() if reference is not None}
    recipe = None
    if len(known) == len(references):
        recipe = Recipe(
            base=known["base"],
            expert=known["expert"],
            antiexpert=known["antiexpert"],
            formula=formula.name,
            alpha=formula.alpha,
        )
    model = ProxyTunedModel(ProxyTunedConfig(recipe=recipe), models, formula, self_test=self_test)
    stop_composed(model, end_tokens, found)
    return model
