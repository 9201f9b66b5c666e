"""The benchmark of expert and antiexpert as one model, at tiny sizes, and what its record says."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHES))
    yield importlib.import_module("bench_lora_pair")
    for name in ("bench_lora_pair", "bench_overlap"):
        sys.modules.pop(name, None)


def test_all_ways_are_one_step_of_the_pair(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(bench, "SHAPE", {"vocab_size": 4000, "num_hidden_layers": 2, **sizes})
    plain = bench.opened(None)
    config = bench.peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    tuned = bench.peft.get_peft_model(bench.copy.deepcopy(plain), config).eval()
    cell = bench.cell(plain, tuned, 2, 2)
    assert cell["apart"] < 1e-5
    assert list(cell["ways"]) == ["floor", "pair", "two passes", "mixed batch"]
    assert cell["ways"]["floor"]["of floor"] == cell["ways"]["two passes"]["of two passes"] == [1, 1, 1]


def test_the_record_meets_its_aims(bench: Any) -> None:
    record = json.loads((BENCHES / "results" / "lora.json").read_text(encoding="utf-8"))
    missed = []
    for family in record["families"]:
        assert family["memory"]["ratio"] <= record["aims"]["memory / two copies"]
        for cell in family["cells"]:
            assert cell["apart"] < 1e-5
            if cell["ways"]["pair"]["of floor"][0] > record["aims"]["pair / floor"]:
                missed.append((family["targets"], cell["batch"]))
    assert missed == []
    first = record["published"][0]
    assert (first["name"], first["apart"], first["pair"]) == ("13B + 7B + 7B", 2.03, 1.522)
    assert bench.lora_table(record).count("×") == 4 * 4
