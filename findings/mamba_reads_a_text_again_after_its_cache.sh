#!/usr/bin/env bash
# transformers 5.24.0: generate() with the cache of an earlier call and the whole text, the usual way to go on, reads the
# text a second time on a model with recurrent layers only (Mamba): the state has then seen it twice. For models with
# attention layers it cuts the ids to those that the cache does not hold. With the last token alone Mamba is right.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), largest difference of logits from one call without a break:
#   the cache and the whole text: 0.89
#   the cache and the last token: 0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(3)
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
model = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=None)).eval()
ids = torch.randint(3, 64, (1, 8))
asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
straight = model.generate(ids, max_new_tokens=6, **asked)
moved = {}
for what in ("the whole text", "the last token"):
    half = model.generate(ids, max_new_tokens=3, **asked)
    prompt = half.sequences if what == "the whole text" else half.sequences[:, -1:]
    rest = model.generate(prompt, cache=half.cache, max_new_tokens=3, **asked)
    moved[what] = (torch.stack(rest.logits) - torch.stack(straight.logits[3:])).abs().max().item()
    print(f"the cache and {what}: {moved[what]:.2f}")
assert moved["the whole text"] > 0.1 and moved["the last token"] < 1e-3, moved
PY
