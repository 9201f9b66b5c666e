"""Decoding loops to hand to `generate(custom_generate=…)`, for what a logits processor cannot express."""
