#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: `generate()` of a model with a learned prompt (prompt tuning, prefix tuning,
# p-tuning) gives another text than the same model without a cache. transformers 5.24 calls the cache `cache`; peft looks
# for `past_key_values`, takes every step for the first one, and puts the learned prompt before each new token.
# With transformers 5.23.0 both texts are equal.
#
# Output seen (2026-11-30, torch 2.13.0 CPU):
#   PromptTuningConfig: with a cache [97, 95, 31, 109, 51, 89], without [97, 27, 80, 99, 79, 51]
#   PrefixTuningConfig: with a cache [32, 118, 99, 53, 99, 66], without [32, 72, 77, 78, 9, 68]
#   PromptEncoderConfig: with a cache [9, 9, 68, 16, 11, 106], without [9, 68, 8, 125, 24, 70]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NEW = 6
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
ids = torch.randint(3, 120, (1, 7))
for kind, more in (
    (peft.PromptTuningConfig, {}),
    (peft.PrefixTuningConfig, {}),
    (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, initializer_range=0.3, pad_token_id=0, eos_token_id=None, **SIZES)
    model = LlamaForCausalLM(config)
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **more)).eval()
    for weight in model.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    with_cache = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist()
    text = ids
    with torch.no_grad():
        for _ in range(NEW):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    without = text[0, -NEW:].tolist()
    print(f"{kind.__name__}: with a cache {with_cache}, without {without}")
    assert with_cache[0] == without[0] and with_cache != without
PY
