"""Do three models fit together as base, expert and antiexpert? Everything that is wrong at once, and what they cost.

Files tell most of it: configs, tokenizers, a model without weights. For the rest each member is loaded, tested, asked
for its predictions on a few built-in texts, and dropped before the next one, so that memory stays at the largest.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from proxytune.costs.devices import machine_of
from proxytune.costs.model_size import cached_values, pass_work, weight_bytes
from proxytune.costs.roofline import bytes_per_token
from proxytune.errors import (
    MemberError,
    NumericalError,
    ProxytuneError,
    SteeringWarning,
    UnsupportedModeError,
    VocabularyWarning,
)
from proxytune.formulas.proxy_tuning import ProxyTuning
from proxytune.models.checkpoints import carrier_of, check_checkpoint, first_line
from proxytune.models.config import ProxyTunedConfig
from proxytune.models.end_tokens import ends_of, stopping_ids
from proxytune.models.load_arguments import HUB_ARGUMENTS
from proxytune.models.loading import check_vocabularies, find_tokenizer, open_member, reference_of
from proxytune.models.members.composite_cache import empty_cache, stored
from proxytune.models.members.encoder_decoder import EncoderDecoderMember
from proxytune.models.members.layer_kinds import NEEDS, Ability, lacking
from proxytune.models.members.member import Member
from proxytune.models.pair_probe import Text, built_in_texts, measured, turn_ends
from proxytune.models.pair_report import PRECISIONS, Finding, MemberFigures, PairReport, TokenCost
from proxytune.models.pair_tokens import described, id_findings, listed, template_findings
from proxytune.models.roles import refuse_no_shift, warn_of_roles
from proxytune.recipe import EndTokens, MemberRef

__all__ = ["check_pair"]

_EQUAL = 1e-6
"""Nats per token below which two models say the same."""
_NEARLY = 1e-3
_SHORT = 512
"""Tokens of context that hardly hold a prompt and its answer."""
_ONTO = "lora:"
_QUANTISED_ROWS = "its logits depend on the other rows and on later tokens of a pass (LLM.int8): use no speculation"


def check_pair(
    sources: Mapping[str, str | os.PathLike[str] | MemberRef],
    *,
    alpha: float = 1.0,
    end_tokens: EndTokens | None = None,
    trusted: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "cpu",
    weights: bool = True,
    steered: bool = True,
    progress: Callable[[str, int], None] = lambda role, number: None,
) -> PairReport:
    """Say all that is wrong with three models as base, expert and antiexpert, and what they cost.

    Args:
        sources: Role → hub id, folder or reference, the base first. The expert may be `"lora:"` and the folder of an
            adapter of the antiexpert, which then holds the weights of both.
        alpha: The α of the shift that is measured.
        end_tokens: Whose end tokens stop a text, as in `proxytune.wrap`.
        trusted: The roles whose own code may run.
        dtype: The dtype in which members are loaded; "auto" for that of their files.
        device: The device on which they are loaded.
        weights: Whether to load them, one after the other.
        steered: Whether they are the members of proxy-tuning. Else only what each is by itself, and their tokens, are
            looked at.
        progress: Called with each role before it is loaded, and how many were.

    Returns:
        The report. What is wrong with a member is a problem in it, not an exception.

    Raises:
        InputError: If α is not finite, or `end_tokens` is unknown.
    """
    check = _Check(sources, alpha, trusted, dtype)
    if steered:
        check.no_shift()
    check.files()
    check.tokens(end_tokens)
    if steered:
        check.roles()
        check.adapters()
        check.costs()
    if weights:
        logits = check.passes(device, progress)
        if steered:
            check.shift(logits)
    check.modes()
    report = check.report
    report.findings.sort(key=lambda found: found.kind != "problem")
    return report


class _Check:
    """The report while it is written, and what the parts know of each other."""

    def __init__(self, sources: Mapping[str, Any], alpha: float, trusted: Sequence[str], dtype: str) -> None:
        self.formula = ProxyTuning(alpha=alpha)
        self.alpha, self.dtype = alpha, dtype
        self.report = PairReport()
        self.onto = {role for role, source in sources.items() if str(source).startswith(_ONTO)}  # the antiexpert
        found = {role: reference_of(s[len(_ONTO) :] if role in self.onto else s) for role, s in sources.items()}
        self.references = {role: reference for role, reference in found.items() if reference is not None}
        self.arguments: dict[str, dict[str, Any]] = {
            role: {**reference.load, "trust_remote_code": role in trusted}
            for role, reference in self.references.items()
        }
        self.pair: bool | None = None  # whether they are encoder-decoders, once a member tells
        self.closed: set[str] = set()  # roles that cannot be opened
        self.models: dict[str, PreTrainedModel] = {}  # without weights, on `meta`
        self.members: dict[str, Member] = {}
        self.carriers: dict[str, MemberRef] = {}  # the models below adapters
        self.tokenizers: dict[str, Any] = {}
        self.same = False  # whether expert and antiexpert are one model
        self.saved: dict[str, str] = {}  # role → dtype of its files
        self.packed: set[str] = set()  # roles whose weights are quantised in their files
        self.lacks: dict[str, dict[Ability, str]] = {}  # role → what it cannot do, and why

    # --- what is said ------------------------------------------------------------------------------------------------

    def say(self, kind: Literal["problem", "note"], text: str) -> None:
        if all(found.text != text for found in self.report.findings):
            self.report.findings.append(Finding(kind, text))

    def problem(self, text: str) -> None:
        self.say("problem", text)

    def note(self, text: str) -> None:
        self.say("note", text)

    @contextmanager
    def saying(self, *closing: str, warned: Literal["problem", "note"] = "problem") -> Iterator[None]:
        """Make problems of errors, which close the roles `closing`, and of warnings what `warned` says."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            except ProxytuneError as error:
                self.problem(str(error))
                self.closed.update(closing)
        for warning in said:
            if issubclass(warning.category, SteeringWarning | VocabularyWarning):
                text = str(warning.message)
                self.say("note" if "Nothing is wrong" in text else warned, text)

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
                + (f", and {_QUANTISED_ROWS}." if found.get("load_in_8bit") else ".")
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
            self.lacks[role] = {} if self.pair else _lacks(self.members[role])
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
        values = 0.0 if again else _cached(self.members[role])
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
                        f"the expert is an adapter of the antiexpert: '{_ONTO}{folder}' as the expert puts it onto the "
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
                f"the expert is {_ONTO}{self.references['expert'].id}, which is a whole model. Name it without {_ONTO} "
                "in front, or name the folder of an adapter, which has an adapter_config.json."
            )
        below = self.carriers.get("antiexpert")
        if below is not None and _same_place(below, self.references["expert"]):
            self.problem(
                f"expert and antiexpert look swapped: the antiexpert is an adapter of {below.id!r}, which is the "
                "expert. The expert is the tuned model; the antiexpert is the one that it was tuned from."
            )

    # --- weights -----------------------------------------------------------------------------------------------------

    def passes(self, device: str, progress: Callable[[str, int], None]) -> dict[str, list[torch.Tensor]]:
        """Load the members one after the other, and say what is wrong with them; role → logits for the texts."""
        texts = self.texts()
        logits: dict[str, list[torch.Tensor]] = {}
        done: dict[tuple[MemberRef, str], str] = {}
        complete = True
        for number, (role, reference) in enumerate(self.references.items()):
            if role in self.closed or self._too_large(role, device):
                complete = False
                continue
            key = (reference, repr(self.arguments[role]))
            if key in done:  # the same model in another role
                if done[key] in logits:
                    logits[role] = logits[done[key]]
                continue
            done[key] = role
            progress(role, number)
            found = self._loaded(role, device, texts)
            if found is not None:
                logits[role] = found
            complete &= role not in self.closed
        self.report.weights = complete
        return logits

    def shift(self, logits: Mapping[str, list[torch.Tensor]]) -> None:
        """The figures of the shift, and what they look like."""
        tokenizer = next(iter(self.tokenizers.values()), None)
        ends = turn_ends([self.models[role] for role in ("expert", "antiexpert") if role in self.models], tokenizer)
        self.report.shift = measured(self.texts(), logits, (self.alpha, -self.alpha), ends)
        self._judge()

    def texts(self) -> list[Text]:
        """The built-in texts, in the first chat template that there is."""
        with_template = [t for t in self.tokenizers.values() if getattr(t, "chat_template", None)]
        tokenizers = with_template or list(self.tokenizers.values())
        if not tokenizers or self.pair:
            return []
        contexts = [member.context for member in self.members.values() if member.context]
        rows = [member.rows for member in self.members.values()]
        return built_in_texts(tokenizers[0], min([256, *contexts]), min(rows, default=0) or 1 << 62)

    def _too_large(self, role: str, device: str) -> bool:
        """Whether a member's weights are more than the machine's memory, which is said."""
        if role not in self.models or role in self.packed or "quantization_config" in self.arguments[role]:
            return False
        model = self.models[role]
        place = torch.device("cpu" if device == "auto" else device)
        need = weight_bytes(model, 8.0 * model.dtype.itemsize)
        there = _memory(place)
        if there is None or need < there:
            return False
        self.note(
            f"the {role}'s weights ({need / 2**30:.1f} GiB) were not looked at: {place} has {there / 2**30:.1f} GiB."
        )
        return True

    def _loaded(self, role: str, device: str, texts: Sequence[Text]) -> list[torch.Tensor] | None:
        """Load a member, test it, and return its logits for the texts on the CPU; None if that failed."""
        own = {**self.arguments[role], "dtype": self.dtype, "device_map": device}
        with self.saying(role, warned="note"), torch.no_grad():
            model: Any = open_member(self.references[role], role, None, bool(self.pair), **own)
            model.eval()
            member = (EncoderDecoderMember if self.pair else Member)(model, role)
            member.examine()
            if self.pair:
                return None
            self.lacks[role] = _lacks(member)
            rows = []
            for text in texts:
                out = member.forward(torch.tensor([text.ids]))[0, text.start - 1 :].float().cpu()
                if not bool(out.amax(-1).isfinite().all()):
                    raise NumericalError.of(
                        f"the {role}",
                        expected="finite logits",
                        got=f"NaN or +inf on a built-in text, in {str(model.dtype).removeprefix('torch.')}",
                        remedy="Its weights are damaged, or too large for that dtype: try --dtype float32.",
                    )
                rows.append(out)
            return rows
        return None

    def _judge(self) -> None:
        shift = self.report.shift
        if shift is None or self.same:
            return
        if shift.pair < _EQUAL:
            self.problem(
                f"expert and antiexpert look equal: they predict the same on {shift.tokens} tokens of built-in texts "
                f"(KL {shift.pair:.1e} nats), so the base is hardly moved. Check that the expert is the tuned model, "
                "or its adapter a trained one."
            )
        elif shift.pair < _NEARLY:
            self.problem(
                f"expert and antiexpert look nearly equal: KL {shift.pair:.1e} nats per token on {shift.tokens} tokens "
                "of built-in texts. Check that the expert is the tuned model; a task far from these texts may still "
                "show more."
            )
        if shift.swapped and self.alpha > 0:
            ends = shift.turn_ends
            self.problem(
                "expert and antiexpert look swapped: after a finished answer in the chat template the antiexpert ends "
                f"its turn (mean probability {ends['antiexpert']:.2f}), and the expert goes on ({ends['expert']:.2f}). "
                "The expert is the tuned model; if it is that, it was tuned without its end token."
            )

    def modes(self) -> None:
        """Which modes are refused for some member."""
        for mode, needed in NEEDS.items():
            whys: dict[str, list[str]] = {}
            for role, lacks in self.lacks.items():
                for ability in needed:
                    if ability in lacks:
                        whys.setdefault(lacks[ability], []).append(role)
            if whys:
                self.report.refused[mode] = "; ".join(f"{listed(roles)}: {why}" for why, roles in whys.items())


def _lacks(member: Member) -> dict[Ability, str]:
    """What a member cannot do, and why: by its layers, and by its self-test if that was made."""
    found: dict[Ability, str] = {}
    faults: dict[Ability, str | None] = {"static": member.whole_text}
    faults |= {"pad": member.verdict.padding, "move": member.verdict.moved}
    for ability, fault in faults.items():
        if strange := lacking(member.config, ability):
            found[ability] = f"{', '.join(strange)} layers"
        elif fault is not None:
            found[ability] = fault
    if "static" not in found:
        try:
            member.refuse_static_cache(0)
        except UnsupportedModeError as error:
            found["static"] = str(error).partition(" with ")[2].partition(". ")[0]
    return found


def _cached(member: Member) -> float:
    """How many values the cache of a text of 1,000 tokens holds: of a pass without weights, else by the config."""
    length, dtype = min(1000, member.context or 1000), member.model.dtype
    held = 0
    member.model.to(torch.bfloat16)  # without weights, torch knows experts in no other dtype
    with suppress(Exception), torch.no_grad():
        cache = empty_cache(member.config)
        member.forward(torch.zeros(1, length, dtype=torch.long, device="meta"), cache=cache, logits_to_keep=1)
        states = [state for layer in stored(cache) for state in vars(layer).values()]
        tensors = [x for state in states for x in (state.values() if isinstance(state, dict) else [state])]
        held = sum(x.numel() for x in tensors if isinstance(x, torch.Tensor))
    member.model.to(dtype)
    return held * 1000.0 / length if held else 1000.0 * cached_values(member.config)


def _same_place(one: MemberRef, other: MemberRef) -> bool:
    place = reference_of(one)
    return place is not None and place.id == other.id


def _memory(device: torch.device) -> float | None:
    """A device's memory in bytes; None if it does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    with suppress(AttributeError, ValueError, OSError):  # not on every system
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None
