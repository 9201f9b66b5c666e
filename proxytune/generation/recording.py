"""Records what a model's `generate()` decides, as a `proxytune.trace.Trace`.

A loop of this package writes each decision itself (`Call.log`). In transformers' own loops the members' logits and the
stopping criteria are watched. What was recorded is then compared with the tokens that `generate()` returns; where it
does not fit (beams, trees, assisted decoding, a compiled step), the texts are read once more, by all members.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxytune.errors import InputError, RecordingWarning, UnsupportedModeError
from proxytune.generation.call_log import Arrays, CallLog, log_on, logged
from proxytune.generation.call_watch import Watch
from proxytune.generation.method_hooks import MethodHook, hooks_on, target_of
from proxytune.generation.recorded_texts import about, cut, fits, ids_of, origins_of, read_into, reread
from proxytune.generation.token_texts import names_of, pieces_of
from proxytune.models.ensemble import Ensemble
from proxytune.models.scored_texts import Prompts
from proxytune.trace import Trace, TracedText, TraceWriter
from proxytune.trace.record import COMBINED, refuse_mixed
from proxytune.trace.store import refuse_other
from proxytune.validation import Ids, shown, whole

__all__ = ["Recording", "record"]

_KEEPING = threading.Lock()  # two threads may have one recording, or one file


class Recording:
    """The texts of recorded calls of `generate()`, as they come.

    `model.generate(…, trace=Recording())` records one call of a composed model; `record(model)` all calls of any.

    Attributes:
        top: How many likeliest tokens of each member are kept, k.
        tokenizer: Writes the texts; without one a trace has ids alone.
        file: Where texts are appended after each call, `NAME.npz`; None to keep them in memory only.
    """

    def __init__(
        self, *, top: int = 5, tokenizer: PreTrainedTokenizerBase | None = None, file: str | Path | None = None
    ) -> None:
        """Begin without texts.

        Raises:
            InputError: If `top` is less than 1, the tokenizer cannot decode, the file's name does not end in .npz, or
                it is a trace with another top or in a folder that is not there.
        """
        self.top = whole("top", top, "of tokens", least=1)
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise InputError.of(
                "tokenizer",
                expected="a tokenizer",
                got=shown(tokenizer, 80),
                remedy="Pass the base's tokenizer itself.",
            )
        self.tokenizer, self.file = tokenizer, None if file is None else Path(file)
        if self.file is not None and self.file.suffix != ".npz":
            raise InputError.of("file", expected="NAME.npz", got=str(file), remedy=f"Write {self.file.stem}.npz.")
        if self.file is not None:
            refuse_other(self.file, None, self.top)
        self._texts: list[TracedText] = []
        self._sources: tuple[str, ...] = ()
        self._about: dict[str, Any] = {}
        self._hook: MethodHook | None = None
        self._stopped = self._called = False

    @property
    def trace(self) -> Trace:
        """What has been recorded so far."""
        return Trace(sources=self._sources, top=self.top, texts=tuple(self._texts), about=dict(self._about))

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[TracedText]:
        return iter(self._texts)

    def __getitem__(self, index: int) -> TracedText:
        return self._texts[index]

    def __repr__(self) -> str:
        return f"Recording of {self.trace!r}"

    def _repr_html_(self) -> str | None:
        show = getattr(self.trace, "_repr_html_", None)
        return None if show is None else show()

    def __enter__(self) -> Self:
        if self._stopped:
            raise InputError.of(
                "a recording",
                expected="a new one of the model",
                got="one that was stopped",
                remedy="Write `with proxytune.record(model) as recording:` again.",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        idle = kind is None and self._hook is not None and not self._called
        self.stop()
        if idle:
            warnings.warn(
                "nothing was recorded: generate() of this very model was not called. A loop of your own that calls "
                "model(…) is not recorded; read its texts with Recording.read.",
                RecordingWarning,
                stacklevel=2,
            )

    def stop(self) -> None:
        """Record no further call of the model that `record` was given."""
        if self._hook is not None:
            self._hook.take()
            self._stopped = True
        self._hook = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied model's calls are not recorded, and a copied call's are

    def read(
        self, model: Any, texts: Sequence[Ids | torch.Tensor], *, prompts: Prompts | None = None
    ) -> tuple[TracedText, ...]:
        """Record texts from elsewhere, as if the model had written them: teacher-forced, without generating.

        Args:
            model: Composed or plain, in evaluation mode.
            texts: R texts as token ids. Of a text without a prompt the first token is its prompt.
            prompts: R prompts as token ids, read and not recorded; role → prompts for members that read their own.

        Returns:
            What was added, with `given=True`.

        Raises:
            InputError, UnsupportedModelError: As `proxytune.models.scoring.score`.
        """
        ensemble = Ensemble.of(model)
        log = CallLog(model, self.top, [role for role, _ in ensemble.models])
        self._refuse_other((COMBINED, *log.roles), about(ensemble, {}, None))
        read_into(log, model, texts, prompts)
        of_base = prompts["base"] if isinstance(prompts, Mapping) else prompts
        before = [list(map(int, of_base[i])) if of_base is not None else [] for i in range(len(texts))]
        before = [ids or [int(text[0])] for ids, text in zip(before, texts, strict=True)]
        return self._keep(log, before, log.rows(), about(ensemble, {}, None), given=True)

    # --- one call ------------------------------------------------------------------------------------------------

    def over(self, model: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call `generate` of a model, and record it. Returns what it returns.

        Raises:
            UnsupportedModeError: For an encoder-decoder, and for prompts that are not token ids.
            InputError: If the call is being recorded already, or by a model with other members than before.
        """
        self._called = True
        named = _named(args, kwargs)
        _refuse(model, named)
        ensemble = Ensemble.of(model)
        log = CallLog(model, self.top, [role for role, _ in ensemble.models])
        sources = (COMBINED, *log.roles) if ensemble.composed else None  # a processor may steer a plain model
        if ensemble.composed:
            self._refuse_other(sources, about(ensemble, named, None))

        def look(config: Any) -> None:  # known later, but before the work
            self._refuse_other(sources, about(ensemble, named, config))

        with Watch(log, named.get("custom_generate"), look) as seen, logged(log):
            out = generate(**named)
        sequences: torch.Tensor = out if isinstance(out, torch.Tensor) else out.sequences
        origins = origins_of(sequences, named, log)
        new, prompts = cut(sequences, named, seen, origins)
        arrays = log.rows()
        if not fits(log, arrays, sequences[:, ids_of(named).shape[1] :], seen, named.get("assistant_model")):
            if log.roles != tuple(role for role, _ in ensemble.models):
                log.unreadable = "a processor that steers, without which the model would read it"
            if log.unreadable is not None:
                raise UnsupportedModeError.of(
                    "a recording",
                    expected="greedy decoding or sampling, not compiled; the text of another mode is read again",
                    got=log.unreadable,
                    remedy="Leave out beams, trees, assistants and compiled steps, or the recording.",
                )
            arrays = reread(log, new, prompts, named, origins)
        arrays = log.marked(arrays)
        self._keep(log, prompts, arrays, about(ensemble, named, seen.config))
        return out

    def _keep(
        self,
        log: CallLog,
        prompts: list[list[int]],
        rows: list[Arrays],
        told: dict[str, Any],
        given: bool = False,
    ) -> tuple[TracedText, ...]:
        sources = (COMBINED, *log.roles)
        facts: list[dict[str, Any]] = [{}] * len(rows) if log.facts is None else log.facts
        texts = tuple(self._text(*one, given) for one in zip(prompts, rows, facts, strict=True))
        with _KEEPING:
            self._refuse_other(sources, told)
            self._sources = sources
            self._about |= told
            self._texts += texts
            if self.file is not None:
                TraceWriter(self.file, sources=sources, top=self.top, about=self._about).add(texts)
        return texts

    def _refuse_other(self, sources: tuple[str, ...] | None, told: dict[str, Any]) -> None:
        if self._texts and sources is not None and sources != self._sources:
            raise InputError.of(
                "a recording",
                expected=f"calls of models with the same members: {', '.join(self._sources[1:])}",
                got=", ".join(sources[1:]),
                remedy="Use a recording for each model.",
            )
        refuse_mixed("a recording", self._about, told)
        if self.file is not None:
            refuse_other(self.file, sources, self.top, told)

    def _text(self, prompt: list[int], arrays: Arrays, facts: dict[str, Any], given: bool) -> TracedText:
        words: dict[str, Any] = {**arrays, "facts": facts, "given": given}
        if (tokenizer := self.tokenizer) is not None:
            words["prompt"] = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            words["pieces"] = pieces_of(tokenizer, arrays["tokens"].tolist(), prompt)
            words["names"] = names_of(tokenizer, np.unique(arrays["top_ids"]))
        return TracedText(prompt_ids=np.asarray(prompt, np.int32), **words)


def record(
    model: Any,
    *,
    top: int = 5,
    tokenizer: PreTrainedTokenizerBase | None = None,
    file: str | Path | None = None,
) -> Recording:
    """Record every `generate()` of a model, composed or plain, until the end of a `with` block, or `stop`.

    ```python
    with proxytune.record(pipe.model, tokenizer=pipe.tokenizer) as recording:
        pipe("Question: Where was Ann born?")
    print(recording[0].kl)
    ```

    Every loop and door is recorded: `generate()`, each `custom_generate` of this package, a model with an attached
    `ProxyTuningLogitsProcessor`. Beams, trees, assisted decoding and compiled steps cost one more pass over the text.

    Args:
        model: Any decoder-only causal LM; that of a pipeline is `pipe.model`.
        top: How many likeliest tokens of each member to keep.
        tokenizer: Writes the texts; without one the trace has ids alone.
        file: `NAME.npz`, to which texts are appended after each call; `NAME.jsonl` is written beside it.

    Returns:
        The recording; `recording.trace` is what everything that looks at a run reads.

    Raises:
        InputError: If the model cannot generate, or is being recorded.

    Warns:
        RecordingWarning: At the end of the `with` block, if nothing was recorded.
    """
    recording = Recording(top=top, tokenizer=tokenizer, file=file)
    target = target_of(model)
    if any(getattr(hook.replacement, "_recording", None) is not None for hook in hooks_on(target, "generate")):
        raise InputError.of(
            "record",
            expected="a model that is not being recorded",
            got=f"a {type(target).__name__} with a recording",
            remedy="End that one first: leave its `with` block, or call its stop(), which is also that of "
            "model.generate.replacement.recording.",
        )
    recording._hook = MethodHook(target, "generate", _Recorded(recording, target))
    return recording


class _Recorded:
    """`generate()` of a recorded model."""

    def __init__(self, recording: Recording | None, model: Any) -> None:
        self._recording, self._model = recording, model

    @property
    def recording(self) -> Recording | None:
        """The recording, for those who kept no other name of it."""
        return self._recording

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recorded, (None, None)  # nobody could read what the model of a pickle records

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._recording is None:
            return original(*args, **kwargs)
        if log_on(self._model) is not None and kwargs.get("trace") is None:
            with logged(None):  # a processor's own call, inside one that is recorded
                return original(*args, **kwargs)
        if kwargs.get("trace") is not None:
            raise InputError.of(
                "trace",
                expected="none: the model is being recorded",
                got="a Recording",
                remedy="Leave out one of both.",
            )
        return self._recording.over(self._model, original, args, kwargs)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _refuse(model: Any, named: Mapping[str, Any]) -> None:
    if log_on(model) is not None:
        raise InputError.of(
            "trace", expected="one recording of a call", got="a second one", remedy="Leave out one of both."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModeError.of(
            "a recording",
            expected="a decoder-only model",
            got=f"a {type(model).__name__}, an encoder-decoder",
            remedy="Score its texts instead: model(input_ids=source, labels=target).",
        )
    if not isinstance(ids_of(named), torch.Tensor):
        raise UnsupportedModeError.of(
            "a recording",
            expected="a prompt of token ids, `[B, T]`",
            got="inputs_embeds" if named.get("inputs_embeds") is not None else "no input_ids",
            remedy="Pass input_ids=.",
        )
