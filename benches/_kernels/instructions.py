"""Instructions per column of K1, counted in its machine code: on the shortest way through it that reads all columns."""

from __future__ import annotations

import re
from collections import deque
from typing import NamedTuple

__all__ = ["per_column"]

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
_GCN = re.compile(r"^(?:[ \t]+([a-z]\w+)(?:[ \t]+([^;\n]*))?|(\.L\w+):)", re.M)
_BYTES = {".128": 16, ".64": 8, ".U16": 2, "dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "short_d16": 2}


class _Instruction(NamedTuple):
    """One instruction: the places that may follow it (none: the end), and the bytes that it loads."""

    next: list[int]
    bytes: int


def per_column(code: str, columns: int, row_bytes: int) -> float:
    """Fewest instructions that a thread executes per column it reduces.

    Args:
        code: What cuobjdump -sass prints of a kernel, or AMD's assembly of one.
        columns: Columns per thread.
        row_bytes: Bytes of all members' logits in these columns.

    Returns:
        Rounded to a tenth.

    Raises:
        ValueError: If no way through the code loads so much.
    """
    instructions = _of_sass(code) if "Function : " in code else _of_gcn(code)
    # Breadth first: places and the bytes loaded on the way to them.
    seen = {(0, 0)}
    queue = deque([(0, 0, 0)])
    while queue:
        place, loaded, count = queue.popleft()
        one = instructions[place]
        loaded, count = min(loaded + one.bytes, row_bytes), count + 1
        if not one.next and loaded == row_bytes:
            return round(count / columns, 1)
        for state in ((following, loaded) for following in one.next):
            if state not in seen:
                seen.add(state)
                queue.append((*state, count))
    raise ValueError(f"code: expected a way through it that loads {row_bytes} bytes; got none")


def _of_sass(code: str) -> list[_Instruction]:
    found = [(int(m[1], 16), m[2], m[3], m[4]) for m in _SASS.finditer(code)]
    place = {address: i for i, (address, *_) in enumerate(found)}
    out = []
    for i, (_, predicate, name, operands) in enumerate(found):
        kind = name.split(".")[0]
        if kind == "EXIT":
            following = []
        elif kind == "BRA":
            following = [place[int(operands.rsplit("0x", 1)[1], 16)]]
            if predicate or re.search(r"\bU?P\d", operands):
                following.append(i + 1)
        else:
            following = [i + 1] if i + 1 < len(found) else []
        out.append(_Instruction(following, _size(name, 4) if kind == "LDG" else 0))
    return out


def _of_gcn(code: str) -> list[_Instruction]:
    found: list[tuple[str, str]] = []
    place: dict[str, int] = {}
    for m in _GCN.finditer(code[: code.index(".Lfunc_end")]):
        if m[3]:
            place[m[3]] = len(found)
        else:
            found.append((m[1], (m[2] or "").strip()))
    out = []
    for i, (name, operand) in enumerate(found):
        following = [] if name == "s_endpgm" else [i + 1]
        if name.startswith(("s_branch", "s_cbranch")):
            following = [place[operand], *([i + 1] if name != "s_branch" else [])]
        out.append(_Instruction(following, _size(name, 0) if name.startswith(("global_load", "buffer_load")) else 0))
    return out


def _size(name: str, default: int) -> int:
    return next((size for suffix, size in _BYTES.items() if suffix in name), default)
