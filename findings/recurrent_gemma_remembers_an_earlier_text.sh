#!/usr/bin/env bash
# transformers 5.24.0: what RecurrentGemma generates from a prompt of one token (a BOS token, say) depends on the text
# before it. Its modules keep the state of their convolutions (conv1d_state); generate() makes a cache and passes it, and
# then nobody empties that state. A prompt of several tokens overwrites it, one of a single token goes on from it.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), the same prompt:
#   in a fresh process: [39, 7, 7, 7, 7, 57]
#   after another text: [52, 19, 28, 28, 60, 12]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.manual_seed(0)
model = RecurrentGemmaForCausalLM(
    RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, lru_width=32, attention_window_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.3)
asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
prompt, other = torch.tensor([[5]]), torch.randint(3, 64, (1, 9))
fresh = model.generate(prompt, **asked)[0, 1:].tolist()
print("in a fresh process:", fresh)
model.generate(other, **asked)
after = model.generate(prompt, **asked)[0, 1:].tolist()
print("after another text:", after)
assert fresh != after
PY
