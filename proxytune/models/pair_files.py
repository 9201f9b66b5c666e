"""What files tell of a pair: configs, tokenizers, and models without weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
)

from proxytune.costs.devices import machine_of
from proxytune.costs.model_size import pass_work, weight_bytes
from proxytune.costs.roofline import bytes_per_token
from proxytune.errors import MemberError
from proxytune.models.checkpoints import carrier_of, check_checkpoint, first_line
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.end_tokens import ends_of, stopping_ids
from proxytune.models.load_arguments import HUB_ARGUMENTS
from proxytune.models.member_tokenizers import check_vocabularies, find_tokenizer
from proxytune.models.members.encoder_decoder import EncoderDecoderMember
from proxytune.models.members.member import Member
from proxytune.models.pair_findings import ONTO, Findings
from proxytune.models.pair_probe import QUANTISED_ROWS, cached, lacks_of
from proxytune.models.pair_report import PRECISIONS, MemberFigures, TokenCost
from proxytune.models.pair_tokens import described, id_findings, template_findings
from proxytune.models.references import reference_of
from proxytune.models.roles import refuse_no_shift, warn_of_roles
from proxytune.recipe import EndTokens, MemberRef

__all__ = ["FileCheck"]

_SHORT = 512
"""Tokens of context that hardly hold a prompt and its answer."""


class FileCheck(Findings):
    """The part of the check that loads no weights."""

    # --- the files ---------------------------------------------------------------------------------------------------

    def no_shift(self) -> None:
        """Whether expert and antiexpert are one place."""
        with self.saying():
            refuse_no_shift(self.references["expert"], self.references["antiexpert"], self.formula)
        self.same = bool(self.report.findings)

    def files(self) -> None:
        """What configs tell: whether each can be a member, and its figures."""
        for role, reference in self.references.items():
            with self.saying(role):
                own = self.arguments[role]
                self._refuse_composed(role)
                cure = f"pass members={{{role!r}: {{'trust_remote_code': True}}}}, or trust_remote_code=True for all"
                kind = check_checkpoint(reference, role, own, f"If you trust it, {cure} members.", self.pair)
                self.pair = kind if self.pair is None else self.pair
                self._build(role)
        found = [self._figures(role, model) for role, model in self.models.items()]
        self.report.members = [figures for figures in found if figures is not None]
        self._contexts()

    def _hub(self, role: str) -> dict[str, Any]:
        """Where the files of a member are, for transformers' functions."""
        own = {name: value for name, value in self.arguments[role].items() if name in HUB_ARGUMENTS}
        return {"revision": self.references[role].revision or "main", **own}

    def _refuse_composed(self, role: str) -> None:
        with suppress(OSError, ValueError):
            config, _ = PreTrainedConfig.get_config_dict(self.references[role].id, **self._hub(role))
            if config.get("model_type") == ProxyTunedConfig.model_type:
                raise MemberError.of(
                    f"the {role}",
                    expected="a plain model",
                    got=f"{self.references[role].id!r}, a recipe, which is composed already",
                    remedy="To check it, pass --recipe with its folder; to compose anew, name its base.",
                )

    def _build(self, role: str) -> None:
        """Build a member without its weights, as far as that can be done."""
        reference, own, hub = self.references[role], self.arguments[role], self._hub(role)
        if own.get("gguf_file"):
            return self.note(f"the {role} is a GGUF file, whose size and layers are not told without reading it.")
        below = carrier_of(reference, hub)
        if below is not None:
            self.carriers[role], hub = below, {"revision": "main"}
        place, trust = (below or reference).id, own["trust_remote_code"]
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust, **hub)
        except Exception as error:
            raise MemberError.of(
                f"the {role}",
                expected="a config that transformers reads",
                got=repr(place),
                remedy=f"It says: {first_line(error)} ({type(error).__name__})",
            ) from error
        settings = getattr(config, "quantization_config", None)
        if settings is not None:
            found = settings if isinstance(settings, Mapping) else settings.to_dict()
            self.note(
                f"the {role} is quantised ({found.get('quant_method', 'by an unknown method')}): its own files are "
                "smaller than the figures for whole weights"
                + (f", and {QUANTISED_ROWS}." if found.get("load_in_8bit") else ".")
            )
            del config.quantization_config
            self.packed.add(role)
        self.saved[role] = str(config.dtype or torch.float32).removeprefix("torch.")
        auto = AutoModelForSeq2SeqLM if self.pair else AutoModelForCausalLM
        kind = EncoderDecoderMember if self.pair else Member
        try:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=self._dtype(config), trust_remote_code=trust)
        except Exception as error:  # noqa: BLE001 - of code of any family; loading it may work
            return self.note(
                f"the {role} cannot be built without weights, so its size is not told: {first_line(error)}"
            )
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(place, **hub)
        self.models[role] = model
        with self.saying(role, warned="note"):
            self.members[role] = kind(model, role)
            self.lacks[role] = {} if self.pair else lacks_of(self.members[role])
        return None

    def _dtype(self, config: Any) -> torch.dtype:
        """The dtype in which a member would be loaded."""
        return getattr(torch, self.dtype) if self.dtype != "auto" else config.dtype or torch.float32

    def _figures(self, role: str, model: Any) -> MemberFigures | None:
        if role not in self.members:
            return None
        config = model.config.get_text_config(decoder=True)
        again = self._again(role)
        held = not again and role not in self.onto
        values = 0.0 if again else cached(self.members[role])
        return MemberFigures(
            role,
            self.references[role].id,
            f"{type(model).__name__} ({model.config.model_type})",
            sum({id(p): p.numel() for p in model.parameters()}.values()) if held else 0,
            self.saved[role],
            {name: weight_bytes(model, bits) if held else 0.0 for name, bits in PRECISIONS.items()},
            {name: values * max(bits, 16.0) / 8 for name, bits in PRECISIONS.items()},
            self.members[role].context,
            self.members[role].rows,
            int(config.num_hidden_layers),
        )

    def _again(self, role: str) -> bool:
        """Whether an earlier role is the same model, which then is loaded and run once."""
        earlier = list(self.references)[: list(self.references).index(role)]
        return role not in self.onto and any(
            self.references[r] == self.references[role] for r in earlier if r not in self.onto
        )

    def _contexts(self) -> None:
        contexts = {one.role: one.context for one in self.report.members if one.context is not None}
        if len(set(contexts.values())) < 2:
            return
        shortest = min(contexts, key=lambda role: contexts[role])
        said = ", ".join(f"{role} {context:,}" for role, context in contexts.items())
        text = f"prompt and answer together may have {contexts[shortest]:,} tokens, the {shortest}'s context ({said})"
        if contexts[shortest] < _SHORT:
            self.problem(f"{text}: that holds hardly an answer. Name a companion with a longer context.")
        else:
            self.note(f"{text}.")

    def costs(self) -> None:
        """What a token of all three costs."""
        if self.report.members and len(self.report.members) == len(self.references) and not self.pair:
            counted = [role for role in self.references if role not in self.onto and not self._again(role)]
            works = {role: pass_work(self.models[role]) for role in counted}
            every = [(1.0, work.bytes) for work in works.values()]
            devices = {name: machine_of(name) for name in ("cpu", "cuda")}
            self.report.cost = TokenCost(
                bytes_per_token(every, 1.0) / bytes_per_token(every[:1], 1.0),
                {name: sum(made.seconds(work, 1) for work in works.values()) for name, made in devices.items()},
                {name: made.seconds(works["base"], 1) for name, made in devices.items()},
            )

    # --- tokens ------------------------------------------------------------------------------------------------------

    def tokens(self, end_tokens: EndTokens | None) -> None:
        """Vocabularies, chat templates and end tokens."""
        there = [role for role in self.references if role not in self.closed]
        for role in there:
            own = self.arguments[role]
            hub = {name: own[name] for name in HUB_ARGUMENTS if name in own}
            with self.saying():
                try:
                    found = find_tokenizer(self.references[role], trust_remote_code=own["trust_remote_code"], **hub)
                except Exception as error:  # of a package that is missing, or of a damaged file
                    raise MemberError.of(
                        f"the {role}'s tokenizer",
                        expected="files that open",
                        got=f"those at {self.references[role].id!r}",
                        remedy=f"transformers says: {first_line(error)} ({type(error).__name__})",
                    ) from error
                if found is not None:
                    self.tokenizers[role] = found
        known = [role for role in there if role in self.tokenizers]
        if unknown := {role: self.references[role] for role in there if role not in known}:
            with self.saying():
                check_vocabularies(unknown)
        same = len(known) > 1
        for role in known[1:]:
            before = len(self.report.findings)
            with self.saying():
                check_vocabularies({known[0]: None, role: None}, self.tokenizers)
            same &= len(self.report.findings) == before
        if same:
            rows = {role: member.rows for role, member in self.members.items()}
            self.report.vocabulary = described({role: self.tokenizers[role] for role in known}, rows)
            for found in (*id_findings(self.tokenizers, rows), *template_findings(self.tokenizers, rows)):
                self.say(found.kind, found.text)
        if "base" in self.models and "expert" in self.models:
            self._ends(end_tokens)

    def _ends(self, wanted: EndTokens | None) -> None:
        base, expert = self.models["base"], self.models["expert"]
        ours = getattr(base.generation_config, "eos_token_id", None)
        usable = min((member.rows for member in self.members.values()), default=None)
        with self.saying():
            ids = stopping_ids(ours, expert, wanted, self.tokenizers, usable)
            used = ends_of(base) if ids is None else ids
            tokenizer = self.tokenizers.get("expert", self.tokenizers.get("base"))
            names = used if tokenizer is None else tokenizer.convert_ids_to_tokens(used)
            self.report.ends = {i: str(name) for i, name in zip(used, names, strict=True)}
            if not used:
                self.note("neither base nor expert names an end token, so texts end at max_new_tokens alone.")

    # --- roles -------------------------------------------------------------------------------------------------------

    def roles(self) -> None:
        """What names, sizes and ends tell of the roles."""
        places = {role: (reference.id, reference.revision) for role, reference in self.references.items()}
        if places["expert"] == places["base"] != places["antiexpert"]:
            self.problem(
                "the expert is the base itself, so what is added is base - antiexpert (contrastive decoding), nothing "
                "that was tuned. For proxy-tuning, name the small tuned model as the expert."
            )
        if places["antiexpert"] == places["base"] != places["expert"]:
            self.note(
                "the antiexpert is the base itself: at α = 1 only the expert is left, and less α goes from the base "
                "towards it. That is right for an expert that was tuned from this base."
            )
        if {"expert", "antiexpert"} <= self.members.keys():
            with self.saying():
                warn_of_roles(
                    {role: self.models[role] for role in self.references if role in self.models}, self.formula
                )

    def adapters(self) -> None:
        """What adapter folders tell."""
        below = self.carriers.get("expert")
        if below is not None:
            folder, other = self.references["expert"].id, self.references["antiexpert"].id
            if _same_place(below, self.references["antiexpert"]):
                if "expert" not in self.onto:
                    self.note(
                        f"the expert is an adapter of the antiexpert: '{ONTO}{folder}' as the expert puts it onto the "
                        "antiexpert, so that there is one copy of the weights."
                    )
            elif "expert" in self.onto or not _same_place(below, self.references["base"]):
                self.problem(
                    f"the expert is an adapter of {below.id!r}, and the antiexpert is {other!r}. The antiexpert is the "
                    f"model that the expert was tuned from: name {below.id!r}, unless the two are one model under two "
                    "names, or you want the difference between them too."
                )
        elif "expert" in self.onto - self.closed:
            self.problem(
                f"the expert is {ONTO}{self.references['expert'].id}, which is a whole model. Name it without {ONTO} "
                "in front, or name the folder of an adapter, which has an adapter_config.json."
            )
        below = self.carriers.get("antiexpert")
        if below is not None and _same_place(below, self.references["expert"]):
            self.problem(
                f"expert and antiexpert look swapped: the antiexpert is an adapter of {below.id!r}, which is the "
                "expert. The expert is the tuned model; the antiexpert is the one that it was tuned from."
            )


def _same_place(one: MemberRef, other: MemberRef) -> bool:
    place = reference_of(one)
    return place is not None and place.id == other.id
