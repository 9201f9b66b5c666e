#!/usr/bin/env bash
# transformers 5.24.0: prompt lookup on a static cache (which 5.23.0 refused) raises an IndexError when a draft near the
# end of the text reaches beyond it: the draft is not cut to the room that is left, and the cache that `generate()`
# makes has room for the text only. On a dynamic cache the same call is right, and so are the drafts of an assistant
# model.
#
# Output seen (2026-11-30, torch 2.13.0 CPU), a prompt of 16 tokens:
#   4 new tokens, prompt lookup, dynamic: the tokens of no cache
#   4 new tokens, assistant model, static: the tokens of no cache
#   4 new tokens, prompt lookup, static: IndexError: index_copy_(): index 19 is out of bounds for dimension 2 with size 19
#   16 new tokens, prompt lookup, dynamic: the tokens of no cache
#   16 new tokens, assistant model, static: the tokens of no cache
#   16 new tokens, prompt lookup, static: IndexError: index_copy_(): index 31 is out of bounds for dimension 2 with size 31
#   40 new tokens, prompt lookup, dynamic: the tokens of no cache
#   40 new tokens, assistant model, static: the tokens of no cache
#   40 new tokens, prompt lookup, static: IndexError: index_copy_(): index 55 is out of bounds for dimension 2 with size 55
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/noise" <<'PY' || { cat "$work/noise" >&2; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=16,
            initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()


model, assistant = tiny(0), tiny(1)
ids = torch.tensor([[5, 6, 7, 8] * 4])
seen = {}
for new in (4, 16, 40):
    asked = {"max_new_tokens": new, "do_sample": False}
    plain = model.generate(ids, use_cache=False, **asked)
    for name, kind, draft in (
        ("prompt lookup", "dynamic", {"prompt_lookup_num_tokens": 4}),
        ("assistant model", "static", {"assistant_model": assistant}),
        ("prompt lookup", "static", {"prompt_lookup_num_tokens": 4}),
    ):
        try:
            out = model.generate(ids, cache_implementation=kind, **draft, **asked)
            seen[name, kind, new] = "the tokens of no cache" if torch.equal(out, plain) else "OTHER TOKENS"
        except IndexError as error:
            seen[name, kind, new] = f"IndexError: {error}"
        print(f"{new} new tokens, {name}, {kind}: {seen[name, kind, new]}")
for (name, kind, _), what in seen.items():
    failed = (name, kind) == ("prompt lookup", "static")
    assert what.startswith("IndexError") if failed else what == "the tokens of no cache", seen
PY
