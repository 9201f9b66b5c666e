"""Compile the Triton kernels for GPUs that are not here, and compare the result with a committed budget.

No GPU is needed, since `triton.compile` takes a target. Registers, spills, 16-byte loads, and K1's instructions per
column are counted in the machine code; their cost in time only a GPU can tell. More of any than in the budget, or fewer
wide loads, is a failure.

    python benches/kernels_budget.py            # print
    python benches/kernels_budget.py --check    # compare with benches/results/kernels_budget.json
    python benches/kernels_budget.py --write    # record this version of Triton
    python benches/kernels_budget.py --reads    # record how often a truncated draw reads its row (interpreter, minutes)
    python benches/kernels_budget.py --latency  # record the modelled time of a truncated draw (interpreter, seconds)

Each core compiles variants in a process of its own (`--jobs` says how many); the figures and their order do not depend
on it. `--target` compiles for one GPU alone, `--kernel` one kernel.

The interpreter must be off (`TRITON_INTERPRET` unset). Other versions of Triton: put them on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from _kernels.instructions import per_column
from proxytune_kernels.decide import resolve
from proxytune_kernels.distribution import LAW, laws_of
from proxytune_kernels.launch import AT_ONCE, FIRST, GROUP, PER_READ, PER_READ_MIX, TILE, registers, shape_of_mix
from proxytune_kernels.measure import FIELDS, steer_tiles
from proxytune_kernels.mix import mix_rows
from proxytune_kernels.verify import residue, settle
from proxytune_kernels.wide import resolve_wide
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results" / "kernels_budget.json"
ROW_READS = RESULTS.with_name("row_reads.json")
LATENCY = RESULTS.with_name("latency.json")
"""Modelled, see `_kernels.latency`; with the version of Triton whose interpreter ran."""
MODELLED = (32_000, 128_256)
MOST_ROW_READS = 3.0
"""Elements that one truncated draw may load, over the row's width."""
WIDTHS = (32_000, 128_256, 256_000)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The kernels' variants; flags that are not named are off.
TILES_VARIANTS: dict[str, dict[str, Any]] = {
    "statistics": {"dtypes": ("bf16",) * 3, "RAW": True, "MOMENTS": True, "KL": True},
    "draw alone": {"dtypes": ("bf16",) * 3, "MASS": True},
    "draw": {"dtypes": ("bf16",) * 3, "RAW": True, "MOMENTS": True, "MASS": True},
    "draw, statistics": {"dtypes": ("bf16",) * 3, "RAW": True, "MOMENTS": True, "MASS": True, "KL": True},
    "fork": {"dtypes": ("bf16",) * 3, "RAW": True, "MOMENTS": True, "MASS": True, "FORK": True},
    "truncated": {"dtypes": ("bf16",) * 3, "RAW": True, "MOMENTS": True, "MASS": True, "GROUPS": True},
    "scores": {"dtypes": ("bf16",) * 3, "SCORES": True},
    "plain model": {"dtypes": ("bf16",), "RAW": True, "MASS": True},
    "mixed": {"dtypes": ("fp32", "bf16", "fp16"), "RAW": True, "MOMENTS": True, "MASS": True},
    "per row": {"dtypes": ("bf16",) * 3, "PER_ROW": True, "RAW": True, "MOMENTS": True, "MASS": True},
    "five": {"dtypes": ("bf16",) * 5, "RAW": True, "MOMENTS": True, "MASS": True},
    "eight": {"dtypes": ("bf16",) * 8, "num_warps": 2, "RAW": True, "MOMENTS": True, "MASS": True},
    "offsets, floors, scores": {"dtypes": ("bf16",) * 3, "OFFSETS": True, "FLOORS": True, "SCORES": True},
    "eight, per row, offsets, floors": {
        "dtypes": ("bf16",) * 8, "num_warps": 2, "PER_ROW": True, "OFFSETS": True, "FLOORS": True, "RAW": True,
        "MOMENTS": True, "MASS": True,
    },
}  # fmt: skip
RESOLVE_VARIANTS: dict[str, dict[str, Any]] = {
    "argmax": {"num_warps": 4, "RAW": True, "MOMENTS": True, "KL": True, "ARGMAX": True, "ONE": True},
    "draw": {"num_warps": 4, "RAW": True, "MOMENTS": True, "SAMPLE": True, "ONE": True},
    "fork, n draws": {"num_warps": 4, "RAW": True, "MOMENTS": True, "SAMPLE": True, "FORK": True},
    "truncated": {"num_warps": 8, "RAW": True, "MOMENTS": True, "SAMPLE": True, "TRUNCATED": True, "ONE": True},
    "truncated, confidence": {
        "num_warps": 8, "RAW": True, "MOMENTS": True, "SAMPLE": True, "TRUNCATED": True, "CONFIDENCE": True,
    },
    "draw, offsets, floors": {
        "num_warps": 4, "OFFSETS": True, "FLOORS": True, "RAW": True, "MOMENTS": True, "SAMPLE": True, "ONE": True,
    },
    "truncated, eight, offsets, floors": {
        "dtypes": ("bf16",) * 8, "num_warps": 8, "OFFSETS": True, "FLOORS": True, "RAW": True, "MOMENTS": True,
        "SAMPLE": True, "TRUNCATED": True, "ONE": True,
    },
}  # fmt: skip
MIX_VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtypes": ("bf16",), "D": 4096},
    "bf16, soft, noise": {"dtypes": ("bf16",), "D": 4096, "SOFT": True, "NOISE": True},
    "fp16, soft": {"dtypes": ("fp16",), "D": 4096, "SOFT": True},
    "fp32, soft, noise": {"dtypes": ("fp32",), "D": 4096, "SOFT": True, "NOISE": True},
    "bf16, D=768, noise": {"dtypes": ("bf16",), "D": 768, "NOISE": True},
    "bf16, D=8192, soft, noise": {"dtypes": ("bf16",), "D": 8192, "SOFT": True, "NOISE": True},
    "bf16, D=16384": {"dtypes": ("bf16",), "D": 16384},
}
LAWS_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_warps": 4},
    "fork": {"num_warps": 4, "FORK": True},
    "truncated": {"num_warps": 8, "TRUNCATED": True},
    "draft, truncated": {"dtypes": ("bf16",), "num_warps": 8, "TRUNCATED": True},
    "truncated, eight, offsets, floors": {
        "dtypes": ("bf16",) * 8, "num_warps": 8, "OFFSETS": True, "FLOORS": True, "TRUNCATED": True,
    },
}  # fmt: skip
RESIDUE_VARIANTS: dict[str, dict[str, Any]] = {
    "drawn": {"num_warps": 1},
    "drawn, truncated": {"num_warps": 1, "TRUNCATED": True},
    "given": {"num_warps": 1, "GIVEN": True},
    "drawn, eight, offsets, floors": {"dtypes": ("bf16",) * 8, "num_warps": 2, "OFFSETS": True, "FLOORS": True},
}
SETTLE_VARIANTS: dict[str, dict[str, Any]] = {
    "drawn": {"num_warps": 4},
    "drawn, fork, truncated": {"num_warps": 4, "FORK": True, "TRUNCATED": True},
    "given, truncated": {"num_warps": 4, "GIVEN": True, "TRUNCATED": True},
    "drawn, truncated, eight, offsets, floors": {
        "dtypes": ("bf16",) * 8, "num_warps": 8, "OFFSETS": True, "FLOORS": True, "TRUNCATED": True,
    },
}  # fmt: skip
WIDE_VARIANTS: dict[str, dict[str, Any]] = {
    "draw": {"num_warps": 8, "KEYS": True},
    "distribution": {"num_warps": 8},
    "draft": {"dtypes": ("bf16",), "num_warps": 8},
    "draw, 256 k columns": {"num_warps": 8, "KEYS": True, "RUNS_PADDED": 128},
    "draw, eight, offsets, floors": {
        "dtypes": ("bf16",) * 8, "num_warps": 8, "OFFSETS": True, "FLOORS": True, "KEYS": True,
    },
}  # fmt: skip
KERNELS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "steer_tiles": (steer_tiles, TILES_VARIANTS),
    "resolve": (resolve, RESOLVE_VARIANTS),
    "mix_rows": (mix_rows, MIX_VARIANTS),
    "laws_of": (laws_of, LAWS_VARIANTS),
    "residue": (residue, RESIDUE_VARIANTS),
    "settle": (settle, SETTLE_VARIANTS),
    "resolve_wide": (resolve_wide, WIDE_VARIANTS),
}
_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_POINTERS = {
    "top_k": "i32", "seed": "i64", "stream": "i64", "position": "i64", "branch": "i64", "live_groups": "i32",
    "block_ids": "i32", "argmax": "i64", "kept": "i64", "fork": "i1", "tokens": "i64", "ids": "i64",
    "soft": "i1", "bounds": "i32", "draft_bounds": "i32", "drafted": "i64", "accepted_out": "i64",
    "store": "i64",
}  # fmt: skip
_SIZES = {
    "V", "inside", "tiles", "scores_stride", "rows", "n_groups", "draws", "D", "K", "stride", "V_draft", "each", "runs",
}  # fmt: skip
_MULTIPLES = {"V", "V_draft", "inside", "scores_stride", "D", "stride"}


def compile_kernel(fn: Any, variant: dict[str, Any], target: GPUTarget) -> Any:
    """Compile one variant as a launch would specialise it for a vocabulary, or a width, divisible by 16.

    `variant` has the dtypes of the members or of the table, `num_warps` or D, and flags. FLOORS has the base read once
    more, as the member that has the floor.
    """
    variant = dict(variant)
    dtypes = variant.pop("dtypes", ("bf16",) * 3)
    block, warps = shape_of_mix(variant.pop("D", 512))
    warps = variant.pop("num_warps", warps)
    fixed = {
        "M": len(dtypes), "TILE": TILE, "GROUP": GROUP, "FIELDS": len(FIELDS), "PER_READ": PER_READ, "AT_ONCE": AT_ONCE,
        "TILES_PADDED": 128, "GROUPS_PADDED": 1024, "RUNS_PADDED": 64, "K_PADDED": 8, "LAW": len(LAW),
    }  # fmt: skip
    if fn is mix_rows:
        fixed |= {"BLOCK": block, "PER_READ": PER_READ_MIX, "FIRST": FIRST}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    multiple = [["tt.divisibility", 16]]
    for i, (name, parameter) in enumerate(inspect.signature(fn.fn).parameters.items()):
        if "constexpr" in str(parameter.annotation):
            signature[name] = "constexpr"
            constants[name] = variant.get(name, fixed.get(name, False))
        elif name in ("members", "strides", "widths"):
            read = (*dtypes, dtypes[0]) if variant.get("FLOORS") else dtypes
            signature[name] = tuple(f"*{d}" if name == "members" else "i32" for d in read)
            aligned |= {(i, j): multiple for j in range(len(read))}
        elif name in ("offsets", "floors") and not variant.get(name.upper()):
            signature[name], constants[name] = "constexpr", None
        elif name in ("draft", "draft_strides", "draft_widths"):
            signature[name] = (f"*{dtypes[0]}" if name == "draft" else "i32",)
            aligned[(i, 0)] = multiple
        elif name == "weights" and fn is not mix_rows and not variant.get("PER_ROW"):
            signature[name] = ("fp32",) * len(dtypes)
        elif name in _SIZES:
            signature[name] = "i32"
            if name in _MULTIPLES:
                aligned[(i,)] = multiple
        elif name == "sigma":
            signature[name] = "fp32"
        else:
            in_dtype = fn is mix_rows and name in ("table", "out")
            signature[name] = f"*{dtypes[0] if in_dtype else _POINTERS.get(name, 'fp32')}"
            aligned[(i,)] = multiple
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if target.backend == "cuda" and (fn is resolve_wide or (fn in (resolve, laws_of) and variant.get("TRUNCATED"))):
        options["maxnreg"] = registers(constants.get("RUNS_PADDED", 1))
    return triton.compile(source, target=target, options=options)


def count(kernel: Any, dtypes: Sequence[str] = ()) -> dict[str, Any]:
    """Count the relevant instructions in the machine code.

    Args:
        kernel: What `compile_kernel` gives.
        dtypes: Of K1's members; none for other kernels.

    Returns:
        "registers" per thread, "spills" (instructions that move registers to local memory and back; for AMD the vector
        registers spilled, and "scalar_spills" for the scalar ones, which go to vector registers), "wide_loads" of 16
        bytes, and "fused" multiply-adds of float32. Of K1 also "per_column": instructions per column of a full tile of
        finite logits, which takes the shortest way.
    """
    columns = TILE // (kernel.metadata.num_warps * kernel.metadata.target.warp_size)

    def shortest(code: str) -> dict[str, float]:
        return {"per_column": per_column(code, columns, columns * sum(_SIZE[d] for d in dtypes))} if dtypes else {}

    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

        return {
            "registers": field("vgpr_count"),
            "spills": field("vgpr_spill_count"),
            "scalar_spills": field("sgpr_spill_count"),
            "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
            "fused": len(re.findall(r"v_(?:pk_)?fma(?:c|ak|mk)?_f32", text)),
            **shortest(text),
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code)
    short = collections.Counter(name.split(".")[0] for name in names)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spills": short["STL"] + short["LDL"],
        "wide_loads": sum(name.startswith("LDG") and ".128" in name for name in names),
        "fused": short["FFMA"],
        **shortest(code),
    }


def count_one(place: tuple[str, str, str]) -> dict[str, Any]:
    """Compile one variant and count.

    Args:
        place: Names of the target, the kernel and the variant.

    Returns:
        What `count` gives.
    """
    target, kernel, variant = place
    fn, variants = KERNELS[kernel]
    read = variants[variant].get("dtypes", ()) if fn is steer_tiles else ()
    return count(compile_kernel(fn, variants[variant], TARGETS[target]), read)


def measure(
    targets: Sequence[str] = tuple(TARGETS), jobs: int = 1, kernels: Sequence[str] = tuple(KERNELS)
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compile everything, each variant once.

    Args:
        targets: Names of the GPUs.
        jobs: How many processes compile; the result is the same for any number.
        kernels: Names of the kernels.

    Returns:
        Target → kernel and variant → counts, in the order of the tables above.
    """
    places = [(target, kernel, variant) for target in targets for kernel in kernels for variant in KERNELS[kernel][1]]
    if jobs == 1:
        counts = list(map(count_one, places))
    else:
        # Fresh processes: a fork would copy torch's locks, but not the threads that hold them.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            counts = list(pool.map(count_one, places))
    found: dict[str, dict[str, dict[str, Any]]] = {target: {} for target in targets}
    for (target, kernel, variant), one in zip(places, counts, strict=True):
        found[target][f"{kernel}: {variant}"] = one
    return found


def excesses(found: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """A line for each count in `found` that exceeds `budget` (both as `measure` returns them)."""
    lines = []
    for target, variants in found.items():
        for variant, counts in variants.items():
            allowed = budget.get(target, {}).get(variant)
            if allowed is None:
                lines.append(f"{target}, {variant}: not in the budget; run with --write")
                continue
            for name, value in counts.items():
                worse = value < allowed[name] if name == "wide_loads" else value > allowed[name]
                if worse:
                    lines.append(f"{target}, {variant}: {value} {name}, the budget is {allowed[name]}")
    return lines


def too_many_reads(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each draw, by width and name, that loads more than the aim; see `_kernels.row_reads`."""
    return [
        f"V = {width}, {name}: {sum(reads.values()):.2f} row reads, the budget is {MOST_ROW_READS}"
        for width, cases in found.items()
        for name, reads in cases.items()
        if sum(reads.values()) > MOST_ROW_READS
    ]


def record_reads() -> list[str]:
    """Count row reads in Triton's interpreter and record them; what `too_many_reads` says of them."""
    found = _interpreted("_kernels.row_reads", WIDTHS)
    ROW_READS.write_text(json.dumps(found, indent=1) + "\n")
    return too_many_reads(found)


def measure_latency() -> dict[str, Any]:
    """The modelled time of a truncated draw by width and kernel, and the share of a copy's bandwidth."""
    return {"triton": triton.__version__, **_interpreted("_kernels.latency", MODELLED)}


def longer(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """A line for each kernel that the model gives more time than recorded; both as `measure_latency` returns them."""
    return [
        f"V = {width}, {kernel}: {of['µs']} µs modelled, the record is {recorded['decision'][width][kernel]['µs']}"
        for width, kernels in found["decision"].items()
        for kernel, of in kernels.items()
        if of["µs"] > recorded["decision"][width][kernel]["µs"]
    ]


def _interpreted(module: str, widths: Sequence[int]) -> Any:
    """What a script prints as JSON, run in Triton's interpreter in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, widths)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=RESULTS.parents[1], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where the committed budget is exceeded")
    parser.add_argument("--write", action="store_true", help="record the figures of this version of Triton")
    parser.add_argument(
        "--reads", action="store_true", help="record the row reads of truncated draws, and compile nothing"
    )
    parser.add_argument(
        "--latency", action="store_true", help="record the modelled time of a truncated draw, and compile nothing"
    )
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU alone (default: for all)")
    parser.add_argument("--kernel", choices=KERNELS, help="compile this kernel alone (default: all)")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes that compile (default: one per core)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected a positive number of processes; got {arguments.jobs}")
    if arguments.write and arguments.target:
        parser.error(f"--write: expected all targets; got --target {arguments.target}. Leave --target out.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it", file=sys.stderr)
        return 2
    if arguments.reads:
        lines = record_reads()
        print("\n".join(lines) or f"row reads: within the budget, see {ROW_READS}")
        return bool(lines)
    if arguments.latency:
        LATENCY.write_text(json.dumps(measure_latency(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    targets = [arguments.target] if arguments.target else list(TARGETS)
    found = measure(targets, arguments.jobs, [arguments.kernel] if arguments.kernel else list(KERNELS))
    for target, variants in found.items():
        for variant, counts in variants.items():
            print(f"{triton.__version__:8} {target:7} {variant:34} {counts}")
    if arguments.write:
        kept = recorded.get(triton.__version__, {}) if arguments.kernel else {}
        recorded[triton.__version__] = {target: kept.get(target, {}) | of for target, of in found.items()}
        RESULTS.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
    if arguments.check:
        if triton.__version__ not in recorded:
            print(f"no budget for Triton {triton.__version__}; run with --write", file=sys.stderr)
            return 2
        lines = excesses(found, recorded[triton.__version__])
        lines += too_many_reads(json.loads(ROW_READS.read_text()))
        latency = json.loads(LATENCY.read_text(encoding="utf-8"))
        # The model is of an H200, and of the operations that this Triton's interpreter has.
        if "sm_90" in targets and latency["triton"] == triton.__version__:
            lines += longer(measure_latency(), latency)
        print("\n".join(lines) or f"Triton {triton.__version__}: within the budget")
        return bool(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
