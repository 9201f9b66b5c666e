"""What does it cost speculation that recurrent layers cannot drop rejected drafts?

    python benches/bench_hybrids.py --write     measure (about 4 minutes) and keep benches/results/hybrids.json
    python benches/bench_hybrids.py             measure and print

Random models of one shape: attention only, and with a recurrent state in three of four layers (Qwen 3.5, gated delta
rule), in all layers beside attention (Falcon-H1, Mamba 2), or with a convolution's (LFM2). The draft costs nothing and
has the model's own greedy text, in which each token is wrong with a set probability; so all have the same acceptance.
Per token: the time of speculation and of plain decoding, and how many tokens and passes it took.

All variants of a cell take turns in a random order, in rounds. A ratio is that of the medians, its interval by
resampling rounds; "relative" is each model's speculation in units of its own passes over as many tokens, so that what
remains is the cost of going back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from proxytune import SpeculativeDecoding
from proxytune.costs.speculation import DraftCosts
from proxytune.methods.speculation.drafts import Draft, Drafter
from proxytune.methods.speculation.round import Proposal
from proxytune.models.members.member import Member
from proxytune.models.members.rewind import make_rewindable

RESULTS = Path(__file__).parent / "results" / "hybrids.json"
LAYERS, HIDDEN, VOCABULARY = 8, 512, 8192
DRAFTED, ACCEPTED, NEW, PROMPT, ROUNDS = 4, (0.6, 0.8), 96, 32, 5
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def models() -> dict[str, PreTrainedModel]:
    """The models, by the name in the table."""
    mixed = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4)}
    linear = {"linear_num_value_heads": 8, "linear_num_key_heads": 8}
    linear |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    conv = {"layer_types": (["conv"] * 3 + ["full_attention"]) * (LAYERS // 4), "block_auto_adjust_ff_dim": False}
    mamba = {"mamba_d_ssm": HIDDEN, "mamba_n_heads": 8, "mamba_d_head": HIDDEN // 8, "mamba_d_state": 64}
    mamba["mamba_chunk_size"] = 16
    makers = {
        "attention (Qwen 3)": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        "gated delta rule in 3 of 4 layers (Qwen 3.5)": lambda: Qwen3_5ForCausalLM(
            Qwen3_5TextConfig(**SHAPE, **mixed, **linear)
        ),
        "convolutions in 3 of 4 layers (LFM2)": lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, **conv)),
        "Mamba 2 beside attention (Falcon-H1)": lambda: FalconH1ForCausalLM(FalconH1Config(**SHAPE, **mamba)),
    }
    made = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        made[name] = make().eval()
    return made


@dataclass(frozen=True)
class Known(Draft):
    """The known text, in which each token is wrong with the probability `wrong`."""

    text: torch.Tensor  # [T]
    wrong: float

    def begin(self, start: Any) -> Drafter:
        """Start a draft of the one row."""
        generator = random.Random(0)
        flips = [generator.random() < self.wrong for _ in range(len(self.text))]
        spoiled = torch.tensor([(int(t) + f) % VOCABULARY for t, f in zip(self.text, flips, strict=True)])

        class Drafting(Drafter):
            def propose(self, count: int, rows: Any, draw: Any) -> Proposal:
                at = rows.texts.prompts.shape[1] + rows.texts.counts[0]
                return Proposal(spoiled[None, at : at + count])

        return Drafting()

    def costs(self, model: Any, rows: int) -> DraftCosts:
        """Drafts cost nothing."""
        return DraftCosts(round=1.0, draft=0.0)


def ratio(times: list[float], first: list[float], draws: int = 1000) -> list[float]:
    """The ratio of two medians over paired rounds, with a 95 % interval."""
    generator, count, found = random.Random(0), len(times), []
    for _ in range(draws):
        rounds = [generator.randrange(count) for _ in range(count)]
        found.append(statistics.median(times[i] for i in rounds) / statistics.median(first[i] for i in rounds))
    found.sort()
    middle = statistics.median(times) / statistics.median(first)
    return [round(x, 3) for x in (middle, found[int(0.025 * draws)], found[int(0.975 * draws)])]


def generate(model: PreTrainedModel, ids: torch.Tensor, loop: Any = None) -> torch.Tensor:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=loop,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0]


class Passes:
    """How many passes a model makes, and over how many tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.lengths: list[int] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])


def of_passes(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds of NEW / 4 passes over `DRAFTED + 1` tokens, after a prompt, none of them taken back."""
    member, cache = Member(model, "base"), DynamicCache(config=model.config)
    member.examine()
    make_rewindable(cache.layers)
    with torch.inference_mode():
        member.forward(ids, cache=cache, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NEW // 4):
            member.forward(ids[:, : DRAFTED + 1], cache=cache)
        return time.perf_counter() - start


def measure() -> list[dict[str, Any]]:
    """A cell for each acceptance and model."""
    made, cells = models(), []
    ids = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    texts = {name: generate(model, ids) for name, model in made.items()}
    counters = {name: Passes(model) for name, model in made.items()}
    for accepted in ACCEPTED:
        loops = {
            name: SpeculativeDecoding(draft=Known(text, 1 - accepted), draft_tokens=DRAFTED)
            for name, text in texts.items()
        }
        times: dict[tuple[str, str], list[float]] = {}
        passes: dict[str, list[int]] = {}
        for number in range(ROUNDS + 1):
            order = [(name, way) for name in made for way in ("speculation", "plain", "passes")]
            random.Random(number).shuffle(order)
            for name, way in order:
                counters[name].lengths.clear()
                start = time.perf_counter()
                if way == "passes":
                    taken = of_passes(made[name], ids)
                else:
                    out = generate(made[name], ids, loops[name] if way == "speculation" else None)
                    taken = time.perf_counter() - start
                    assert torch.equal(out, texts[name])
                if way == "speculation":
                    passes[name] = list(counters[name].lengths[1:])
                if number:  # the first round warms up
                    times.setdefault((name, way), []).append(taken)
        first = next(iter(made))
        relative = {
            name: [s / p for s, p in zip(times[name, "speculation"], times[name, "passes"], strict=True)]
            for name in made
        }
        for name in made:
            cells.append(
                {
                    "model": name,
                    "accepted": accepted,
                    "passes": len(passes[name]),
                    "tokens": sum(passes[name]),
                    "ms a token": round(1000 * statistics.median(times[name, "speculation"]) / NEW, 3),
                    "to plain": ratio(times[name, "speculation"], times[name, "plain"]),
                    "to attention": ratio(times[name, "speculation"], times[first, "speculation"]),
                    "plain to attention": ratio(times[name, "plain"], times[first, "plain"]),
                    "passes to attention": ratio(times[name, "passes"], times[first, "passes"]),
                    "relative": ratio(relative[name], relative[first]),
                }
            )
            print(json.dumps(cells[-1], ensure_ascii=False), flush=True)
    return cells


def hybrids_table(record: dict[str, Any]) -> str:
    """The page's block."""
    lines = [
        "| accepted | model | passes | tokens read | speculation, of plain | speculation, of attention's "
        "| a pass, of attention's | going back |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in record["cells"]:
        shown = [cell[n] for n in ("to plain", "to attention", "passes to attention", "relative")]
        lines.append(
            f"| {cell['accepted']:.0%} | {cell['model']} | {cell['passes']} | {cell['tokens']} | "
            + " | ".join(f"{middle:.2f}× [{low:.2f}, {high:.2f}]" for middle, low, high in shown)
            + " |"
        )
    caption = (
        f"{NEW} tokens after {PROMPT}, drafts of {DRAFTED}, each token right with the probability in the first column; "
        f"times with 95 % intervals. *A pass*: over {DRAFTED + 1} tokens. *Going back*: speculation in units of such "
        f"passes, relative to attention. Random models of {LAYERS} layers and width {HIDDEN}, float32, CPU threads: "
        f"{record['threads']}, torch {record['torch']}, transformers {record['transformers']}; load of the machine: "
        f"{record['load before']:g}."
    )
    return "\n".join([*lines, "", caption])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    record: dict[str, Any] = {
        "command": "python benches/bench_hybrids.py --write",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
    }
    record["cells"] = measure()
    record["load after"] = round(os.getloadavg()[0], 2)
    if wanted.write:
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
