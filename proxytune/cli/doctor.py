"""`proxytune doctor`: what is installed, which devices there are, and whether proxytune supports them."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import terminal

__all__ = ["Device", "Finding", "Report", "WeightFile", "doctor", "examine"]


@dataclass(frozen=True)
class Finding:
    """One requirement (`python` or a distribution), the installed version (None if missing) and the supported range.

    The version is the distribution's: torch's default wheel for Linux calls itself 2.13.0 there, and 2.13.0+cu130 in
    `torch.__version__`.
    """

    name: str
    version: str | None
    supported: str
    ok: bool


@dataclass(frozen=True)
class Device:
    """One device that torch can compute on, named as in `device_map`, with its make, threads or memory."""

    name: str
    description: str


@dataclass(frozen=True)
class WeightFile:
    """One bundled weight file; `bytes` and `sha256` are None if it is missing."""

    member: str
    bytes: int | None
    sha256: str | None
    ok: bool


@dataclass(frozen=True)
class Report:
    """All findings.

    Attributes:
        proxytune: The installed version; None if not installed, where the supported ranges are unknown.
        devices: Where it can run, best first.
        implementation: "triton" or "torch": what combines the logits.
        note: The reason for it.
    """

    proxytune: str | None
    requirements: tuple[Finding, ...]
    devices: tuple[Device, ...]
    implementation: str
    note: str
    weights: tuple[WeightFile, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is installed and supported."""
        return self.proxytune is not None and all(f.ok for f in self.requirements) and all(w.ok for w in self.weights)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, devices and bundled weights; exit with 1 if something is unsupported or missing."""
    report = examine()
    if as_json:
        typer.echo(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def examine() -> Report:
    """Examine this process's environment; nothing is changed or downloaded."""
    version, requirements = _requirements("proxytune")
    implementation, note = _implementation()
    return Report(
        proxytune=version,
        requirements=requirements,
        devices=_devices(),
        implementation=implementation,
        note=note,
        weights=_weights(),
    )


def _implementation() -> tuple[str, str]:
    """The implementation that a decoding step uses by default, and why."""
    import torch

    from proxytune.ops import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dispatch.choose("auto", device)
    if chosen == "triton":
        return chosen, f"decoding steps run in fused Triton kernels on {device}"
    # With its local part, "+cpu" or "+cu130", which the installed version above can lack: a CPU build finds no GPU.
    no_gpu = f"no GPU that torch {torch.__version__} can use"
    reason = no_gpu if device.type == "cpu" else dispatch.why_not_triton(device.type)
    return chosen, f"decoding steps run as torch operations: {reason}"


def _requirements(distribution: str) -> tuple[str | None, tuple[Finding, ...]]:
    """A distribution's version and its requirements, extras left out."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    def finding(name: str, version: str | None, supported: SpecifierSet) -> Finding:
        inside = version is not None and supported.contains(version, prereleases=True)
        return Finding(name, version, ", ".join(sorted(map(str, supported), reverse=True)), inside)

    try:
        own = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return None, ()
    findings = [finding("python", platform.python_version(), SpecifierSet(own["Requires-Python"] or ""))]
    for line in own.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            findings.append(finding(requirement.name, _version_of(requirement.name), requirement.specifier))
    return own["Version"], tuple(findings)


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[Device, ...]:
    import torch

    found = [
        Device(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {_memory(index):.0f} GiB")
        for index in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append(Device("mps", platform.machine()))
    return (*found, Device("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"))


def _memory(index: int) -> float:
    """A CUDA device's memory, in GiB."""
    import torch

    return torch.cuda.get_device_properties(index).total_memory / 2**30


def _weights() -> tuple[WeightFile, ...]:
    from proxytune.demo.bundle import MEMBERS, bundled

    return tuple(_weight_file(member, Path(bundled(member)) / "model.safetensors") for member in MEMBERS)


def _weight_file(member: str, file: Path) -> WeightFile:
    if not file.is_file():
        return WeightFile(member, None, None, ok=False)
    content = file.read_bytes()
    return WeightFile(member, len(content), hashlib.sha256(content).hexdigest(), ok=True)


def _print(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    def verdict(ok: bool) -> Text:
        return Text("ok", style="green") if ok else Text("NO", style="bold red")

    console = terminal.output()
    console.print(f"proxytune {report.proxytune or 'is not installed here: no supported ranges are on record'}")
    if report.requirements:
        table = Table("", "installed", "supported", "")
        for finding in report.requirements:
            table.add_row(finding.name, finding.version or "missing", finding.supported, verdict(finding.ok))
        console.print(table)
    table = Table("device", "")
    for device in report.devices:
        table.add_row(device.name, device.description)
    console.print(table)
    console.print(f"implementation: {report.implementation} ({report.note})", soft_wrap=True)
    table = Table("bundled weights", "KiB", "sha256", "")
    for file in report.weights:
        size = "missing" if file.bytes is None else f"{file.bytes / 1024:.0f}"
        table.add_row(file.member, size, (file.sha256 or "")[:16], verdict(file.ok))
    console.print(table)
