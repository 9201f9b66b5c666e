"""What is installed and built: names, versions, the exception tree, and the content of the wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from _pages.code import pages

import proxytune
from proxytune import errors

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_a_plain_folder():
    # A package of that name would shadow Hugging Face's `kernels`, which transformers imports.
    assert (ROOT / "kernels" / "proxytune_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.smoke
def test_the_installation_imports_from_anywhere(tmp_path):
    program = "import proxytune_kernels, proxytune, proxytune.demo, proxytune.cli; print(proxytune.__version__)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == proxytune.__version__


@pytest.mark.smoke
def test_version_strings_agree():
    assert metadata.version("proxytune") == proxytune.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == proxytune.__version__


@pytest.mark.smoke
@pytest.mark.parametrize("name", proxytune.__all__)
def test_public_names_are_there_and_documented(name):
    thing = getattr(proxytune, name)
    assert name in dir(proxytune)
    if name != "__version__":
        assert inspect.getdoc(thing)
        assert thing.__module__.startswith("proxytune.")


def test_the_table_of_contents_lists_the_doors_once():
    table = re.findall(r"^- `(\w+)`: ", proxytune.__doc__, re.MULTILINE)
    assert sorted([*table, "__version__"]) == sorted(proxytune.__all__)
    source = ast.parse((ROOT / "proxytune" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    typed = {alias.name: f"{node.module}" for node in block.body for alias in node.names}
    assert typed == proxytune._HOME  # what type checkers see is what is imported


DOTTED = re.compile(r"(?<![\w./])proxytune(?:\.[A-Za-z_]\w*)+")


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_dotted_name_that_texts_mention_exists():
    texts = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
    for folder in ("proxytune", "kernels", "benches"):
        for source in (ROOT / folder).rglob("*.py"):
            texts[str(source.relative_to(ROOT))] = source.read_text(encoding="utf-8")
    named = {(file, found) for file, text in texts.items() for found in DOTTED.findall(text)}
    assert len(named) > 300
    assert [(file, name) for file, name in sorted(named) if not _resolves(name)] == []


# Until an index has the package, it is installed from a checkout: `pip install .`, `pip install '.[plot]'`.
FROM_AN_INDEX = re.compile(
    r"""\bpip3?\ install (?:\s+ -\S+ (?:\s+ [\w./-]+\.txt)?)* \s+ ['"]? proxytune (?![\w/.-])""", re.VERBOSE
)


def test_no_text_installs_the_package_from_an_index():
    for line in ("install proxytune", "install -q 'proxytune[plot]'", 'install -c constraints.txt "proxytune[eval]"'):
        assert FROM_AN_INDEX.search(f"`pip {line}`")
    for line in ("install .", "install '.[plot]' in the checkout of proxytune", "install peft"):
        assert not FROM_AN_INDEX.search(f"`pip {line}`")
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh"}
    texts = [ROOT / ".ci" / "run", *(path for path in ROOT.glob("*") if path.suffix in kinds)]
    for folder in ("proxytune", "kernels", "benches", "tests", "findings"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    texts = [path for path in texts if path.is_file() and path != Path(__file__)]
    assert len(texts) > 300
    assert [str(path) for path in texts if FROM_AN_INDEX.search(path.read_text(encoding="utf-8"))] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = proxytune.nothing_of_the_kind


# `import proxytune` in a fresh process: in this one, other tests have imported the modules.
def _fresh(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_every_home_is_there_after_a_plain_import(monkeypatch):
    homes = {f"proxytune.{name}" for name in proxytune._MODULES}
    # Those that the table of contents names, and a name in each.
    homes |= set(DOTTED.findall(proxytune.__doc__))
    assert {"proxytune.voting", "proxytune.methods.forks.ForkThreshold", "proxytune.ops.Noise"} <= homes
    for package in ("methods", "stats", "costs", "generation"):
        files = (ROOT / "proxytune" / package).iterdir()
        names = {file.stem for file in files if (file / "__init__.py").is_file() or file.suffix == ".py"}
        homes |= {f"proxytune.{package}.{name}" for name in names - {"__init__"}}
    for home in sorted(homes):
        found = proxytune
        for part in home.split(".")[1:]:
            # A package gets a submodule as an attribute once it is imported, which many tests do.
            held = vars(found).get(part)
            if inspect.ismodule(held):
                monkeypatch.delattr(found, part)
            found = getattr(found, part)
            assert held is None or found is held, home
    ran = _fresh("import proxytune; proxytune.budget.TokenLedger, proxytune.voting.vote, proxytune.stats.coverage")
    assert ran.returncode == 0, ran.stderr
    assert set(proxytune._MODULES) <= set(dir(proxytune))


WRONG = [
    ("wrapp", "Did you mean wrap?"),
    ("Wrap", "Did you mean wrap?"),
    ("ForkDecodign", "Did you mean ForkDecoding?"),
    ("votting", "Did you mean voting?"),
    ("ForkThreshold", "It is in proxytune.methods.forks: from proxytune.methods.forks import ForkThreshold"),
    ("ForkTreshold", "Did you mean proxytune.methods.forks.ForkThreshold?"),
    ("SamplingParams", "It is in proxytune.ops: from proxytune.ops import SamplingParams"),
    ("TokenLedger", "It is in proxytune.budget: from proxytune.budget import TokenLedger"),
    ("InputError", "It is in proxytune.errors: from proxytune.errors import InputError"),
    ("bundled", "It is in proxytune.demo: from proxytune.demo import bundled"),
    ("Ensemble", "It is in proxytune.models.ensemble: from proxytune.models.ensemble import Ensemble"),
]


@pytest.mark.parametrize(("name", "said"), WRONG)
def test_a_wrong_name_says_where_the_right_one_is(name, said):
    with pytest.raises(AttributeError) as asked:
        getattr(proxytune, name)
    assert str(asked.value) == f"module 'proxytune' has no attribute '{name}'. {said}"
    assert not hasattr(proxytune, name)


def test_a_wrong_name_imports_nothing_and_is_corrected_once():
    program = "import sys, proxytune\nassert not hasattr(proxytune, 'ForkThreshold')\n"
    ran = _fresh(program + "assert 'torch' not in sys.modules\nproxytune.wrapp")
    assert ran.returncode == 1
    assert (
        ran.stderr.splitlines()[-1] == "AttributeError: module 'proxytune' has no attribute 'wrapp'. Did you mean wrap?"
    )
    ran = _fresh("from proxytune import cli, throughput, validation, nothing_of_the_kind")
    assert ran.stderr.splitlines()[-1].startswith("ImportError: cannot import name 'nothing_of_the_kind'")


def test_importing_the_package_imports_neither_torch_nor_transformers():
    program = "import sys, proxytune; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def _drawn_tree(docstring: str) -> dict[str, str | None]:
    """Read the drawing: class name → parent name."""
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in docstring.split("```")[1].splitlines():
        found = re.match(r"^([ │├└─]*)([A-Z]\w+)", line)
        if not found:
            continue
        depth, name = len(found[1]), found[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[name] = stack[-1][1] if stack else None
        stack.append((depth, name))
    return parents


def test_the_drawn_exception_tree_is_the_real_one():
    drawn = _drawn_tree(errors.__doc__)
    assert sorted(drawn) == sorted(errors.__all__)
    for name, parent in drawn.items():
        cls = getattr(errors, name)
        if parent is not None:
            assert cls.__bases__[0] is getattr(errors, parent), name
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.VocabularyWarning, UserWarning)
    assert not issubclass(errors.VocabularyWarning, errors.ProxytuneError)


def test_every_error_says_expected_got_and_remedy():
    for name in errors.__all__:
        cls = getattr(errors, name)
        if issubclass(cls, errors.ProxytuneError):
            error = cls.of("thing", expected="a", got="b", remedy="Do c.")
            assert type(error) is cls
            assert str(error) == "thing: expected a; got b. Do c."


def test_pins_lie_inside_the_supported_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [
        Requirement(line) for line in [*project["dependencies"], *extras["test"], *extras["lint"], *extras["docs"]]
    ]
    pins = _pins("constraints.txt")
    for requirement in required:
        pinned = pins[_normal(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} and {pinned}"
    oldest = _pins("constraints-oldest.txt")
    newest_line, oldest_line = (".".join(of["transformers"].split(".")[:2]) for of in (pins, oldest))
    supported = next(r.specifier for r in required if r.name == "transformers")
    assert f">={oldest_line}" in str(supported), "the oldest pin is the lower bound"
    assert supported.contains(f"{newest_line}.99"), "the newest pin is the last minor below the ceiling"
    major, minor = newest_line.split(".")
    assert not supported.contains(f"{major}.{int(minor) + 1}.0")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {_normal(n): v for n, _, v in (line.partition("==") for line in lines if line and not line.startswith("#"))}


def _build(kind: str, source: Path, folder: Path) -> Path:
    """Build by the build backend alone: no environment is made and nothing downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of this checkout, unpacked."""
    built = _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built) as archive:
        archive.extractall(unpacked, filter="data")
    return unpacked / f"proxytune-{proxytune.__version__}"


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request, tmp_path_factory) -> zipfile.ZipFile:
    """A wheel from this checkout, and one from its source distribution, as an index would build it."""
    source = ROOT if request.param == "checkout" else request.getfixturevalue("sdist")
    return zipfile.ZipFile(_build("wheel", source, tmp_path_factory.mktemp("wheel")))


def test_the_source_distribution_can_be_tested(sdist):
    files = ("README.md", "GUIDE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
    for name in (*files, "constraints.txt", "constraints-oldest.txt", "pyproject.toml"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
    sources = [
        source
        for folder in ("tests", "benches", "kernels/proxytune_kernels")
        for source in (ROOT / folder).rglob("*.py")
    ]
    sources += [*pages(), *(ROOT / "findings").iterdir(), ROOT / ".ci" / "run"]  # read by tests, or linked
    for source in sources:
        assert (sdist / source.relative_to(ROOT)).is_file(), source


def test_the_wheel_holds_every_module_and_neither_tests_nor_pages(wheel):
    names = set(wheel.namelist())
    for source in (ROOT / "proxytune").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names
    assert {
        "proxytune/py.typed",
        "proxytune/view/report.css",
        *(f"proxytune/view/page.{kind}" for kind in ("html", "css", "js")),
    } <= names
    assert "proxytune_kernels/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "benches/", "findings/"))]
    assert not [name for name in names if name.endswith(("README.md", ".sh", ".png"))]


def test_the_wheel_holds_the_bundled_weights_byte_for_byte(wheel):
    weights = ROOT / "proxytune" / "demo" / "weights"
    files = [path for path in weights.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.name == "model.safetensors"} == {
        "large-base",
        "tiny-base",
        "tiny-tuned",
        "large-tuned",
    }
    for path in files:
        assert wheel.read(path.relative_to(ROOT).as_posix()) == path.read_bytes()


def test_the_wheel_names_its_command_and_licence(wheel):
    info = f"proxytune-{proxytune.__version__}.dist-info"
    assert b"proxytune = proxytune.__main__:main" in wheel.read(f"{info}/entry_points.txt")
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    found = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {proxytune.__version__}" in found
    assert "Requires-Python: <3.14,>=3.11" in found


def test_the_whole_package_imports():
    modules = sorted((ROOT / "proxytune").rglob("*.py"))
    assert modules
    for source in modules:
        parts = source.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
