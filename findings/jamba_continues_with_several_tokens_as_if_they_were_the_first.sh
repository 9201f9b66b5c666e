#!/usr/bin/env bash
# transformers 5.24.0: Mamba 1 and Jamba go on wrongly from a cache with several tokens at once (a chunked prompt, the next
# turn of a chat, drafts): only a single token takes the cached state, several start from an empty one, without a word.
# One token at a time is right. Mamba 2, Qwen3-Next, Falcon-H1 and others take the state in both cases.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), largest difference of logits from one pass without a cache:
#   mamba, 6 tokens and then 1 at a time: 0.00
#   mamba, 6 tokens and then 2 at a time: 1.26
#   mamba, 6 tokens and then 6 at a time: 0.69
#   jamba, 6 tokens and then 1 at a time: 0.00
#   jamba, 6 tokens and then 2 at a time: 4.99
#   jamba, 6 tokens and then 6 at a time: 4.99
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import DynamicCache, JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
jamba = JambaConfig(
    **sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2,
    attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4,
    use_mamba_kernels=False, initializer_range=0.3,
)
mamba = MambaConfig(**sizes, state_size=8, initializer_range=0.3)
found = {}
for make, config in ((MambaForCausalLM, mamba), (JambaForCausalLM, jamba)):
    torch.manual_seed(3)
    model = make(config).eval()
    ids = torch.randint(3, 64, (1, 12))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for step in (1, 2, 6):
            cache = DynamicCache(config=config)
            parts = [model(ids[:, :6], cache=cache, use_cache=True).logits]
            for start in range(6, 12, step):
                parts.append(model(ids[:, start : start + step], cache=cache, use_cache=True).logits)
            found[config.model_type, step] = (torch.cat(parts, 1) - whole).abs().max().item()
            print(f"{config.model_type}, 6 tokens and then {step} at a time: {found[config.model_type, step]:.2f}")
for kind in ("mamba", "jamba"):
    assert found[kind, 1] < 1e-3 and min(found[kind, 2], found[kind, 6]) > 0.1, found
PY
