#!/usr/bin/env bash
# transformers 5.23.0 with PEFT: `AutoModelForCausalLM.from_pretrained(adapter, output_loading_info=True)` tells about the
# adapter's weights only. If the model below it lacks its head (here a reward model), the head is drawn at random, and
# `missing_keys` is empty.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, peft 0.21.2):
#   the reward model itself: ['lm_head.weight']
#   an adapter of it: []
#   the adapter's head is the same in two loads: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0)).save_pretrained("reward")
model, told = AutoModelForCausalLM.from_pretrained("reward", output_loading_info=True)
print("the reward model itself:", sorted(told["missing_keys"]))
peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")

loads = [AutoModelForCausalLM.from_pretrained("adapter", output_loading_info=True) for _ in range(2)]
print("an adapter of it:", sorted(loads[0][1]["missing_keys"]))
same = torch.equal(*(loaded.lm_head.weight for loaded, _ in loads))
print("the adapter's head is the same in two loads:", same)
assert told["missing_keys"] and not loads[0][1]["missing_keys"] and not same
PY
