#!/usr/bin/env bash
# transformers 5.24.0: GPT-Neo on a static cache longer than the window of its local attention generates other tokens
# than without a cache, without a word. The window is counted back from the end of the cache, where nothing stands yet,
# not from the token. A cache no longer than the window is right, and so is a dynamic one.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), 4 new tokens, window 8, largest difference of logits from no cache:
#   4 tokens, dynamic: 0.00, the same tokens: True
#   4 tokens, static: 0.00, the same tokens: True
#   7 tokens, dynamic: 0.00, the same tokens: True
#   7 tokens, static: 4.39, the same tokens: False
#   16 tokens, dynamic: 0.00, the same tokens: True
#   16 tokens, static: 5.23, the same tokens: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

torch.manual_seed(3)
model = GPTNeoForCausalLM(
    GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=64, vocab_size=64, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )
).eval()
asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
moved, same = {}, {}
for length in (4, 7, 16):
    ids = torch.randint(3, 64, (1, length))
    alone = model.generate(ids, use_cache=False, **asked)
    for kind in ("dynamic", "static"):
        out = model.generate(ids, cache_implementation=kind, **asked)
        moved[kind, length] = (torch.stack(out.logits) - torch.stack(alone.logits)).abs().max().item()
        same[kind, length] = torch.equal(out.sequences, alone.sequences)
        print(f"{length} tokens, {kind}: {moved[kind, length]:.2f}, the same tokens: {same[kind, length]}")
assert max(moved["dynamic", 4], moved["dynamic", 7], moved["dynamic", 16], moved["static", 4]) < 1e-3, moved
assert min(moved["static", 7], moved["static", 16]) > 0.1 and not same["static", 16], (moved, same)
PY
