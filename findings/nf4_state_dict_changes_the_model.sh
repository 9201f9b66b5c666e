#!/usr/bin/env bash
# bitsandbytes 0.50.2, NF4 on a CPU: calling `state_dict()` (as `save_pretrained` does) after a forward pass changes what
# the model computes, without a word; with `bnb_4bit_use_double_quant=True` less so.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, transformers 5.23.0), largest difference of logits:
#   plain: 3.33
#   double quantisation: 0.54
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate bitsandbytes==0.50.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=128,
        initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )
).save_pretrained("model")
ids = torch.randint(3, 128, (2, 12))
moved = {}
for name, double in (("plain", False), ("double quantisation", True)):
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32, quantization_config=kind)
    with torch.no_grad():
        before = model(ids).logits
        model.state_dict()
        moved[name] = (model(ids).logits - before).abs().max().item()
    print(f"{name}: {moved[name]:.2f}")
assert min(moved.values()) > 0.01, moved
PY
