"""Launches that are repeated with other tensors of the same form: Triton's work on their arguments is done once.

A call is recorded: which kernel runs with which arguments, and whether each is given by the caller, kept from call to
call, or memory made within. Later calls fill in addresses, and launch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ctypes import c_float
from typing import Any, NamedTuple

import torch

__all__ = ["Recorder", "again"]

MOST = 64
"""Calls that are kept; each holds the settings and keys of its rows, no logits."""
_LARGEST = 3.4028234663852886e38  # of float32
_KEPT: dict[Any, _Kept] = {}
_SEEN: set[Any] = set()


class _Part(NamedTuple):
    """A view of the n-th piece of memory made within the call."""

    piece: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, piece: torch.Tensor) -> torch.Tensor:
        if self.shape == piece.shape:
            return piece
        return piece.as_strided(self.shape, self.strides, piece.storage_offset() + self.start)


class _Launch(NamedTuple):
    """A kernel with its grid and arguments.

    By place among the arguments: `given` has numbers of values given, `together` a tuple of them, `made` memory.
    """

    run: Any
    arguments: list[Any]
    given: list[tuple[int, int]]
    together: list[tuple[int, list[int]]]
    made: list[tuple[int, _Part]]


class Recorder:
    """Launches the kernels of one call, makes their memory, and notes both once it is started.

    Attributes:
        whole: Whether it is known of each argument where it comes from.
        compiled: Whether the launches take addresses; the interpreter's do not.
    """

    def __init__(self, device: torch.device) -> None:
        self.pieces: list[torch.Tensor] = []
        self.launches: list[_Launch] = []
        self.kept: dict[int, torch.Tensor] = {}
        self.whole = False
        self.compiled = True
        self._device = device
        self._given: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._call: tuple[Any, Any, Any] = (None, None, None)

    def start(
        self,
        members: Sequence[torch.Tensor],
        weights: Any,
        sampling: Any,
        noise: Any,
        draws: int,
        want: Collection[str],
    ) -> None:
        """Note a call of `step` from here on, if one of its form is made for the second time.

        Logits, weights and the position differ from call to call, all else is the same.
        """
        key = _key(members, weights, sampling, noise, draws, want)
        if key not in _SEEN:
            if len(_SEEN) >= MOST:
                _SEEN.clear()
            _SEEN.add(key)
            return
        self._call = key, weights, (sampling, noise)
        settings = [] if sampling is None else [x for x in vars(sampling).values() if isinstance(x, torch.Tensor)]
        streams = [] if noise is None else [noise.seed, noise.row, noise.branch]
        given = [*members, weights] if noise is None else [*members, weights, noise.position]
        self.kept = {id(x): x for x in (*settings, *streams)}
        self._given = {id(x): i for i, x in enumerate(given)}
        # One tensor in two places could be two in the next call; unaligned ones have another kernel.
        alone = len(self._given) == len(given) and not self.kept.keys() & self._given.keys()
        self.whole = alone and not any(x.data_ptr() & 15 for x in given if isinstance(x, torch.Tensor))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uninitialised memory on the device."""
        piece = torch.empty(shape, dtype=dtype, device=self._device)
        if self.whole:
            self._storages[piece.untyped_storage().data_ptr()] = len(self.pieces)
            self.pieces.append(piece)
        return piece

    def launch(self, kernel: Any, programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
        """Launch programs of a kernel, their multiply-adds unfused."""
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        compiled = kernel[(programs,)](*arguments, **constants, **options)
        if not self.whole:
            return
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        noted = _Launch(None, [named[name] for name in kernel.arg_names], [], [], [])
        for at, x in enumerate(noted.arguments):
            self._note(noted, at, x)
        if compiled is None:  # by the interpreter, which takes tensors
            self.compiled = False
            run = _interpreted(kernel, programs)
        else:
            run = compiled[(programs, 1, 1)]
            noted.arguments[:] = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in noted.arguments]
        self.launches.append(noted._replace(run=run))

    def part(self, x: torch.Tensor) -> _Part | None:
        """Where a tensor lies in the memory made; None if not in it."""
        piece = self._storages.get(x.untyped_storage().data_ptr())
        return None if piece is None else _Part(piece, x.storage_offset(), tuple(x.shape), x.stride())

    def keep(self, out: dict[str, torch.Tensor]) -> None:
        """Keep the call with its outputs for `again`, if all that it needs is known."""
        if self.whole and all(self.part(x) is not None for x in out.values()):
            if len(_KEPT) >= MOST:
                _KEPT.pop(next(iter(_KEPT)), None)
            key, weights, same = self._call
            _KEPT[key] = _Kept(self, out, weights, same)

    def _note(self, launch: _Launch, at: int, x: Any) -> None:
        if id(x) in self._given:
            launch.given.append((at, self._given[id(x)]))
        elif isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x):
            self.whole &= all(id(y) in self._given for y in x)
            launch.together.append((at, [self._given.get(id(y), 0) for y in x]))
        elif isinstance(x, torch.Tensor) and id(x) not in self.kept:
            part = self.part(x)
            self.whole &= part is not None
            if part is not None:
                launch.made.append((at, part))
        else:
            return
        launch.arguments[at] = None


def _interpreted(kernel: Any, programs: int) -> Any:
    return lambda *arguments: kernel[(programs,)](*arguments)


class _Kept:
    """A recorded call."""

    def __init__(self, recorder: Recorder, out: dict[str, torch.Tensor], weights: Any, same: Any) -> None:
        self.numbers = weights, weights  # as asked for, and as numbers of float32
        self._same = same, recorder.kept  # their addresses are among the arguments, or their ids in the key
        self._device = recorder.pieces[0].device
        self._launches = recorder.launches
        self._compiled = recorder.compiled
        self._out = {name: part for name, x in out.items() if (part := recorder.part(x)) is not None}
        returned = {part.piece for part in self._out.values()}
        self._returned = [(i, recorder.pieces[i].shape, recorder.pieces[i].dtype) for i in sorted(returned)]
        # All other memory is one piece: dtypes, shapes and starts within it, bytes.
        self._inside: dict[int, tuple[torch.dtype, torch.Size, int]] = {}
        self._bytes = 0
        for i, x in enumerate(recorder.pieces):
            if i not in returned:
                self._inside[i] = x.dtype, x.shape, self._bytes
                self._bytes += -(-x.nbytes // 256) * 256
        # Places among the arguments: with bytes from the start of that piece, and of those returned.
        self._offsets: list[tuple[list[tuple[int, int]], list[tuple[int, int, int]]]] = []
        for launch in self._launches:
            starts = [(at, p.piece, p.start * recorder.pieces[p.piece].element_size()) for at, p in launch.made]
            self._offsets.append(
                (
                    [(at, self._inside[piece][2] + start) for at, piece, start in starts if piece in self._inside],
                    [(at, piece, start) for at, piece, start in starts if piece not in self._inside],
                )
            )

    def run(self, given: Sequence[Any], addresses: list[Any]) -> dict[str, torch.Tensor]:
        """Launch again; the outputs lie in memory of their own."""
        pieces = {i: torch.empty(shape, dtype=dtype, device=self._device) for i, shape, dtype in self._returned}
        pool = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        if not self._compiled:
            return self._interpret(given, pieces, pool)
        start = pool.data_ptr()
        for launch, (inside, returned) in zip(self._launches, self._offsets, strict=True):
            arguments = launch.arguments.copy()
            for at, number in launch.given:
                arguments[at] = addresses[number]
            for at, numbers in launch.together:
                arguments[at] = tuple([addresses[n] for n in numbers])
            for at, offset in inside:
                arguments[at] = start + offset
            for at, piece, offset in returned:
                arguments[at] = pieces[piece].data_ptr() + offset
            launch.run(*arguments)
        return {name: part.of(pieces[part.piece]) for name, part in self._out.items()}

    def _interpret(
        self, given: Sequence[Any], pieces: dict[int, torch.Tensor], pool: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        for i, (dtype, shape, start) in self._inside.items():
            pieces[i] = pool[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for launch in self._launches:
            arguments = launch.arguments.copy()
            for at, number in launch.given:
                arguments[at] = given[number]
            for at, numbers in launch.together:
                arguments[at] = tuple(given[n] for n in numbers)
            for at, part in launch.made:
                arguments[at] = part.of(pieces[part.piece])
            launch.run(*arguments)
        return {name: part.of(pieces[part.piece]) for name, part in self._out.items()}


def _form(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _key(members: Sequence[Any], weights: Any, sampling: Any, noise: Any, draws: int, want: Collection[str]) -> Any:
    """What a recorded call is found by: all that the checks look at, but for the value of weights."""
    return (
        tuple(want), draws, _form(weights) if isinstance(weights, torch.Tensor) else len(weights),
        *[_form(x) for x in members],
        None if sampling is None and noise is None
        else (id(sampling), id(noise.seed), id(noise.row), id(noise.branch), *_form(noise.position)),
    )  # fmt: skip


def again(
    members: Sequence[torch.Tensor], weights: Any, sampling: Any, noise: Any, draws: int, want: Collection[str]
) -> dict[str, torch.Tensor] | None:
    """Repeat a call of `step` that was kept, with unchecked arguments; None if there is none of this form.

    `sampling` and the noise's streams have to be the same objects, since their addresses are kept; what the checks
    would refuse is never kept.
    """
    try:
        found = _KEPT.get(_key(members, weights, sampling, noise, draws, want))
    except (AttributeError, TypeError):  # the checks say what is wrong
        return None
    if found is None:
        return None
    device = members[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return None
    numbers = weights
    if not isinstance(weights, torch.Tensor):
        asked, numbers = found.numbers
        if not (isinstance(weights, tuple) and weights == asked):
            if not all(isinstance(w, int | float) and abs(w) <= _LARGEST for w in weights):
                return None
            numbers = tuple([c_float(w).value for w in weights])
            found.numbers = tuple(weights), numbers
    given = [*members, numbers] if noise is None else [*members, numbers, noise.position]
    addresses, bits = [], 0
    for x in given:
        address = x.data_ptr() if isinstance(x, torch.Tensor) else x
        addresses.append(address)
        if address is not numbers:
            bits |= address
    return None if bits & 15 else found.run(given, addresses)
