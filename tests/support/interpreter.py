"""Triton's interpreter without its repeated work."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def patch_the_language_once_per_launch() -> None:
    """Within a launch, leave out what the interpreter does again for every device function that the kernel calls.

    It puts its own functions into `triton.language` before a launch, and takes them out behind it. For each call of a
    device function it goes through the whole module once more, finds them there, and changes nothing: much of the
    time of small kernels. Where Triton has no such function any more, nothing is done.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    no_changes = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or no_changes is None:
        return
    patched: set[str] = set()  # the modules, in the launch that runs

    def once(fn: Any) -> Any:
        names = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if names and names <= patched:
            return no_changes()
        outermost = not patched
        scope = patch(fn)
        patched.update(names)
        if outermost:
            restore = scope.restore

            def ended() -> None:
                patched.clear()
                restore()

            scope.restore = ended
        return scope

    interpreter._patch_lang = once
