#!/usr/bin/env bash
# transformers 5.24.0: Zamba 2 and Nemotron-H keep the step sizes of their recurrent layers at least at `time_step_min`
# (0.001) in a pass over several tokens, and do not in a pass over a single one, which is how generate() goes on. So a
# text that is generated has other logits than the same text read in one pass, where a step size lies below.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), Zamba 2, largest difference of logits from one pass without a cache:
#   time_step_min=0.001, 6 tokens and then 1 at a time: 0.0145
#   time_step_min=0.001, 6 tokens and then 6 at a time: 0.0000
#   time_step_min=1e-09, 6 tokens and then 1 at a time: 0.0000
#   time_step_min=1e-09, 6 tokens and then 6 at a time: 0.0000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import DynamicCache, Zamba2Config, Zamba2ForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def zamba2(least):
    return Zamba2ForCausalLM(
        Zamba2Config(
            **sizes, num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"], intermediate_size=64,
            num_attention_heads=4, num_key_value_heads=4, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4,
            mamba_ngroups=1, chunk_size=8, adapter_rank=8, initializer_range=0.3, time_step_min=least,
        )
    )


found = {}
for least in (1e-3, 1e-9):
    torch.manual_seed(3)
    model = zamba2(least).eval()
    ids = torch.randint(3, 64, (1, 12))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for step in (1, 6):
            cache = DynamicCache(config=model.config)
            parts = [model(ids[:, :6], cache=cache, use_cache=True).logits]
            for start in range(6, 12, step):
                parts.append(model(ids[:, start : start + step], cache=cache, use_cache=True).logits)
            found[least, step] = (torch.cat(parts, 1) - whole).abs().max().item()
            print(f"time_step_min={least:g}, 6 tokens and then {step} at a time: {found[least, step]:.4f}")
assert found[1e-3, 1] > 1e-3 and max(found[1e-3, 6], found[1e-9, 1], found[1e-9, 6]) < 5e-4, found
PY
