"""Opening the members from a model object, a hub id or a folder, and checking that they use the same token ids."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from proxytune.errors import InputError, MemberError, ProxytuneError
from proxytune.models.checkpoints import (
    check_checkpoint,
    first_line,
    is_custom_code,
    not_found,
    refuse_incomplete,
)
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.load_arguments import (
    HUB_ARGUMENTS,
    LOAD_ARGUMENTS,
    Caller,
    deciding,
    refuse_dtype,
    refuse_misspelt,
    refuse_unknown,
    unknown_keyword,
)
from proxytune.models.lora_members import below_lora, load_adapter, place_of
from proxytune.models.member_tokenizers import compared, places_of_tokens, warn_uncompared
from proxytune.models.references import reference_of
from proxytune.recipe import ROLES, MemberRef
from proxytune.validation import shown

__all__ = ["open_member", "open_members", "refuse_composed", "refuse_roles", "refuse_tokenizers"]

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def open_members(
    sources: Mapping[str, Any],
    caller: Caller = None,
    /,
    *,
    revisions: Mapping[str, str] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    check_vocabulary: bool = True,
    members: Mapping[str, Mapping[str, Any]] | None = None,
    encoder_decoders: bool = False,
    **from_pretrained: Any,
) -> tuple[dict[str, nn.Module], dict[str, MemberRef | None], dict[str, Any]]:
    """Open all members of a composition: `sources` is role → model object, hub id, folder or reference, the base first.

    `caller` is what the user called, for messages about keywords (None for `from_pretrained`); `encoder_decoders` says
    whether all of them may be encoder-decoders; the other arguments are those of `proxytune.wrap`. What a reference has
    in `load` counts as given for that member, `trust_remote_code` too.

    Returns:
        Role → model; role → reference to load it again (None for one that exists only in memory), whose `load` has the
        arguments that decide which model it is; and role → tokenizer, as far as they were given or compared.

    Raises:
        InputError: If a member is missing or no model, id or folder, or arguments contradict each other or are unknown.
        MemberError: If a member cannot be opened, lacks weights, would run code that is not trusted, uses other token
            ids, is composed already; or if an adapter is none of the model that it goes onto.

    Warns:
        VocabularyWarning: If a tokenizer is missing, so the vocabularies could not be compared.
    """
    given = [source for source in sources.values() if source is not None]
    if len(given) < len(sources) or all(isinstance(source, nn.Module) for source in given):
        refuse_misspelt(from_pretrained, caller)
    for role, source in sources.items():
        if not isinstance(source, str | os.PathLike | nn.Module | MemberRef):
            raise InputError.of(
                f"the {role}",
                expected="a model, a hub id or a folder",
                got="None" if source is None else f"a {type(source).__name__}, {shown(source, 80)}",
                remedy=_needed(role, sources)
                if source is None
                else "Pass the model itself; that of a pipeline is pipeline.model.",
            )
    refuse_roles("revisions", revisions, sources)
    refuse_tokenizers(tokenizers, sources)
    _refuse_arguments_of_members(members, sources)
    sources, revisions, members, places = _below_adapters(sources, revisions or {}, members or {})
    if from_pretrained and all(isinstance(source, nn.Module) for source in given):
        raise InputError.of(
            "members",
            expected="no further arguments when all of them are model objects",
            got=", ".join(sorted(from_pretrained)),
            remedy="They are for from_pretrained: pass them when you load the models.",
        )
    references = {role: reference_of(source, revisions.get(role)) for role, source in sources.items()}
    arguments: dict[str, dict[str, Any]] = {}
    kind = None if encoder_decoders else False  # whether all are encoder-decoders, as soon as one member tells
    pairs: dict[str, bool] = {}
    for role, found in references.items():
        if isinstance(model := sources[role], nn.Module) and kind is None:
            kind = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if found is None or isinstance(model, nn.Module):
            continue
        own = {**found.load, **from_pretrained, **(members or {}).get(role, {})}
        # Never None, or transformers asks on the terminal.
        own["trust_remote_code"] = bool(own.get("trust_remote_code"))
        arguments[role] = own
        refuse_dtype(own)
        refuse_unknown(found, own, caller)
        everyone = "trust_members" if caller is None else "trust_remote_code"
        cure = f"pass members={{{role!r}: {{'trust_remote_code': True}}}}, or {everyone}=True for all members."
        pairs[role] = check_checkpoint(found, role, own, f"If you trust it, {cure}", kind)
        kind = pairs[role] if kind is None else kind
    known = dict(tokenizers or {})
    hub = {role: {k: own[k] for k in HUB_ARGUMENTS if k in own} for role, own in arguments.items()}
    trusted = [role for role, own in arguments.items() if own["trust_remote_code"]]
    early = check_vocabulary and None not in references.values()
    unknown: list[str] = []
    if early:  # before weights are read
        known, unknown = compared(references, tokenizers, trusted, hub)
    models: dict[str, nn.Module] = {}
    for role, source in sources.items():
        opened = source if isinstance(source, nn.Module) else references[role]
        own = arguments.get(role, {})
        # What is named twice is loaded once: it is one member then.
        twin = next(
            (r for r in models if opened is references[r] or (opened, own) == (references[r], arguments.get(r))), ""
        )
        models[role] = models[twin] if twin else open_member(opened, role, caller, pairs.get(role, False), **own)
        if len(sources) > 1:
            refuse_composed(models[role], role)
    for role, place in places.items():
        models[role] = load_adapter(models[role], place, role, **hub.get(role, from_pretrained))
    for role, own in arguments.items():
        found = references[role]
        assert found is not None
        code = own["trust_remote_code"] and is_custom_code(models[role])
        references[role] = replace(found, load=deciding(own | {"trust_remote_code": code}))
    if check_vocabulary and not early:
        known, unknown = compared(places_of_tokens(references, models), tokenizers, trusted, hub)
    warn_uncompared(unknown)
    for role, place in places.items():
        if (found := references[role]) is not None:
            references[role] = replace(found, adapter=place)
    return models, references, known


def _below_adapters(
    sources: Mapping[str, Any], revisions: Mapping[str, str], members: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Mapping[str, Any]], dict[str, str]]:
    """Sources, revisions and arguments with each adapter's model in its place, and role → place of the adapter."""
    found, revisions, members = dict(sources), dict(revisions), dict(members)
    places: dict[str, str] = {}
    given: dict[str, Any]
    for role, source in sources.items():
        if (place := place_of(source)) is not None:
            below = below_lora(role, sources)
            for name, given in (("revisions", revisions), ("members", members)):
                if role in given:
                    raise InputError.of(
                        name,
                        expected=f"none for the {role}, an adapter of the {below}",
                        got=shown({role: given[role]}, 80),
                        remedy=f"Give them for the {below}; the adapter's revision as 'lora:org/name@revision'.",
                    )
                given |= {role: given[below]} if below in given else {}
            found[role], places[role] = sources[below], place
        elif isinstance(source, MemberRef) and source.adapter is not None:
            found[role], places[role] = replace(source, adapter=None), source.adapter
    return found, revisions, members, places


def _needed(role: str, sources: Mapping[str, Any]) -> str:
    """What to do about a role without a member."""
    expert = sources.get("expert")
    if role == "antiexpert" and isinstance(expert, str) and expert.startswith("lora:"):
        return f"{expert!r} is an adapter of the antiexpert: pass antiexpert=, the model that it was trained on."
    if {*sources} == {*ROLES}:
        return "Proxy-tuning needs a base, a tuned expert, and the untuned antiexpert that it came from."
    return f"The formula has this role: pass {role}=."


def _refuse_arguments_of_members(members: Any, sources: Mapping[str, Any]) -> None:
    """Refuse `members=` that is no mapping role → mapping, or names a member that is not loaded here."""
    refuse_roles("members", members, sources)
    for role, arguments in (members or {}).items():
        source = sources.get(role)
        if isinstance(arguments, Mapping) and role in sources and not isinstance(source, nn.Module):
            continue
        raise InputError.of(
            "members",
            expected="for each role a mapping of arguments of from_pretrained, of a member given by id or folder",
            got=shown({role: arguments}, 80)
            + (f" for the {role}, a {type(source).__name__}" if isinstance(arguments, Mapping) else ""),
            remedy=f"Pass e.g. members={{{role!r}: {{'dtype': 'bfloat16'}}}}; a model object is loaded already.",
        )


def refuse_roles(name: str, by_role: Any, roles: Collection[str] = ROLES) -> None:
    """Refuse an argument that is no mapping from roles, or names a role that there is not."""
    roles = tuple(dict.fromkeys((*ROLES, *roles)))
    if not isinstance(by_role, Mapping | None):
        raise InputError.of(
            name,
            expected=f"a mapping from roles, {', '.join(roles)}",
            got=f"a {type(by_role).__name__}, {shown(by_role, 80)}",
            remedy=f"Pass e.g. {name}={{'base': …}}.",
        )
    if strange := sorted(map(str, set(by_role or {}) - set(roles))):
        raise InputError.of(
            name, expected=f"roles out of {', '.join(roles)}", got=", ".join(strange), remedy="Correct the role."
        )


def refuse_tokenizers(by_role: Any, roles: Collection[str] = ROLES) -> None:
    """Refuse `tokenizers=` that is no mapping from roles, or holds something else than tokenizers."""
    refuse_roles("tokenizers", by_role, roles)
    for role, tokenizer in (by_role or {}).items():
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            place = isinstance(tokenizer, str | os.PathLike)
            raise InputError.of(
                "tokenizers",
                expected="a tokenizer for each role",
                got=f"{shown(tokenizer, 80)} for the {role}",
                remedy=f"Pass AutoTokenizer.from_pretrained({str(tokenizer)!r})."
                if place
                else "Pass what AutoTokenizer.from_pretrained(…) returns.",
            )


def refuse_composed(model: Any, role: str) -> None:
    """Refuse a composed model as a member: its logits are shifted already."""
    if getattr(getattr(model, "config", None), "model_type", None) != ProxyTunedConfig.model_type:
        return
    alpha = getattr(model, "alpha", None)
    raise MemberError.of(
        f"the {role}",
        expected="a plain model",
        got=f"a composed one, a {type(model).__name__}" + ("" if alpha is None else f" of alpha={alpha:g}"),
        remedy="Its logits are shifted already. To change the strength, set its alpha; to compose anew, wrap its base, "
        "proxytune.wrap(model.base, …)."
        if role == "base"
        else f"Its logits are shifted already: pass a plain model as the {role}, e.g. model.base.",
    )


def open_member(
    source: Any, role: str, caller: Caller = None, encoder_decoder: bool = False, /, **from_pretrained: Any
) -> nn.Module:
    """Load a `MemberRef` with `AutoModelForCausalLM`, or `AutoModelForSeq2SeqLM`; a model is returned unchanged.

    Raises:
        InputError: If the source is neither a model nor a reference, or the model does not know an argument.
        MemberNotFoundError: If the folder or hub id cannot be opened.
        MemberError: If weights are missing or have another shape, or transformers cannot load it so.
    """
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, MemberRef):
        raise InputError.of(
            f"the {role}",
            expected="a model, a hub id or a folder",
            got=repr(source),
            remedy=f"Pass e.g. {role}='org/model'.",
        )
    place = f"{source.id!r}" + (f" at revision {source.revision!r}" if source.revision else "")
    # Weights of another shape are named by the loading info; without it, transformers names them in its log alone.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    where = {"revision": source.revision or "main"}
    try:
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        opened = auto.from_pretrained(source.id, **where, **(from_pretrained | told))
    except ProxytuneError:  # a recipe opened as a member
        raise
    except TypeError as error:
        name = found[1] if (found := _UNEXPECTED.search(str(error))) else ""
        if name not in from_pretrained or name in LOAD_ARGUMENTS:
            raise
        raise unknown_keyword(name, from_pretrained[name], caller) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # also of safetensors, pickle, or a quantiser that is not installed
        # transformers raises ValueError for a folder without a model, and otherwise for wrong arguments.
        nothing = isinstance(error, ValueError) and not (Path(source.id) / "config.json").exists()
        if isinstance(error, OSError) or (nothing and "gguf_file" not in from_pretrained):
            raise not_found(source, role, error) from error
        given = {name: value for name, value in from_pretrained.items() if value is not False}
        raise MemberError.of(
            f"the {role}",
            expected="a model that loads with these arguments",
            got=f"{place} with {', '.join(f'{k}={shown(v, 80)}' for k, v in given.items()) or 'none'}",
            remedy=f"transformers says: {first_line(error)} ({type(error).__name__})",
        ) from error
    model, info = opened if isinstance(opened, tuple) else (opened, None)
    refuse_incomplete(model, info, role, place, from_pretrained)
    loaded: nn.Module = model
    return loaded
