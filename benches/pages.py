"""Fill the pages' generated blocks from the records and draw the picture, or check that both are up to date.

::

    python benches/pages.py --measure       run the demo and the README's code again, and keep the results
    python benches/pages.py --write         fill the blocks of every page, and draw the picture
    python benches/pages.py --check         exit with 1 if a block differs from what --write would make
    python benches/pages.py --run PAGE …    run the code of pages, and write what it prints below it

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; `BLOCKS` says what it is made of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from _forks import report as forks
from _latent import report as latent
from _pages import demo, formulas, layers
from _pages.code import pages, with_outputs
from _pages.families import families_block
from _pages.picture import drawn
from _pages.records import RESULTS, ROOT, keep, load, weights, wrapped

BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURE = RESULTS / "steered.svg"


def of(record: str, block: Callable[..., str] | str, **settings: Any) -> Callable[[], str]:
    """A block that a function makes of a record; that of a bench, "module:function", is imported where it is needed."""
    return lambda: wrapped((resolve_name(block) if isinstance(block, str) else block)(load(record), **settings))


BLOCKS: dict[str, Callable[[], str]] = {
    "families": lambda: wrapped(families_block()),
    "quickstart": demo.quickstart,
    "small-table": demo.small_table,
    "table": demo.table,
    "losses": demo.losses,
    "seeds": demo.seeds,
    "alpha-sweep": demo.sweep,
    "kernels": of("kernels.json", "bench_kernels:kernels_table"),
    "kernel-losses": of("kernels.json", "bench_kernels:all_losses"),
    "memory": of("memory.json", "bench_memory:memory_block"),
    "scoring": of("memory.json", "bench_memory:scoring_block"),
    "cost": of("throughput.json", "bench_throughput:cost_table"),
    "throughput": of("throughput.json", "bench_throughput:throughput_table"),
    "speculation": of("throughput.json", "bench_throughput:speculation_table"),
    "layers": lambda: wrapped(layers.layers_block()),
    "formulas": of("formulas.json", formulas.formulas_block),
    "hybrids": of("hybrids.json", "bench_hybrids:hybrids_table"),
    "report": of("report.json", "bench_report:report_table"),
    "trace": of("trace.json", "bench_trace:trace_table"),
    "overlap": of("overlap.json", "bench_overlap:overlap_table"),
    "lora": of("lora.json", "bench_lora_pair:lora_table"),
    "gate": of("gate.json", "bench_gate:gate_table"),
    # bench_forks.py
    "forks": of("forks.json", forks.forks_block),
    "fork-detection": of("forks.json", forks.detection_block),
    "two-temperatures": of("forks.json", forks.countdown_block, methods=(forks.TEMPERATURES,)),
    "tree-votes": of("forks.json", forks.votes_block),
    "tree-countdown": of("forks.json", forks.countdown_block, methods=forks.TREES),
    "lengths": of("forks.json", forks.lengths_block),
    "confidence": of("forks.json", forks.confidence_block),
    "allocation": of("forks.json", forks.allocation_block),
    # bench_latent.py
    "latent": of("latent.json", latent.latent_block),
    "latent-steps": of("latent.json", latent.coverage_block, families=("latent", "gated")),
    "hypotheses": of("latent.json", latent.hypotheses_block),
    "recursion": of("latent.json", latent.coverage_block, families=("recursion",)),
    "recursion-selected": of("latent.json", latent.selection_block),
    "fork-sampling": of("latent.json", latent.coverage_block, families=("fork sampling",)),
    "trees": of("latent.json", latent.coverage_block, families=("tree", "siblings")),
}


def filled(text: str) -> str:
    """A page with every block regenerated."""

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in BLOCKS:
            raise SystemExit(f"expected one of the blocks {', '.join(BLOCKS)}; got {found['name']}")
        return f"{found[1]}{BLOCKS[found['name']]()}\n{found[3]}"

    return BLOCK.sub(fill, text)


def files() -> Iterator[tuple[Path, str]]:
    """Every file that is made of records, as it should be."""
    for page in pages():
        yield page, filled(page.read_text(encoding="utf-8"))
    yield PICTURE, drawn(load("demo.json"))


def measure() -> None:
    shown = subprocess.run([sys.executable, "-m", "proxytune", "demo", "--json"], stdout=subprocess.PIPE, check=True)
    record = {**json.loads(shown.stdout), "weights": weights()}
    keep("demo.json", record)
    keep("formulas.json", formulas.tried())
    keep("quickstart.json", {"proxy": run(demo.code(record["alpha"])), "base": run(demo.code(0.0))})


def run(program: str) -> str:
    """The output of a program."""
    return subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("measure", "write", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--run", nargs="+", type=Path, default=[], metavar="PAGE")
    wanted = parser.parse_args()
    if wanted.measure:
        measure()
    for page in wanted.run:
        with tempfile.TemporaryDirectory() as folder:
            page.write_text(with_outputs(page.resolve(), Path(folder)), encoding="utf-8")
    for file, text in files() if wanted.write or wanted.check else ():
        name = file.relative_to(ROOT)
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        if wanted.check:
            sys.exit(f"{name} is stale: run `python benches/pages.py --write` and commit it")
        file.write_text(text, encoding="utf-8")
    if wanted.check and load("demo.json")["weights"] != weights():
        sys.exit("the figures belong to other weights: run `python benches/pages.py --measure --write` and commit them")


if __name__ == "__main__":
    main()
