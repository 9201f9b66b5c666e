"""`proxytune doctor` on this environment, and on made-up ones that are not supported."""

from __future__ import annotations

import hashlib
import json
import shutil
from email.message import Message
from importlib import metadata

import pytest
import torch
import transformers
from packaging.version import Version
from torch.torch_version import TorchVersion

from proxytune.cli import doctor
from proxytune.demo import bundle
from proxytune.ops import dispatch

# The same torch from two wheels, as its metadata and as `torch.__version__` name it: the CPU build says "+cpu" in both;
# the default wheel for Linux, a CUDA build, says "+cu130" in the second only.
WHEELS = {"installed": None, "cpu": ("2.13.0+cpu", "2.13.0+cpu"), "cuda": ("2.13.0", "2.13.0+cu130")}


@pytest.fixture(params=WHEELS)
def wheel(request, monkeypatch):
    """The installed torch, or one that names itself like one of the two wheels."""
    if WHEELS[request.param] is not None:
        distribution, module = WHEELS[request.param]
        real = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: distribution if name == "torch" else real(name))
        monkeypatch.setattr(torch, "__version__", TorchVersion(module))


@pytest.mark.smoke
def test_this_environment_is_supported(run, wheel):
    ended = run("doctor", "--json")
    report = json.loads(ended.out)
    assert ended.code == 0, report
    assert report["ok"] is True
    found = {finding["name"]: finding for finding in report["requirements"]}
    assert found["torch"]["version"] == metadata.version("torch")
    # Only the local part may differ between a distribution and its module.
    assert Version(found["torch"]["version"]).public == Version(torch.__version__).public
    assert found["transformers"]["version"] == transformers.__version__
    assert found["transformers"]["supported"] == ">=5.17, <5.25"
    assert found["python"]["supported"] == ">=3.11, <3.14"
    assert "pytest" not in found, "extras are not required"
    assert report["devices"][-1]["name"] == "cpu"
    assert report["implementation"] == ("triton" if torch.cuda.is_available() else "torch")
    if not torch.cuda.is_available():
        assert f"no GPU that torch {torch.__version__} can use" in report["note"], "the build, CPU or CUDA, counts here"


def test_the_tables_show_what_the_json_says(run):
    report = json.loads(run("doctor", "--json").out)
    printed = run("doctor").out
    for finding in report["requirements"]:
        assert finding["version"] in printed
    assert report["note"] in printed


@pytest.mark.parametrize(
    ("cuda", "reason", "implementation", "says"),
    [
        (False, "tensors on cpu", "torch", f"no GPU that torch {torch.__version__} can use"),
        (True, None, "triton", "fused Triton kernels on cuda"),
        (True, "no Triton in this environment", "torch", "no Triton in this environment"),
    ],
)
def test_it_says_which_implementation_would_run_and_why(monkeypatch, cuda, reason, implementation, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: reason)
    found, note = doctor._implementation()
    assert found == implementation
    assert says in note


def test_weights_are_hashed(family, run, monkeypatch):
    monkeypatch.setattr(bundle, "bundled_family", lambda: family)
    report = json.loads(run("doctor", "--json").out)
    assert [file["member"] for file in report["weights"]] == list(bundle.MEMBERS)
    content = (family / "tiny-base" / "model.safetensors").read_bytes()
    tiny = report["weights"][1]
    assert (tiny["bytes"], tiny["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_missing_weights_are_an_exit_code(family, run, monkeypatch, tmp_path):
    shutil.copytree(family, tmp_path / "f")
    (tmp_path / "f" / "tiny-tuned" / "model.safetensors").unlink()
    monkeypatch.setattr(bundle, "bundled_family", lambda: tmp_path / "f")
    ended = run("doctor", "--json")
    assert ended.code == 1
    assert [file["member"] for file in json.loads(ended.out)["weights"] if not file["ok"]] == ["tiny-tuned"]
    printed = run("doctor")
    assert printed.code == 1
    assert "missing" in printed.out
    assert printed.err == ""


def _metadata(**requirements):
    message = Message()
    message["Version"] = "9"
    message["Requires-Python"] = requirements.pop("python", ">=3.11")
    for line in requirements.values():
        message["Requires-Dist"] = line
    return lambda _: message


@pytest.mark.parametrize(
    ("line", "ok"),
    [
        ("torch>=2.11", True),
        ("torch<1", False),
        ("torch>=99", False),
        ("no-such-distribution>=1", False),
        ("no-such-distribution>=1; python_version < '3'", None),  # not required here
        ("no-such-distribution>=1; extra == 'plot'", None),
    ],
)
def test_a_version_is_held_against_the_metadata(monkeypatch, line, ok):
    monkeypatch.setattr(doctor.metadata, "metadata", _metadata(one=line))
    _, (python, *rest) = doctor._requirements("anything")
    assert python.ok
    assert [finding.ok for finding in rest] == ([] if ok is None else [ok])


@pytest.mark.parametrize("installed", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
@pytest.mark.parametrize(
    ("line", "ok"),
    [
        ("torch>=2.13.0", True),
        ("torch<=2.13.0", True),
        ("torch==2.13.0", True),  # the pin of constraints.txt: any build of that version
        ("torch>2.13.0", False),  # a local part makes no later version of it
        ("torch!=2.13.0", False),
        ("torch<2.13", False),
    ],
)
def test_the_local_part_of_a_version_never_decides_what_is_supported(monkeypatch, installed, line, ok):
    monkeypatch.setattr(metadata, "metadata", _metadata(one=line))
    monkeypatch.setattr(metadata, "version", lambda _: installed)
    _, (_, found) = doctor._requirements("anything")
    assert (found.version, found.ok) == (installed, ok)


def test_an_unsupported_python_is_an_exit_code(run, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "metadata", _metadata(python=">=4"))
    ended = run("doctor", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["requirements"][0]["ok"] is False


def test_without_an_installation_it_says_so(run, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", missing)
    ended = run("doctor")
    assert ended.code == 1
    assert "not installed" in ended.out
