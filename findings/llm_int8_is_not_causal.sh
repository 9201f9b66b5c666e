#!/usr/bin/env bash
# bitsandbytes 0.50.2, LLM.int8 on a CPU: a position's logits depend on tokens after it in the same pass, and on the other
# rows of the batch. Which columns count as outliers (and are computed in 16 bits) is decided for the whole pass. So a
# prompt read in chunks, drafts verified in one pass, and another batch give other texts than one token at a time. NF4 and
# unquantised models do not do this.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, transformers 5.23.0), largest difference of logits:
#   none: other tokens later 0.00, another batch 0.00
#   nf4: other tokens later 0.00, another batch 0.00
#   int8: other tokens later 0.12, another batch 0.13
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
kinds = {
    "none": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
ids = torch.randint(3, 128, (2, 12))
other = ids.clone()
other[:, 8:] = torch.randint(3, 128, (2, 4))
moved = {}
for name, kind in kinds.items():
    model = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32, quantization_config=kind)
    with torch.no_grad():
        seen = model(ids).logits
        later = (model(other).logits - seen)[:, :8].abs().max().item()
        batch = (model(ids[:1]).logits - seen[:1]).abs().max().item()
    print(f"{name}: other tokens later {later:.2f}, another batch {batch:.2f}")
    moved[name] = later, batch
assert max(*moved["none"], *moved["nf4"]) < 1e-4, moved
assert min(moved["int8"]) > 0.01, moved
PY
