#!/usr/bin/env bash
# peft 0.21.2: PeftModel.from_pretrained puts an adapter of a deeper model onto one with fewer layers without a word: the
# weights of the layers that are not there are left out. The other way round, where layers get no weights, it warns.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, transformers 5.23.0), warnings of adapter keys:
#   4 layers onto 2: 0, 2 layers onto 4: 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import warnings

import peft
from transformers import LlamaConfig, LlamaForCausalLM


def model(layers):
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, vocab_size=128,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    )


lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
said = {}
for trained, used in ((4, 2), (2, 4)):
    peft.get_peft_model(model(trained), lora).save_pretrained(f"of{trained}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(model(used), f"of{trained}")
    said[trained] = sum("adapter keys" in str(one.message) for one in warned)
print(f"4 layers onto 2: {said[4]}, 2 layers onto 4: {said[2]}")
assert said == {4: 0, 2: 1}, said
PY
