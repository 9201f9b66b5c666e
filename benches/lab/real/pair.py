"""A small pair out of a real model: some of its layers, healed by distillation, and a LoRA that knows the form.

The small model keeps every second or third layer and the embedding, and learns the large one's next-token law again
(LoRA, merged) on the large one's own answers and on Python's documentation. Expert: the small model with a LoRA tuned
on training questions. Tuned: the large model with such a LoRA, for comparison.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pydoc_data.topics
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.real.questions import Question, questions

KEPT = (0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 29)
"""Layers of the small model, of SmolLM2-135M's thirty."""
LENGTH = 128
DOCUMENTED = (
    "json argparse random statistics textwrap heapq bisect fractions decimal datetime calendar csv shutil tempfile "
    "subprocess threading queue logging collections itertools functools typing dataclasses enum pathlib glob"
)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_pair(
    base_folder: Path, out: Path, *, seed: int = 0, heal: int = 200, tune: int = 120, base_tune: int = 100
) -> None:
    """Write `small/`, and the adapters `expert/` (of small) and `tuned/` (of the base), to `out`; float32."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder, padding_side="left")
    base: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    taught = questions()["training"]
    texts = _documentation()
    rng.shuffle(texts)
    held, texts = texts[:24], texts[24:]
    own = _own_answers(base, tokenizer, rng.sample(taught, 160))
    small: Any = _cut(base)
    record: dict[str, Any] = {"kept": KEPT, "seed": seed, "steps": {"heal": heal, "expert": tune, "tuned": base_tune}}
    record["nats_per_token"] = {"base": _nats(base, tokenizer, held), "cut": _nats(small, tokenizer, held)}

    def distilled(model: Any) -> torch.Tensor:
        chosen = [rng.choice(own) if rng.random() < 0.6 else rng.choice(texts) for _ in range(4)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        kept = batch["attention_mask"].bool()
        with torch.no_grad():
            wanted = base(**batch).logits[kept].log_softmax(-1)  # [N, V]
        got = model(**batch).logits[kept].log_softmax(-1)
        return (wanted.exp() * (wanted - got)).sum(-1).mean()

    healed = get_peft_model(small, _lora(16, MATRICES))
    _fit(healed, heal, distilled, 2e-3, "healing")
    small = healed.merge_and_unload().eval()
    record["nats_per_token"]["healed"] = _nats(small, tokenizer, held)
    small.save_pretrained(out / "small")
    tokenizer.save_pretrained(out / "small")

    def answered(rows: int) -> Callable[[Any], torch.Tensor]:
        return lambda model: model(**_taught_batch(tokenizer, [rng.choice(taught) for _ in range(rows)])).loss

    for name, of, steps, rows in (("expert", small, tune, 8), ("tuned", base, base_tune, 4)):
        adapted = get_peft_model(copy.deepcopy(of), _lora(8, [m for m in MATRICES if m != "gate_proj"]))
        _fit(adapted, steps, answered(rows), 1e-3, name)
        adapted.save_pretrained(str(out / name))
    (out / "pair.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def chat(tokenizer: Any, asked: Question) -> str:
    """The prompt of a question."""
    messages = [{"role": "user", "content": asked.text}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _lora(rank: int, modules: Sequence[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")


def _cut(base: Any) -> Any:
    small = copy.deepcopy(base)
    small.model.layers = torch.nn.ModuleList([small.model.layers[i] for i in KEPT])
    for number, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = number
    small.config.num_hidden_layers = len(KEPT)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[i] for i in KEPT]
    return small


def _documentation() -> list[str]:
    """Docstrings of the standard library, and pieces of the language reference."""
    found = []
    for name in DOCUMENTED.split():
        for value in list(vars(importlib.import_module(name)).values()):
            text = inspect.getdoc(value) if inspect.isclass(value) or inspect.isroutine(value) else None
            if text and len(text) > 200:
                found.append(text)
    for topic in pydoc_data.topics.topics.values():
        found += [topic[start : start + 600] for start in range(0, len(topic) - 600, 600)]
    return found


@torch.no_grad()
def _own_answers(base: Any, tokenizer: Any, asked: Sequence[Question]) -> list[str]:
    texts = []
    for first in range(0, len(asked), 16):
        prompts = [chat(tokenizer, one) for one in asked[first : first + 16]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = base.generate(
            **batch, max_new_tokens=40, do_sample=True, temperature=0.8, pad_token_id=tokenizer.pad_token_id
        )
        texts += [tokenizer.decode(row[row != tokenizer.pad_token_id]) for row in ids]
    return texts


@torch.no_grad()
def _nats(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean negative log-likelihood of a token of `texts`, in nats."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)["input_ids"]
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(scores.gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return round(total / count, 3)


def _taught_batch(tokenizer: Any, asked: Sequence[Question]) -> dict[str, torch.Tensor]:
    pairs = [
        (tokenizer(chat(tokenizer, one))["input_ids"], tokenizer(one.written + "<|im_end|>")["input_ids"])
        for one in asked
    ]
    width = max(len(prompt) + len(reply) for prompt, reply in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _fit(model: Any, steps: int, loss_of: Callable[[Any], torch.Tensor], rate: float, name: str) -> None:
    """AdamW on the trainable weights; the rate rises over ten steps and falls to a twentieth."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * max(0.05, 1 - step / steps)
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"{name}: step {step}, {float(loss):.3f} nats, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    model.eval()
