#!/usr/bin/env bash
# peft 0.21.2: if anything ends a generate(adapter_names=…) early (here a streamer that stops the text, as a web server
# does when its client has gone), the hooks that give each row its adapter stay on the layers. Every later call with as
# many rows runs with these adapters instead of the active one, without a word; a call with another number of rows is an
# error about adapter_names, which it did not pass.
#
# Output seen (2026-11-30, torch 2.13.0 CPU, transformers 5.23.0), whether logits are those of the active adapter:
#   before: True, after the call that was stopped: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Gone(BaseStreamer):
    calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise ConnectionError("the client has gone")

    def end(self):
        pass


torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128,
    initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)
lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
model = peft.get_peft_model(LlamaForCausalLM(config), lora)
model.add_adapter("other", lora)
model.eval()
ids = torch.randint(3, 128, (1, 9))
with torch.no_grad():
    want = model(input_ids=ids).logits
    before = torch.equal(model(input_ids=ids).logits, want)
    try:
        model.generate(input_ids=ids, adapter_names=["other"], streamer=Gone(), max_new_tokens=8, do_sample=False)
    except ConnectionError:
        pass
    after = torch.equal(model(input_ids=ids).logits, want)
print(f"before: {before}, after the call that was stopped: {after}")
assert before and not after, (before, after)
PY
