"""The pages say what is so: their code prints what they show, figures are on record, links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pages as generated
import pytest
import torch
from _pages.code import ROOT, blocks_of, pages, run_blocks, same, unseen
from _pages.records import load, weights

from proxytune import errors
from proxytune.formulas import FORMULAS

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
WITH_CODE = [name for name, page in PAGES.items() if blocks_of(page.read_text(encoding="utf-8"))]
LINK = re.compile(
    r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<picture>[^)\s]+)\)|src=\"(?P<src>[^\"]+)\""
)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """A page may change what holds for the whole process."""
    threads, formulas = torch.get_num_threads(), dict(FORMULAS)
    yield
    torch.set_num_threads(threads)
    FORMULAS.clear()
    FORMULAS.update(formulas)


# PEFT calls transformers by names that the newest version has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    for block, printed in run_blocks(PAGES[name], tmp_path):
        if block.shown is None:
            assert printed.strip() == "", f"{name}:{block.line} prints this, and the page does not show it"
        else:
            assert same(block.shown, printed), f"{name}:{block.line} shows\n{block.shown}\nand prints\n{printed}"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_is_one_that_runs(name: str) -> None:
    assert unseen(PAGES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "page",
    [
        "```bash\nx\n```\n",
        "```py\nx\n```\n",
        "```\nx\n```\n",
        "``` python\nx\n```\n",
        "```python title=x\nx\n```\n",
        "~~~python\nx\n~~~\n",
        "````python\nx\n````\n",
        "- item\n\n  ```python\n  x\n  ```\n",
        "- ```python\n  x\n  ```\n",
        "> ```python\n> x\n> ```\n",
        "```python\nx\n",
        "```python\nprint(1)\n```\n\n```text\n…\n```\n",
    ],
)
def test_a_block_that_would_not_run_is_noticed(page: str) -> None:
    assert unseen(page) != []
    assert unseen("```python\nprint(1)\n```\n\n```text\n1\n…\n```\n") == []


def test_every_generated_block_stands_on_a_page() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES.values()]
    assert {name for text in texts for name in re.findall(r"<!-- generated: ([\w-]+) -->", text)} == set(
        generated.BLOCKS
    )


def test_pages_of_an_environment_beside_the_code_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import _pages.code as code

    for name in ("README.md", "proxytune/README.md", "venv/lib/a/README.md", "build/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Page\n", encoding="utf-8")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    assert [page.relative_to(tmp_path).as_posix() for page in code.pages()] == ["README.md", "proxytune/README.md"]


def test_what_is_made_of_records_is_up_to_date() -> None:
    assert [str(file) for file, text in generated.files() if file.read_text(encoding="utf-8") != text] == []


def test_an_edited_figure_is_noticed() -> None:
    page = PAGES["README.md"].read_text(encoding="utf-8")
    position = page.index("<!-- end -->") - 2
    assert generated.filled(page[:position] + "9" + page[position:]) == page


def test_blocks_that_are_empty_as_yet_are_filled_one_by_one() -> None:
    page = "<!-- generated: lengths -->\n<!-- end -->\n\nText.\n\n<!-- generated: seeds -->\n\n<!-- end -->\n"
    text = generated.filled(page)
    assert text.count("<!-- end -->") == 2
    assert "<!-- end -->\n\nText.\n\n<!-- generated: seeds -->\n|" in text
    assert generated.filled(text) == text


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(SystemExit, match="nonsense"):
        generated.filled("<!-- generated: nonsense -->\n\n<!-- end -->")


def test_the_demo_s_figures_are_of_the_bundled_weights() -> None:
    assert len(weights()) == 4
    assert load("demo.json")["weights"] == weights()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as they are made by the sites that show Markdown."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(prose)}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = PAGES[name]
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        target = found["target"] or found["picture"] or found["src"]
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name} links to {target}"
        assert there.is_relative_to(ROOT), f"{name} links out of the checkout: {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{name} links to {target}"


def test_the_guide_has_a_cure_for_every_error() -> None:
    named = re.findall(r"^\| `(\w+)`", PAGES["GUIDE.md"].read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(errors.__all__) - {"ProxytuneError"})


def test_the_guide_leads_to_every_page() -> None:
    guide = PAGES["GUIDE.md"].read_text(encoding="utf-8")
    linked = {found["target"].partition("#")[0] for found in LINK.finditer(guide)}
    beside_code = {name for name in PAGES if name.endswith("README.md")} - {"findings/README.md"}
    assert beside_code - linked == set()


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a \nb\n", "a\nb \n\n", True),
        ("a\n", "b\n", False),
        ("a.\n", "ab\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\nd\n", "a\nb\nc\n", False),
        ("a…\n", "abc\n", False),
        ("", "a\n", False),
    ],
)
def test_what_is_shown_is_compared_line_by_line(shown: str, printed: str, equal: bool) -> None:
    assert same(shown, printed) is equal


@pytest.mark.parametrize(
    "code",
    [
        "```sh\nproxytune generate --no-such-option\n```\n",
        "```sh\nproxytune demo --no-such-option\n```\n",
        "```sh\nproxytune demo --problem 3\n```\n",
        "```sh\n.venv/bin/pytest tests/no_such_folder\n```\n",
        "```sh\n.venv/bin/python .ci/none.py\n```\n",
        "```sh\npython benches/bench_forks.py --Args\n```\n",
        "```sh\nproxytune nonsense\n```\n",
        "```sh\ncurl somewhere\n```\n",
        "```sh\npython benches/bench_none.py\n```\n",
        "```sh\npython benches/bench_forks.py --no-such-option\n```\n",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(code: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(code, encoding="utf-8")
    with pytest.raises(SystemExit, match="page.md:2"):
        list(run_blocks(page, tmp_path))


def test_blocks_share_their_names_and_their_folder(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfrom pathlib import Path\n\n_ = Path('a.txt').write_text('x')\nb = 2\n```\n\nThen:\n\n"
        "```python\nprint(b, Path('a.txt').read_text())\n```\n\n```text\n2 x\n```\n",
        encoding="utf-8",
    )
    (tmp_path / "in").mkdir()
    found = list(run_blocks(page, tmp_path / "in"))
    assert [(block.shown, printed) for block, printed in found] == [(None, ""), ("2 x\n", "2 x\n")]
    assert (tmp_path / "in" / "a.txt").exists()


def test_a_page_s_code_is_compiled_as_a_file_of_its_own(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n\n@dataclass\nclass A:\n"
        "    n: ClassVar[int] = 1\n\nprint(A(), A.__annotations__['n'] == ClassVar[int])\n```\n",
        encoding="utf-8",
    )
    assert [printed for _, printed in run_blocks(page, tmp_path)] == ["A() True\n"]
