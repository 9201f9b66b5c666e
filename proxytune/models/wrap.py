"""`proxytune.wrap`: from models, hub ids or folders to one model for `generate()`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.nn import Module

from proxytune.errors import InputError
from proxytune.formulas.base import Formula
from proxytune.formulas.checks import check_formula
from proxytune.formulas.gates import Gate
from proxytune.formulas.prompt_view import PromptView
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.formulas.registry import FORMULAS, recipe_of
from proxytune.formulas.schedules import Strength
from proxytune.formulas.view import View
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.end_tokens import stop_composed
from proxytune.models.loading import open_members
from proxytune.models.model import ProxyTunedModel
from proxytune.models.roles import refuse_no_shift
from proxytune.recipe import ROLES, EndTokens, Recipe
from proxytune.validation import shown

__all__ = ["wrap"]


def wrap(
    base: Any,
    expert: Any = None,
    antiexpert: Any = None,
    *,
    alpha: Strength | None = None,
    formula: Formula | str | None = None,
    gate: Gate | None = None,
    revisions: Mapping[str, str] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    check_vocabulary: bool = True,
    members: Mapping[str, Any] | None = None,
    end_tokens: EndTokens | None = None,
    self_test: bool = True,
    **from_pretrained: Any,
) -> ProxyTunedModel:
    """Compose a large frozen model with small ones: `z_base + α (z_expert − z_antiexpert)`, or another formula.

    Args:
        base: The large model: a model object, a hub id or a folder. Its weights are not changed. A vision-language
            model, as an object, sees images that `generate()` is given; the companions read the text without the
            placeholder tokens that stand for them.
        expert: The small tuned model, likewise, or a `View`. Needed, unless a formula has no such role. `"lora:place"`
            puts an adapter, in a folder or on the hub, onto the antiexpert itself: one copy of the weights, one pass.
        antiexpert: The small model that the expert was tuned from, likewise. Needed, unless a formula has no such role.
            `antiexpert=base` is the line from the base to the expert; the base does not run twice then.
        alpha: Strength α of the shift [1.0, or the formula's own]; a `Schedule` for one that changes with the tokens.
        formula: A formula of `proxytune.formulas`, or a sum as a text, `"base + 0.5*(math - small)"`.
        gate: Where the shift applies, e.g. `Gate(entropy=0.1)`; companions run only there.
        revisions: Role → branch, tag or commit, for hub ids.
        tokenizers: Role → tokenizer, for members saved without one.
        check_vocabulary: Whether to check that all members use the same token ids.
        members: Role → model, hub id, folder or `View`, for the formula's other roles. A mapping in place of a model
            are arguments of `from_pretrained` for that member alone, before the common ones.
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
        SteeringWarning: If the expert ends its texts with tokens that the base does not end at, or that some member
            cannot embed; if expert and antiexpert have equal weights, look swapped, or are larger than the base; or if
            a weight is above 10.
    """
    chosen = check_formula(_formula(formula, alpha, gate))
    if not isinstance(members, Mapping | None):
        raise InputError.of(
            "members",
            expected="role → a model, a hub id, a folder or a View; or arguments of from_pretrained for that member",
            got=_named_value(members),
            remedy=f"Pass members={{{chosen.roles[0]!r}: …}}.",
        )
    if isinstance(base, View):
        raise InputError.of(
            "the base",
            expected="a model, a hub id or a folder",
            got=repr(base),
            remedy="Views are of the base, or of a companion.",
        )
    given = members or {}
    arguments = {role: value for role, value in given.items() if isinstance(value, Mapping)}
    named = {role: value for role, value in given.items() if role not in arguments}
    _refuse_places(named)
    sources = _sources_of(chosen, base, {"expert": expert, "antiexpert": antiexpert}, named)
    views = {role: source for role, source in sources.items() if isinstance(source, View)}
    loaded = {role: source for role, source in sources.items() if role not in views}
    if loaded.keys() >= {"expert", "antiexpert"}:
        refuse_no_shift(loaded["expert"], loaded["antiexpert"], chosen, revisions=revisions, members=arguments)
    models, references, found = open_members(
        loaded,
        wrap,
        revisions=revisions,
        tokenizers=tokenizers,
        check_vocabulary=check_vocabulary,
        members=arguments,
        encoder_decoders=True,
        **from_pretrained,
    )
    known = {role: reference for role, reference in references.items() if reference is not None}
    recipe = Recipe.of({**known, **views}, **recipe_of(chosen)) if len(known) == len(references) else None
    model = ProxyTunedModel(ProxyTunedConfig(recipe=recipe), models, chosen, views=views, self_test=self_test)
    stop_composed(model, end_tokens, found)
    return model


def _sources_of(formula: Any, base: Any, usual: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Role → model, id, folder or view, of the roles that a formula has; the base first.

    `usual` are the roles that have arguments of their own, None where they were not given; `named` all others.

    Raises:
        InputError: If a role has no member, or a member no role.
    """
    viewed = {source.of for source in (*usual.values(), *named.values()) if isinstance(source, View)}
    given = {role: source for role, source in (*usual.items(), *named.items()) if source is not None}
    if strange := sorted(given.keys() - {*formula.roles} - viewed):
        role = strange[0]
        raise InputError.of(
            f"the {role}",
            expected=f"a role of the formula: {', '.join(formula.roles)}",
            got=_named_value(given[role]),
            remedy=_meant(role, formula.roles) or "Leave it out, or name it in the formula.",
        )
    sources: dict[str, Any] = {"base": base}
    for role in dict.fromkeys((*(r for r in usual if r in formula.roles), *formula.roles, *named)):
        source = usual.get(role) if role in usual else named.get(role)
        if source is None and role not in usual:
            source = getattr(formula, "views", {}).get(role)
        if source is None and role not in usual:
            raise InputError.of(
                f"the {role}",
                expected=f"a member for each role of the formula: {', '.join(formula.roles)}",
                got="None",
                remedy=f"Pass members={{{role!r}: …}}.",
            )
        if source is View or isinstance(source, PromptView):
            raise InputError.of(
                f"the {role}",
                expected="a View: View('base', prompt=PromptView(…)) is the base with that prompt"
                if isinstance(source, PromptView)
                else "a View, which is another member's model once more",
                got=_named_value(source),
                remedy="Pass e.g. View('base', prompt=PromptView(without=('<context>', '</context>'))).",
            )
        sources[role] = source
    return sources


def _named_value(value: Any) -> str:
    """A value for a message: models by their class, since they print all their layers."""
    if isinstance(value, Module):
        return f"a {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__}"
    return shown(value, 80)


def _meant(name: Any, known: Iterable[str]) -> str:
    """The question whether a similar name was meant; empty if there is none."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.75)
    return f"Did you mean {near[0]!r}?" if near else ""


def _named_formula(name: str) -> Formula:
    """A formula by its name, or by its text."""
    if name in FORMULAS:
        return FORMULAS[name]()
    if re.fullmatch(r"\s*[A-Za-z][\w-]*\s*", name) and "base" not in name:
        raise InputError.of(
            "formula",
            expected=f"one of {', '.join(FORMULAS)}, or a sum such as 'base + 0.5*(math - small)'",
            got=repr(name),
            remedy=_meant(name, FORMULAS) or "Correct the name.",
        )
    return Formula.parse(name)


def _refuse_places(named: Mapping[str, Any]) -> None:
    """Refuse members of the roles that have arguments of their own: `members=` has load arguments for those."""
    for role in ROLES:
        if role in named:
            raise InputError.of(
                "members",
                expected="for each role a mapping of arguments of from_pretrained, or for a role of other name a model",
                got=f"{role}: {_named_value(named[role])}",
                remedy=f"Pass the {role} as {role}=.",
            )


def _formula(formula: Any, alpha: Any, gate: Any) -> Any:
    """The formula that the arguments name."""
    if gate is not None and not isinstance(gate, Gate):
        raise InputError.of("gate", expected="a Gate", got=shown(gate, 80), remedy="Pass e.g. Gate(entropy=0.1).")
    if isinstance(formula, str):
        formula = _named_formula(formula)
        if alpha is not None:
            formula = formula.with_alpha(alpha)
    elif formula is None:
        formula = ProxyTuning(alpha=1.0 if alpha is None else alpha)
    elif alpha is not None:
        raise InputError.of(
            "wrap",
            expected="alpha or formula",
            got=f"both, alpha={alpha!r} and formula={formula!r}",
            remedy="Give α in the formula: ProxyTuning(alpha=0.5).",
        )
    if gate is None:
        return formula
    if getattr(formula, "gate", None) is not None:
        raise InputError.of(
            "wrap",
            expected="one gate",
            got=f"two, gate={gate!r} and that of {formula!r}",
            remedy="Leave one of them out.",
        )
    if not isinstance(formula, Formula):
        raise InputError.of(
            "gate",
            expected="a formula of proxytune.formulas, or one that derives from Formula",
            got=shown(formula, 80),
            remedy="Derive it from Formula.",
        )
    return replace(formula, gate=gate)
