"""Build the API pages from the docstrings with pdoc: `.venv/bin/python .ci/api_pages.py api`, then open api/index.html.

Every public module has a page but those of the command line, whose reference is `--help`, of the throughput bench, and
of the torch implementation behind `proxytune.ops`. Whatever pdoc warns about ends the build, and so does a door of
`proxytune` without its place on the first page, a full name in backticks that leads nowhere, and what Markdown does not
know: pdoc reads docstrings as Markdown with Google's sections.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pdoc
from pdoc.doc_types import safe_eval_type

APART = re.compile(r"proxytune\.(cli|throughput|ops\.torch_impl)(\.|$)|.*\._")
ROOTS = ("proxytune", "proxytune_kernels")
NO_LINK = re.compile(r"<code>(proxytune(?:_kernels)?\.[\w.]+)(?:\(\))?</code>")
FILES = re.compile(r".*\.(json|py)$")
RAW = re.compile(r"<p>(?:={4,} .*|::(?=\s*</p>|$)|\.\. \w+::.*)|:\w+:<code>", re.MULTILINE)
LINK = re.compile(r'<a href="([^":#]+\.html)')


def public(name: str) -> Iterator[str]:
    """The names of a module and of all below it that have a page."""
    module = importlib.import_module(name)
    yield name
    below = [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}.")]
    shown = [child for child in below if not APART.match(child)]
    for child in shown:
        yield from public(child)
    _show(module, [child.rpartition(".")[2] for child in shown])


def _show(module: ModuleType, modules: list[str]) -> None:
    """List a package's modules on its page: pdoc takes `__all__` for the whole of what is there."""
    if hasattr(module, "__path__") and hasattr(module, "__all__"):
        module.__all__ = [*module.__all__, *(name for name in modules if name not in module.__all__)]


def _resolve_inherited_fields(module: ModuleType) -> None:
    """Resolve the annotations of a dataclass's `__init__` where each field is from.

    Those of inherited fields are strings in the names of another module; pdoc looks in the class's own only.
    """
    for thing in vars(module).values():
        if not (isinstance(thing, type) and thing.__module__ == module.__name__ and dataclasses.is_dataclass(thing)):
            continue
        taken = {field.name for field in dataclasses.fields(thing) if field.init}
        for parent in (parent for parent in reversed(thing.__mro__[1:]) if dataclasses.is_dataclass(parent)):
            home = sys.modules[parent.__module__]
            for name, hint in vars(parent).get("__annotations__", {}).items():
                if name in taken and name not in vars(thing).get("__annotations__", {}):
                    found = safe_eval_type(hint, vars(home), None, home, f"{parent.__qualname__}.{name}")
                    thing.__init__.__annotations__[name] = found


def _wrong(page: Path) -> Iterator[str]:
    """Full names on a page that are no links, and reStructuredText that was left as it is."""
    text = page.read_text(encoding="utf-8")
    for name in NO_LINK.findall(text):
        if not APART.match(name) and not FILES.match(name):
            yield f"`{name}`, which leads nowhere"
    yield from (f"{found!r}, which is no Markdown" for found in RAW.findall(text))
    yield from (
        f"a link to {link}, which is not there" for link in LINK.findall(text) if not (page.parent / link).exists()
    )


def main(folder: Path) -> None:
    """Build the pages in a folder; `SystemExit` or the first warning as an exception if something is wrong."""
    import proxytune

    doors = list(proxytune.__all__)
    for name in doors:
        setattr(proxytune, name, getattr(proxytune, name))  # pdoc does not ask a module's __getattr__
    names = [name for root in ROOTS for name in public(root)]
    pdoc.render.configure(docformat="google", search=True, show_source=True)
    warnings.simplefilter("error")
    for name in names:
        _resolve_inherited_fields(sys.modules[name])
    pdoc.pdoc(*ROOTS, output_directory=folder)
    first = (folder / "proxytune.html").read_text(encoding="utf-8")
    missing = [name for name in doors if f'id="{name}"' not in first]
    missing += [name for name in names if not (folder / f"{name.replace('.', '/')}.html").is_file()]
    if missing:
        raise SystemExit(f"API pages: expected a place for every public name; got none for {', '.join(missing)}.")
    wrong = [f"{page.relative_to(folder)}: {what}" for page in sorted(folder.rglob("*.html")) for what in _wrong(page)]
    if wrong:
        raise SystemExit("API pages: expected links and Markdown; got\n" + "\n".join(wrong))
    sys.stdout.write(f"{len(names)} pages in {folder}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python .ci/api_pages.py FOLDER")
    main(Path(sys.argv[1]))
