#!/usr/bin/env bash
# transformers 5.23.0: `generate(custom_generate=CALLABLE, streamer=S, assistant_model=A)` hands the callable neither the
# streamer nor the assistant, and says nothing. The streamer gets the prompt, and then no token and no end(): whoever
# waits for it waits for ever. A loop of one's own has to take its streamer as an argument of its own.
#
# Output seen (2026-11-29, torch 2.13.0 CPU):
#   handed over: generation_config logits_processor stopping_criteria and the model's own arguments
#   streamer: ['put [1, 3]']
#   warnings: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(f"put {list(value.shape)}")

    def end(self):
        self.got.append("end")


handed = {}


def loop(model, input_ids, **given):
    handed.update(given)
    return input_ids


streamer, ids = Streamer(), torch.tensor([[3, 4, 5]])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    tiny(0).generate(ids, custom_generate=loop, streamer=streamer, assistant_model=tiny(1), max_new_tokens=2)
named = [name for name in ("streamer", "assistant_model") if handed.get(name) is not None]
loops = " ".join(name for name in ("generation_config", "logits_processor", "stopping_criteria") if name in handed)
print(f"handed over: {loops} and the model's own arguments")
print("streamer:", streamer.got)
print("warnings:", len(told))
assert named == [], named
assert streamer.got == ["put [1, 3]"], streamer.got
assert not told, [str(w.message) for w in told]
PY
