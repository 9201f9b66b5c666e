"""Do three models fit together as base, expert and antiexpert? Everything that is wrong at once, and what they cost.

Files tell most of it: configs, tokenizers, a model without weights. For the rest each member is loaded, tested, asked
for its predictions on a few built-in texts, and dropped before the next one, so that memory stays at the largest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from proxytune.costs.model_size import weight_bytes
from proxytune.errors import NumericalError
from proxytune.models.loading import open_member
from proxytune.models.members.encoder_decoder import EncoderDecoderMember
from proxytune.models.members.layer_kinds import NEEDS
from proxytune.models.members.member import Member
from proxytune.models.pair_files import FileCheck
from proxytune.models.pair_probe import Text, built_in_texts, lacks_of, measured, turn_ends
from proxytune.models.pair_report import PairReport
from proxytune.models.pair_tokens import listed
from proxytune.recipe import EndTokens, MemberRef

__all__ = ["check_pair"]

_EQUAL = 1e-6
"""Nats per token below which two models say the same."""
_NEARLY = 1e-3


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


class _Check(FileCheck):
    """The whole check: files, and weights loaded one member after the other."""

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
            self.lacks[role] = lacks_of(member)
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


def _memory(device: torch.device) -> float | None:
    """A device's memory in bytes; None if it does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    with suppress(AttributeError, ValueError, OSError):  # not on every system
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None
