"""A family of untrained models, and the command line as a user meets it: words in, an exit code and two texts out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.family.family import Architecture, save_member
from lab.family.tokenizer import build_tokenizer

from proxytune.cli import main
from proxytune.demo.bundle import MEMBERS
from proxytune.demo.world import build_world

ALPHA = 0.75


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, object]]:
        """The output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random models with the lab's tokenizer: their answers mean nothing, but each differs from the others'."""
    folder = tmp_path_factory.mktemp("family")
    tokenizer = build_tokenizer(build_world())
    for seed, member in enumerate(MEMBERS):
        shape = Architecture(48, 2, 2, 64) if member.startswith("large") else Architecture(32, 1, 2, 48)
        model = shape.build(len(tokenizer), seed)
        # Fresh Llamas hardly differ in their logits; larger weights make the shift change tokens.
        for parameter in model.parameters():
            parameter.data *= 4.0
        save_member(folder / member, model, tokenizer)
    (folder / "family.json").write_text(json.dumps({"alpha": ALPHA}))
    return folder


@pytest.fixture
def members(family: Path) -> list[str]:
    """The options that name the three models."""
    return [
        *("--base", str(family / "large-base")),
        *("--expert", str(family / "tiny-tuned")),
        *("--antiexpert", str(family / "tiny-base")),
    ]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command line in this process."""

    def call(*words: object) -> Ended:
        capsys.readouterr()  # what the fixtures printed is not the command's
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, captured.out, captured.err)

    return call
