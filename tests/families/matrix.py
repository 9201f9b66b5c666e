"""Which families are right, in which role and mode, against a reference without cache, batch or padding.

::

    python tests/families/matrix.py -j 2                           all names, as lines
    python tests/families/matrix.py --names jamba zamba2 --table   some names, one letter a mode
    python tests/families/matrix.py -j 2 --out FILE.json           as a record

A family takes each of four roles beside plain Llamas of its vocabulary. A cell is `right`; `unpadded` (right for
prompts of one length, and refused for left-padded ones); `refused` by an error of proxytune's; `wrong`; `crashed`, with
any other error; `wrong alone` or `crashed alone`, where an attached base does the same without proxytune. What a name
gets wrong by itself stands beside it (`alone.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from families.alone import TOLERANCE, apart, check, settled
from families.record import write
from families.tiny_models import BOS, PAD, build, names
from support.reference import Reference
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

import proxytune
from proxytune import FusedDecoding, ProxyTuningLogitsProcessor, SpeculativeDecoding
from proxytune.errors import ProxytuneError
from proxytune.methods.speculation import PromptLookupDraft
from proxytune.methods.speculation.round import Proposal
from proxytune.methods.trees import ForkDecoding, SiblingDecoding
from proxytune.models.members.cache_name import CACHE, cache_of

ALPHA = 0.7
NEW = 6
LENGTH = 12
PADDED = (0, 5)  # how many columns of each row's prompt are padding
SECONDS = 240  # a family that takes longer is stuck

Outcome = dict[str, str]


class Wrong(Exception):
    """What differs."""


class Role:
    """A family in one role.

    Attributes:
        models: Base, expert and antiexpert.
        reference: What is right.
        door: "composed", "attached", or "alone" for the base by itself.
        steered: The model that is asked to generate.
    """

    def __init__(self, models: list[PreTrainedModel], reference: Reference, door: str) -> None:
        self.models, self.reference, self.door = models, reference, door
        self.hook: Any = None
        self.steered: Any = models[0]

    def open(self) -> None:
        base, expert, antiexpert = self.models
        if self.door == "composed":
            self.steered = proxytune.wrap(
                base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False
            )
        elif self.door == "attached":
            self.hook = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
            self.hook.attach(base)

    def close(self) -> None:
        if self.hook is not None:
            self.hook.detach()

    def alone(self) -> Role:
        """The base by itself; this role's processor must be detached."""
        return Role(self.models, reference_of(self.models, alpha=0.0), "alone")


class Call:
    """One way to generate: prompts, left-padded or not, and what `generate()` is asked for."""

    def __init__(self, role: Role, padded: bool, rows: int = 2) -> None:
        self.role = role
        self.ids = torch.randint(3, 100, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
        self.mask = torch.ones_like(self.ids)
        if padded:
            for row, n in enumerate(PADDED[:rows]):
                self.ids[row, :n], self.mask[row, :n] = PAD, 0

    def run(self, model: Any, **settings: Any) -> Any:
        torch.manual_seed(7)
        settings = {"max_new_tokens": NEW, "pad_token_id": PAD, **settings}
        return model.generate(self.ids, attention_mask=self.mask, **settings)

    def equal(self, reference: dict[str, Any] | None = None, **settings: Any) -> None:
        """The same tokens as the reference's loop, by the same settings (or others, for what only we know)."""
        want = self.run(self.role.reference, **(settings if reference is None else reference))
        got = self.run(self.role.steered, **settings)
        if torch.equal(got, want):
            return
        rows = int((got != want).any(1).sum()) if got.shape == want.shape else len(got)
        first = int((got != want).any(0).int().argmax()) - LENGTH if got.shape == want.shape else -1
        raise Wrong(f"{rows} of {len(got)} texts differ, from new token {first} on")

    def exact(self, **settings: Any) -> None:
        """The scores of every step are those of the reference after that very text."""
        show = {"output_scores": True, "return_dict_in_generate": True}
        out = self.run(self.role.steered, **settings, **show)
        start = self.ids.shape[1]
        if out.sequences.shape[1] != start + NEW or len(out.scores) != NEW:
            raise Wrong(f"{out.sequences.shape[1] - start} tokens, {len(out.scores)} scores")
        for step, scores in enumerate(out.scores):
            for row, text in enumerate(out.sequences[:, : start + step]):
                self.compare(scores[row], text, self.mask[row * len(self.mask) // len(scores)], step)
                if not settings.get("do_sample") and scores[row].argmax() != out.sequences[row, start + step]:
                    raise Wrong(f"new token {step} is not the best")

    def compare(self, scores: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, step: int) -> None:
        start = self.ids.shape[1]
        want = self.role.reference.after(torch.cat([text[:start][mask.bool()], text[start:]]))
        if (off := apart(scores[: len(want)], want)) > TOLERANCE:
            raise Wrong(f"logits off by {off:.1g} at new token {step}")

    def tree(self, loop: Any) -> None:
        """Every branch has the log-probabilities of the reference after its very text."""
        out = self.run(self.role.steered, custom_generate=loop, do_sample=True, top_k=0, return_dict_in_generate=True)
        for tree, prompt, kept in zip(out.trees, self.ids, self.mask.bool(), strict=True):
            for branch in tree:
                text = prompt[kept]
                for step, (token, logp) in enumerate(
                    zip(branch.along("tokens"), branch.along("logprobs"), strict=True)
                ):
                    want = float(self.role.reference.after(text).log_softmax(-1)[int(token)])
                    if not abs(want - logp) <= TOLERANCE * max(1.0, abs(want)):
                        raise Wrong(f"log-probability off by {abs(want - logp):.1g} at new token {step} of a branch")
                    text = torch.cat([text, torch.tensor([int(token)])])


def reference_of(models: list[PreTrainedModel], kind: type[Reference] = Reference, alpha: float = ALPHA) -> Reference:
    """The slow reference of any models. transformers' loops see the config of a plain model."""
    slow = kind([build("llama")], alpha)
    slow.__dict__["members"] = models
    slow.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    return slow


class Known(Reference):
    """A draft that is right two times out of three, so that rounds end at different tokens."""

    def after(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().after(ids)
        return logits.roll(1) if len(ids) % 3 == 0 else logits

    def get_input_embeddings(self) -> Any:
        return self.__dict__["members"][0].get_input_embeddings()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        dropped = (CACHE, "past_key_values", "use_cache", "attention_mask")
        given = {k: v for k, v in kwargs.items() if k not in dropped}
        return super().generate(*args, **given)


class ByHeart(PromptLookupDraft):
    """The same, for our own speculation: proposes a known text."""

    def __init__(self, text: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "text", text)

    def begin(self, start: Any) -> Any:
        drafter = super().begin(start)

        def propose(count: int, rows: Any, draw: Any) -> Proposal:
            at = LENGTH + torch.tensor(rows.texts.counts)[:, None] + torch.arange(count)
            right = self.text.gather(1, at.clamp(max=self.text.shape[1] - 1))
            return Proposal(torch.where(at % 3 == 0, (right + 1) % 100, right))

        drafter.propose = propose
        return drafter


def _assisted(role: Role, padded: bool) -> None:
    call = Call(role, False, rows=1)
    draft = reference_of(role.models, Known, role.reference.alpha)
    draft.generation_config.num_assistant_tokens = 4
    draft.__dict__["memo"] = role.reference.__dict__["memo"]
    call.equal(do_sample=False, reference={"do_sample": False}, assistant_model=draft)


def _lookup(role: Role, padded: bool) -> None:
    call = Call(role, False, rows=1)
    call.ids = call.ids[:, :4].repeat(1, 3)
    call.equal(do_sample=False, reference={"do_sample": False}, prompt_lookup_num_tokens=3)


def _speculation(role: Role, padded: bool) -> None:
    call = Call(role, False, rows=1)
    text = call.run(role.reference, do_sample=False)
    loop = SpeculativeDecoding(draft=ByHeart(text), draft_tokens=4)
    call.equal(do_sample=False, reference={"do_sample": False}, custom_generate=loop)


def _expert_drafts(role: Role, padded: bool) -> None:
    loop = SpeculativeDecoding(draft_tokens=3)
    Call(role, False, rows=1).equal(do_sample=False, reference={"do_sample": False}, custom_generate=loop)


Mode = Callable[[Role, bool], None]


def _equal(**settings: Any) -> Mode:
    cache_only = ("cache_implementation", "prefill_chunk_size")
    reference = {k: v for k, v in settings.items() if k not in cache_only}
    return lambda role, padded: Call(role, padded).equal(reference=reference, **settings)


def _exact(**settings: Any) -> Mode:
    return lambda role, padded: Call(role, padded).exact(**settings)


def _tree(loop: Any) -> Mode:
    return lambda role, padded: Call(role, padded).tree(loop)


# Mode → what it asks of a cache, whether its prompts are left-padded, and how it is run.
MODES: dict[str, tuple[str, bool, Mode]] = {
    "greedy": ("append", True, _exact(do_sample=False)),
    "fused": ("append", True, _equal(do_sample=True, top_k=0, custom_generate=FusedDecoding(seed=5))),
    "chunked": ("append", True, _exact(do_sample=False, prefill_chunk_size=5)),
    "beams": ("reorder", True, _equal(do_sample=False, num_beams=3, num_return_sequences=2)),
    "forks": ("reorder", True, _tree(ForkDecoding(threshold=2.0, branches=3, seed=5))),
    "siblings": ("reorder", True, _tree(SiblingDecoding(threshold=2.0, siblings=3, seed=5))),
    "repeat": ("repeat", True, _equal(do_sample=True, top_k=0, num_return_sequences=2)),
    "assisted": ("crop", False, _assisted),
    "lookup": ("crop", False, _lookup),
    "speculation": ("crop", False, _speculation),
    "expert-drafts": ("crop", False, _expert_drafts),
    "static": ("static", True, _exact(do_sample=False, cache_implementation="static")),
}
# Role → the door, and at which place of (base, expert, antiexpert) the family stands.
ROLES: dict[str, tuple[str, tuple[int, ...]]] = {
    "base": ("composed", (0,)),
    "companion": ("composed", (1, 2)),
    "attached base": ("attached", (0,)),
    "attached companion": ("attached", (1, 2)),
}


def kinds_of(model: Any) -> list[str]:
    """The kinds of layers that a cache of this model has."""
    try:
        return sorted(set(get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]))
    except Exception as error:
        return [f"none: {type(error).__name__}"]


class Passes:
    """Counts the passes of models over a cache."""

    def __init__(self, models: Iterable[PreTrainedModel]) -> None:
        self.count = 0
        for model in models:
            model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += kwargs.get("use_cache") is not False


def attempt(action: Callable[..., Any], *args: Any, passes: Passes | None = None) -> Outcome:
    """What becomes of an action."""
    before = passes.count if passes else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action(*args)
    except ProxytuneError as error:
        late = {"late": "after a pass"} if passes and passes.count > before else {}
        return {"is": "refused", "why": " ".join(str(error).split()), "kind": type(error).__name__, **late}
    except _THEIRS as error:
        said = " ".join(str(error).split())
        if any(words in said for words in _SAID):
            return {"is": "refused", "why": said[:200], "kind": "transformers"}
        return _crash(error)
    except Wrong as error:
        return {"is": "wrong", "why": str(error)}
    except Exception as error:
        return _crash(error)
    return {"is": "right"}


# How transformers refuses a mode of a model by itself.
_THEIRS = (ValueError, RuntimeError)
_SAID = (
    "is not supported with stateful models",
    "cannot use beam search with a cache",
    "Cannot use prefill chunking without a cache",
    "Assisted decoding requires a cache",
)


def _crash(error: Exception) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
    ours = [f"{Path(f.filename).name}:{f.name}" for f in frames if "/proxytune/" in f.filename]
    said = " ".join(str(error).split())[:200]
    return {"is": "crashed", "why": f"{type(error).__name__}: {said} (in {where}, from {ours[-1] if ours else '?'})"}


RECURRENT = {"conv", "hybrid", "hybrid_sliding", "linear_attention"}


def cache_class(model: Any) -> str | None:
    """The class of the cache that a model makes, where it is none of transformers' own; "none" for a model without."""
    try:
        cache = cache_of(model(torch.tensor([[3, 4, 5]]), use_cache=True))
    except Exception as error:
        return type(error).__name__
    if cache is None:
        return "none"
    return None if type(cache).__module__.endswith("cache_utils") else type(cache).__name__


def untrue(cell: Outcome, kinds: Iterable[str], own_cache: str | None) -> str | None:
    """What a refusal says the model has, and it has not: a kind of layer, or a state outside of its cache."""
    if cell["is"] != "refused" or "; got " not in cell["why"]:
        return None
    got = cell["why"].split("; got ", 1)[1].split(". ", 1)[0]
    named = {kind for kind in DYNAMIC_LAYER_TYPE_MAPPING if re.search(rf"\b{kind}\b", got)}
    if "in its own modules" in got and own_cache is None:
        return "a state of its own"
    if "recurrent" in got and not RECURRENT & set(kinds):
        return "recurrent"
    return next(iter(sorted(named - set(kinds) - {"full_attention"})), None)


@torch.no_grad()
def family(
    name: str, *, modes: Iterable[str] = tuple(MODES), roles: Iterable[str] = tuple(ROLES), alone: bool = True
) -> dict[str, Any]:
    """Every role and mode of one name."""
    try:
        own = [settled(build(name, seed)) for seed in (1, 2, 3)]
    except Exception as error:
        return {"built": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    plain = [settled(build("llama", seed)) for seed in (4, 5, 6)]
    out: dict[str, Any] = {"kinds": kinds_of(own[0])}
    if alone:
        out["alone"] = check(own[0])
    if own_cache := cache_class(own[0]):
        out["cache"] = own_cache
    out["roles"] = {}
    passes = Passes(own)
    references: dict[tuple[int, ...], Reference] = {}
    for role_name in roles:
        door, places = ROLES[role_name]
        models = [own[i] if i in places else plain[i] for i in range(3)]
        if places not in references:
            references[places] = reference_of(models)
        role = Role(models, references[places], door)
        composed = attempt(role.open)
        if composed["is"] != "right":
            if kind := untrue(composed, out["kinds"], own_cache):
                composed["untrue"] = kind
            out["roles"][role_name] = {"composing": composed}
            continue
        cells = out["roles"][role_name] = {}
        for mode in modes:
            if mode == "expert-drafts" and door != "composed":
                continue
            _, padded, run = MODES[mode]
            cell = attempt(run, role, padded, passes=passes)
            if cell["is"] == "refused" and cell["why"].startswith("left padding"):
                again = attempt(run, role, False, passes=passes)
                cell = {"is": "unpadded", "why": cell["why"]} if again["is"] == "right" else again
            if kind := untrue(cell, out["kinds"], own_cache):
                cell["untrue"] = kind
            cells[mode] = cell
        role.close()
        if role_name == "attached base":
            for mode, cell in cells.items():
                _, padded, run = MODES[mode]
                if cell["is"] in ("wrong", "crashed") and attempt(run, role.alone(), padded)["is"] != "right":
                    cell["is"] += " alone"
    return out


# --- many names, a process each ---------------------------------------------------------------------------------------


def _work(name: str, file: str, wanted: dict[str, Any]) -> None:
    signal.alarm(SECONDS)
    Path(file).write_text(json.dumps(family(name, **wanted)), encoding="utf-8")


def run(todo: list[str], jobs: int, **wanted: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each name with its results, in the order in which they are done."""
    family("llama")  # what a first family imports and sets up, the processes need not
    context = multiprocessing.get_context("fork")
    left, running = list(todo), {}
    with tempfile.TemporaryDirectory() as folder:
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                file = f"{folder}/{len(left)}.json"
                process = context.Process(target=_work, args=(name, file, wanted))
                process.start()
                running[name] = process, file
            multiprocessing.connection.wait([p.sentinel for p, _ in running.values()])
            for name, (process, file) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[name]
                done = Path(file)
                if done.exists() and process.exitcode == 0:
                    yield name, json.loads(done.read_text(encoding="utf-8"))
                else:
                    stuck = process.exitcode == -signal.SIGALRM
                    said = f"no result in {SECONDS} s" if stuck else f"its process ended with {process.exitcode}"
                    yield name, {"built": said}


LETTERS = {
    "right": "+",
    "unpadded": "u",
    "refused": "-",
    "wrong": "W",
    "crashed": "C",
    "wrong alone": "w",
    "crashed alone": "c",
}


def line(name: str, result: dict[str, Any]) -> str:
    """One letter for each mode of each role."""
    if "built" in result:
        return f"{name:28} {result['built']}"
    parts = []
    for cells in result["roles"].values():
        if "composing" in cells:
            parts.append(LETTERS[cells["composing"]["is"]] * 2 + " " * (len(MODES) - 2))
        else:
            parts.append("".join(LETTERS[cells[m]["is"]] if m in cells else " " for m in MODES))
    return f"{name:28} " + " | ".join(parts) + f" | {' '.join(result['kinds'])}"


def grouped(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """What is not right: (outcome, why) → role → modes."""
    out: dict[tuple[str, str], dict[str, list[str]]] = {}
    for role, cells in result.get("roles", {}).items():
        for mode, cell in cells.items():
            if cell["is"] not in ("right", "unpadded"):
                late = f" ({cell['late']})" if "late" in cell else ""
                late += f" (UNTRUE: {cell['untrue']})" if "untrue" in cell else ""
                out.setdefault((cell["is"], cell["why"] + late), {}).setdefault(role, []).append(mode)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=names())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("-j", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(" " * 29 + " | ".join(f"{role:{len(MODES)}}" for role in ROLES))
    results, start = {}, time.time()
    for name, result in run(wanted.names, wanted.j, modes=wanted.modes):
        results[name] = result
        if wanted.out:
            write({name: result}, wanted.out)
        print(line(name, result), flush=True)
        if wanted.table:
            continue
        for cell, where in grouped(result).items():
            places = "; ".join(f"{role}: {' '.join(modes)}" for role, modes in where.items())
            print(f"    {cell[0]}: {places}: {cell[1]}")
    cells = [cell for r in results.values() for role in r.get("roles", {}).values() for cell in role.values()]
    counts = {outcome: sum(cell["is"] == outcome for cell in cells) for outcome in LETTERS}
    lies = sum("untrue" in cell for cell in cells)
    print(f"{len(results)} names in {time.time() - start:.0f} s: {counts}, {lies} refusals with an untrue reason")


if __name__ == "__main__":
    main()
