#!/usr/bin/env bash
# Triton 3.7.1: a kernel that reads a module's `tl.constexpr(float("nan"))` fails at each launch on a GPU, even the first,
# with "Global variable NAN has changed since we compiled this kernel": it is compared with `!=`, and NaN differs from
# itself. `float("nan")` inside the kernel works. Seen without a GPU: the driver below compiles for one and launches
# nothing, and Triton's check comes before the launch.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, Triton 3.7.1):
#   a global 1.0: launched
#   a global NaN: Global variable NAN has changed since we compiled this kernel, from constexpr[nan] to constexpr[nan]
#   NaN inside the kernel: launched
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 triton==3.7.1
cd "$work"
cat >kernels.py <<'PY'
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

ONE = tl.constexpr(1.0)
NAN = tl.constexpr(float("nan"))


@triton.jit
def one(out):
    tl.store(out, ONE)


@triton.jit
def nan(out):
    tl.store(out, NAN)


@triton.jit
def inside(out):
    tl.store(out, float("nan"))


class Utils:
    def load_binary(self, *_):
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}


class NoGpu(DriverBase):
    utils = Utils()

    def __init__(self):
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    is_active = classmethod(lambda cls: True)
    map_python_to_cpp_type = lambda self, ty: ty
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    get_benchmarker = lambda self: None
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0


driver.set_active(NoGpu())
said = {}
for name, kernel in (("a global 1.0", one), ("a global NaN", nan), ("NaN inside the kernel", inside)):
    try:
        kernel[(1,)](torch.zeros(1))
        said[name] = "launched"
    except RuntimeError as error:
        said[name] = str(error)
    print(f"{name}: {said[name]}")
assert said["a global 1.0"] == said["NaN inside the kernel"] == "launched"
assert "NAN has changed" in said["a global NaN"]
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" kernels.py 2>"$work/noise" || { cat "$work/noise" >&2; exit 1; }
